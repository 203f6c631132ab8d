"""What the masks and biases of a site mean.

Everything that masks or is added is taken apart as far as it is known (sums, conjunctions, ``where(keep, 0,
low)``), and
each part is one of: shown to be a band around the diagonal, which kernels skip by; a bool tensor, passed on
as it is; a bias, passed on as it is. What a row gives in which every key is masked by a low finite number is
kept as well: the softmax of the naive code is uniform there, and `Masking.empty` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from fastattn.compiler import meanings
from fastattn.compiler.axes import NoMatch
from fastattn.compiler.graph import (
    Call,
    Size,
    call_of,
    is_tensor,
    is_written,
    plain,
    shape_of,
    stops_gradient,
    value_of,
)
from fastattn.compiler.indices import Indices
from fastattn.compiler.magnitude import may_hide
from fastattn.compiler.meanings import Keep
from fastattn.compiler.site import Site, Term, constant_of

# A score beside this one has no share in its row unless its row's largest is below -9,896.
LOW: Final = -1e4
# To this a float32 score of less than 16,384 adds nothing: the sum is this number.
ABSORBS: Final = -5e11
# Largest mask that is computed to see what it is, in elements.
_LARGEST: Final = 1 << 26

# What a row without keys gives: 0; the values' mean; that, with the gradient the naive code gives its scores.
ZERO, UNIFORM, UNIFORM_WITH_GRADIENT = 0, 1, 2


@dataclass
class Masking:
    """All that masks a site and is added to its scores.

    Attributes:
        left, right: a query sees the keys from `left` before to `right` behind its own; None for all. Ints.
        bottom_right: its own is key ``i + L_k - L_q``; if not, i.
        keep: bool tensors, True or False = may attend as `Term.keeps` says; others keep where they are 0.
        bias: added, times `Term.number`.
        empty: what a row without keys gives.
        words: all of it, for the report.
    """

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    keep: list[Term] = field(default_factory=list)
    bias: list[Term] = field(default_factory=list)
    empty: int = ZERO

    @property
    def words(self) -> str:
        found = []
        if self.right == 0 and self.left is None:
            found.append("causal")
        elif self.left is not None or self.right is not None:
            found.append(f"window of {self.left} before and {self.right} behind")
        found += ["bool mask"] * bool(self.keep) + ["bias"] * bool(self.bias)
        return " & ".join(found) or "no mask"


def masking_of(site: Site, known: Indices) -> Masking:
    """What masks a site and is added to its scores.

    Raises:
        NoMatch: it can't be said exactly.
    """
    found = _Finder(site, known)
    for term in site.fills:
        found.fill(term)
    for term in site.added:
        found.add(term)
    return found.close()


class _Finder:
    def __init__(self, site: Site, known: Indices) -> None:
        self.site, self.meanings = site, known
        # How many keys before and behind a query's own are seen, by whether its own is counted from the last.
        self.bounds: dict[bool, tuple[list[int], list[int]]] = {False: ([], []), True: ([], [])}
        self.masking = Masking()
        # The finite numbers that mask: by filling, by being added; and those too weak for rows without keys.
        self.filled: set[float] = set()
        self.summed: list[float] = []
        self.weak: list[Term] = []
        self.infinite = False  # whether -inf masks too
        if site.causal:
            self._bounded([], [0])

    def fill(self, term: Term) -> None:
        if not term.number <= LOW:
            raise NoMatch(f"a mask that puts in {term.number:g}, which does not hide a key for certain")
        if term.number > -math.inf:
            self.filled.add(term.number)
        else:
            self.infinite = True
        self.condition(term.node, term.keeps, term)

    def add(self, term: Term) -> None:
        """A term of a sum; `term.number` is its factor."""
        node, call = term.node, self._call(term.node)
        if call is not None and call.name == "add" and not call.in_place and call.args[2] == 1:
            parts = call.args[:2]
            if all(
                is_tensor(x) and value_of(x).is_floating_point() and not stops_gradient(node, x)
                for x in parts
            ):
                for part in parts:
                    self.add(term._replace(node=part))
                return
        inner = self._moved_only(term, call)
        if inner is not None and value_of(inner.node).is_floating_point():
            self.add(inner)
            return
        choice = self._choice(term, call)
        if choice is None:
            if _constant(node, self.meanings) is None:  # a constant is the same for a whole row
                self.masking.bias.append(term)
            return
        shown, condition, keeps, low = choice
        low *= term.number
        if low == 0:
            return
        if not low <= LOW:
            self.masking.bias.append(term)
            return
        if low > ABSORBS:
            self.weak.append(term)
        if low > -math.inf:
            self.summed.append(low)
        else:
            self.infinite = True
        if shown is not None and self._band(shown if keeps else meanings.negated(shown), term):
            return
        if condition is not None:
            self.condition(condition, keeps, term)
        else:
            self.masking.keep.append(Term(node, term.layout, keeps=True))  # where it is 0

    def _call(self, node: fx.Node) -> Call | None:
        """What a node calls, where what it reads is not written into, and may be read again later."""
        call = call_of(node)
        if call is None or call.in_place or any(is_written(x) for x in node.all_input_nodes):
            return None
        return call

    def _moved_only(self, term: Term, call: Call | None) -> Term | None:
        """The term before a call that only casts it, broadcasts it, or adds dimensions of size 1."""
        if call is None or call.in_place or not call.args or not is_tensor(call.args[0]):
            return None
        source = call.args[0]
        if stops_gradient(term.node, source):
            return None
        if call.name in ("to", "expand", "expand_as", "contiguous"):
            return term._replace(node=source)
        if call.name == "reshape" and value_of(source).dtype != value_of(term.node).dtype:
            return None  # view(dtype): the same bits
        if call.name not in ("reshape", "getitem"):
            return None
        if call.name == "getitem" and not all(_from_first(x) for x in _indices(call)):
            return None
        sources = meanings.matching(shape_of(source), shape_of(term.node))
        layout = self.site.axes.whole(term.layout)
        layout = layout[len(layout) - len(shape_of(term.node)) :]
        if sources is None or len(layout) != len(sources):
            return None
        dims: list[tuple[int, ...]] = [()] * len(shape_of(source))
        for d, s in enumerate(sources):
            if s is not None:
                dims[s] = layout[d]
        return term._replace(node=source, layout=tuple(dims))

    def _choice(
        self, term: Term, call: Call | None
    ) -> tuple[Keep | None, fx.Node | None, bool, float] | None:
        """The condition of an added tensor of two values, one 0: its meaning, its node, whether True gives
        the 0; and the other value."""
        known, node = self.meanings, term.node
        inside = node in known.outer
        if inside:
            known, node = known.outer[node]
            call = call_of(node)
        meaning = known.of(node)
        shown, condition = None, None
        yes: float | None
        no: float | None
        by_condition = call is not None and not call.in_place and call.name in ("where", "masked_fill")
        if by_condition and call is not None and call.name == "where":
            condition, yes, no = call.args[0], *(_number(x, known) for x in call.args[1:])
        elif by_condition and call is not None:
            condition, yes, no = call.args[1], _number(call.args[2], known), _number(call.args[0], known)
        elif not isinstance(meaning, meanings.Choice):
            return None
        if isinstance(meaning, meanings.Choice):
            shown, yes, no = meaning.when, meaning.yes, meaning.no
        if inside:
            condition = None  # a node of the graph around this one
        if yes == 0 and no is not None:
            return shown, condition, True, no
        if no == 0 and yes is not None:
            return shown, condition, False, yes
        return None

    def condition(self, node: Any, keeps: bool, term: Term) -> None:
        """A condition that masks; `keeps`: True may attend."""
        if not is_tensor(node):
            raise NoMatch("a mask that is no tensor")
        call = self._call(node)
        if call is not None and not call.in_place:
            if call.name in ("expand", "expand_as", "contiguous") or (
                call.name == "to" and _is_bool(call.args[0])
            ):
                self.condition(call.args[0], keeps, term)
                return
            if call.name == "invert" and _is_bool(call.args[0]):
                self.condition(call.args[0], not keeps, term)
                return
            joined = call.name == ("and_" if keeps else "or_")
            if joined and all(is_tensor(x) and _is_bool(x) for x in call.args[:2]):
                for part in call.args[:2]:
                    self.condition(part, keeps, term)
                return
        if not _is_bool(node):
            raise NoMatch(f"a mask of {value_of(node).dtype}")
        meaning = self.meanings.of(node)
        if isinstance(meaning, Keep) and not keeps:
            meaning = meanings.negated(meaning)
        if isinstance(meaning, Keep) and self._band(meaning, term):
            return
        computed = evaluated(node)
        if computed is not None and self._by_values(computed if keeps else ~computed, term):
            return
        self.masking.keep.append(Term(node, term.layout, keeps=keeps))

    def _places(self, rank: int, term: Term) -> tuple[int, int] | None:
        """Which dimensions of a tensor of that rank are the queries and the keys."""
        layout = self.site.axes.whole(term.layout)
        dims = layout[len(layout) - rank :] if rank else ()
        rows = [d for d, axes in enumerate(dims) if axes == (self.site.rows,)]
        keys = [d for d, axes in enumerate(dims) if axes == (self.site.keys,)]
        return (rows[0] if rows else -1, keys[0]) if keys else None

    def _band(self, keep: Any, term: Term) -> bool:
        """Whether a meaning is a band, which then is noted."""
        if not isinstance(keep, Keep) or keep.never:
            return False
        places = self._places(keep.rank, term)
        if places is None:
            return not keep.parts
        lefts, rights = [], []
        k_length = self.site.axes.sizes[self.site.keys]
        for part in keep.parts:
            coef = list(part.coef)
            b = coef[places[1]]
            a = coef[places[0]] if places[0] >= 0 else 0
            coef[places[1]] = 0
            if places[0] >= 0:
                coef[places[0]] = 0
            if any(coef):
                return False
            if (a, b) == (1, -1):
                rights.append(part.const)
            elif (a, b) == (-1, 1):
                lefts.append(part.const)
            else:
                always = part.const - (k_length - 1) if (a, b) == (0, -1) else part.const
                if ((a, b) != (0, -1) and min(a, b) < 0) or not _at_least(always, 0):
                    return False
        return self._bounded(lefts, rights)

    def _bounded(self, lefts: list[Size], rights: list[Size]) -> bool:
        """Whether bounds on j - i, from -left to right, are a band around a diagonal, which then is noted."""
        corner = self.site.axes.sizes[self.site.keys] - self.site.axes.sizes[self.site.rows]
        found = {}
        for bottom_right, (own_lefts, own_rights) in self.bounds.items():
            moved_lefts = [plain(x + corner) if bottom_right else x for x in lefts]
            moved_rights = [plain(x - corner) if bottom_right else x for x in rights]
            if all(type(x) is int and x >= 0 for x in (*moved_lefts, *moved_rights)):
                found[bottom_right] = (own_lefts + moved_lefts, own_rights + moved_rights)
        if found:
            self.bounds = found
        return bool(found)

    def _by_values(self, keep: Tensor, term: Term) -> bool:
        """Whether a computed mask is a band, which then is noted."""
        places = self._places(keep.dim(), term)
        if places is None or places[0] < 0:
            return bool(keep.all())
        flat = keep.movedim(places, (-2, -1)).reshape(-1, keep.shape[places[0]], keep.shape[places[1]])
        one = flat[0]
        if one.shape[0] == 1 or one.shape[1] == 1 or not bool((flat == one).all()):
            return bool(keep.all())
        away = torch.arange(one.shape[1])[None] - torch.arange(one.shape[0])[:, None]
        kept = away[one]
        if kept.numel() == 0:
            return False
        right, left = int(kept.max()), -int(kept.min())
        if not torch.equal(one, (away <= right) & (away >= -left)):
            return False
        return self._bounded(
            [left] if left < one.shape[0] - 1 else [], [right] if right < one.shape[1] - 1 else []
        )

    def close(self) -> Masking:
        site, masking = self.site, self.masking
        masked = [(term.node, site.axes.whole(term.layout)) for term in site.fills if not term.keeps]
        zeroed = [(term.node, site.axes.whole(term.layout)) for term in site.zeros]
        if len(set(zeroed)) != len(zeroed) or not set(zeroed) <= set(masked):
            raise NoMatch("probabilities set to 0 where the scores are not masked")
        q_length, k_length = site.axes.sizes[site.rows], site.axes.sizes[site.keys]
        # Of two ways to say it, the one that is causal.
        options = sorted(self.bounds, key=lambda x: (0 not in self.bounds[x][1], x))
        masking.bottom_right = options[0]
        lefts, rights = self.bounds[options[0]]
        ends = (k_length, q_length) if masking.bottom_right else (q_length, k_length)
        masking.left = min((x for x in lefts if not _at_least(x, ends[0] - 1)), default=None)
        masking.right = min((x for x in rights if not _at_least(x, ends[1] - 1)), default=None)
        self._settle_empty(q_length, k_length)
        return masking

    def _settle_empty(self, q_length: Size, k_length: Size) -> None:
        masking = self.masking
        if not self.filled and not self.summed:
            return
        if any(may_hide(term.node) for term in masking.bias):
            raise NoMatch("a mask by a finite number, and a bias that may hide what it leaves of a row")
        full = _at_least(k_length, q_length) or (masking.left is None and masking.right is None)
        if full and not masking.keep:
            return  # each query sees its own key
        if self.site.zeros and not self.summed and len(self.site.zeros) == len(self.site.fills):
            return  # set to 0 behind the softmax
        if self.site.zeros:
            raise NoMatch("probabilities of rows that may have no keys, in part set to 0")
        if self.infinite or self.weak or len(self.filled) + len(self.summed) > 1:
            raise NoMatch(
                "masks by finite numbers of which a row may have nothing else: its softmax depends on them"
            )
        if self.filled and self._added_behind():
            raise NoMatch("a row may have nothing but a bias that is added behind a mask by a finite number")
        masking.empty = UNIFORM if self.filled else UNIFORM_WITH_GRADIENT

    def _added_behind(self) -> bool:
        """Whether a tensor is added to scores that are masked already."""
        filled = False
        for node in self.site.nodes:
            if node is self.site.softmax:
                break
            call = call_of(node)
            name = None if call is None else call.name
            filled = filled or name in ("masked_fill", "where")
            if filled and name in ("add", "sub") and call is not None and all(map(is_tensor, call.args[:2])):
                return True
        return False


def _constant(node: fx.Node, known: Indices) -> float | None:
    """The number that all of a tensor's elements are."""
    meaning = known.of(node)
    if isinstance(meaning, meanings.Affine) and meaning.constant and isinstance(meaning.const, (int, float)):
        return float(meaning.const)
    return None


def _number(x: Any, known: Indices) -> float | None:
    number = constant_of(x)
    return _constant(x, known) if number is None and isinstance(x, fx.Node) else number


def _at_least(a: Any, b: Any) -> bool:
    if type(a) is int and type(b) is int:
        return a >= b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415

    return bool(statically_known_true(a >= b))


def _indices(call: Call) -> tuple[Any, ...]:
    index = call.args[1]
    return index if isinstance(index, tuple) else (index,)


def _from_first(index: Any) -> bool:
    """Whether an index leaves elements where they are, if it leaves all of them."""
    if isinstance(index, slice):
        return index.start in (None, 0) and index.step in (None, 1)
    return index is None or index is Ellipsis


def _is_bool(x: Any) -> bool:
    return is_tensor(x) and value_of(x).dtype == torch.bool


_NOT_KNOWN: Final = {
    *("bernoulli", "multinomial", "normal", "new_empty", "item", "poisson", "binomial", "rrelu"),
    *(
        "gumbel_softmax",
        "exponential",
        "geometric",
        "cauchy",
        "log_normal",
        "uniform",
        "fractional_max_pool2d",
    ),
}


def _is_known(name: str) -> bool:
    return name not in _NOT_KNOWN and "dropout" not in name and not name.startswith(("rand", "empty"))


def evaluated(node: fx.Node) -> Tensor | None:
    """The bool tensor of a node that depends on nothing but numbers written in the graph."""
    if any(type(n) is not int for n in shape_of(node)) or value_of(node).numel() > _LARGEST:
        return None
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    waiting = [(node, False)]
    while waiting:
        one, done = waiting.pop()
        if done:
            order.append(one)
            continue
        if one in seen:
            continue
        seen.add(one)
        call = call_of(one)
        if call is None or call.in_place or not _is_known(call.name) or len(seen) > 300:
            return None
        if is_written(one):
            return None
        waiting.append((one, True))
        waiting += [(x, False) for x in one.all_input_nodes]
    values: dict[fx.Node, Any] = {}
    try:
        with plain_mode():
            for one in order:
                given: Any = fx.map_arg((one.args, one.kwargs), values.__getitem__)
                args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in given[0]]
                kwargs = {name: x for name, x in given[1].items() if name != "device"}
                target: Any = one.target
                call_it = getattr(args.pop(0), target) if one.op == "call_method" else target
                values[one] = call_it(*args, **kwargs)
    except Exception:
        return None  # not known, then
    found = values[node]
    return found if isinstance(found, Tensor) and found.dtype == torch.bool else None


def plain_mode() -> Any:
    """Inside, tensors are computed, also while dynamo traces."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: PLC0415

    return unset_fake_temporarily()
