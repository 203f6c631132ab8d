"""What a computed mask is, shown for every size at once.

Models compute their masks from positions: ``arange``, comparisons, ``cumsum`` of ``diff`` that finds packed
documents, indexing, ``tril``. `Indices` follows such a graph with what each tensor *is* as a function of its
indices
instead of with numbers: an integer tensor is affine, ``c + a₀·i₀ + a₁·i₁ + …``, where c may be a symbolic
size; a bool tensor is a conjunction of ``affine >= 0``; a float tensor has one of two numbers by such a
condition. So a mask is shown to be causal, or a window, for all lengths, without computing it; what can't be
followed is None, and nothing is concluded from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fastattn.compiler import meanings
from fastattn.compiler.graph import Call, call_of, is_written, same, shape_of, value_of
from fastattn.compiler.meanings import Affine, Choice, Keep, Meaning

# Inputs of a region that a higher-order op holds: what they are in the graph around it.
Outer = dict[fx.Node, "tuple[Indices, fx.Node]"]
# Positions below 2^24 are what they are in these.
_EXACT = (torch.int64, torch.int32, torch.float64, torch.float32)


class Indices:
    """Meanings of the nodes of one graph, each worked out once."""

    def __init__(self, graph: fx.Graph, outer: Outer | None = None) -> None:
        self.outer = outer or {}
        self._known: dict[fx.Node, Meaning] = {}
        self._place = {node: i for i, node in enumerate(graph.nodes)}

    def of(self, node: Any) -> Meaning:
        """What the tensor of `node` is; None where that is not known."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = None  # while it is worked out
            # Inputs first, without Python's own stack: graphs are deep.
            order, waiting = [], [node]
            seen = {node}
            while waiting:
                one = waiting.pop()
                order.append(one)
                for x in one.all_input_nodes if self._rule(one) else ():
                    if x not in seen and x not in self._known:
                        seen.add(x)
                        waiting.append(x)
            for one in sorted(order, key=lambda x: self._place.get(x, -1)):
                self._known[one] = self._work_out(one)
        return self._known[node]

    def _rule(self, node: fx.Node) -> Callable[[fx.Node, Call], Meaning] | None:
        call = call_of(node)
        if call is None or call.in_place:
            return None
        rule: Callable[[fx.Node, Call], Meaning] | None = getattr(self, f"_{call.name.strip('_')}", None)
        return rule

    def _work_out(self, node: fx.Node) -> Meaning:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or is_written(node):
            return None
        if node in self.outer:
            outside, source = self.outer[node]
            return outside.of(source)
        rule, call = self._rule(node), call_of(node)
        if rule is None or call is None:
            return None
        try:
            found: Meaning = rule(node, call)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError):
            return None
        if isinstance(found, Affine) and not found.constant and value.dtype not in _EXACT:
            return None
        if not value.is_floating_point() and value.dtype not in (*_EXACT, torch.bool):
            # Small integers wrap around.
            numbers: tuple[Any, ...] = (found.const,) if isinstance(found, Affine) else ()
            if isinstance(found, Choice):
                numbers = (found.yes, found.no)
            if any(not meanings.plain_number(x) or x not in (0, 1) for x in numbers):
                return None
        return meanings.normal(found, tuple(value.shape))

    # --- tensors made from nothing

    def _arange(self, node: fx.Node, call: Call) -> Meaning:
        given = [value_of(x) for x in call.args]
        start, step = 0, 1
        if len(given) > 1:
            start = given[0]
        elif "start" in call.kwargs:
            start = value_of(call.kwargs["start"])
        if len(given) > 2:
            step = given[2]
        elif "step" in call.kwargs:
            step = value_of(call.kwargs["step"])
        if isinstance(start, float) or type(step) is not int:
            return None
        return Affine(start, (step,))

    def _filled(self, node: fx.Node, number: Any) -> Meaning:
        rank = value_of(node).dim()
        if value_of(node).dtype == torch.bool:
            return Keep((), rank, never=not number)
        return Affine(number, (0,) * rank)

    def _ones(self, node: fx.Node, call: Call) -> Meaning:
        return self._filled(node, 1)

    _new_ones = _ones_like = _ones

    def _zeros(self, node: fx.Node, call: Call) -> Meaning:
        return self._filled(node, 0)

    _new_zeros = _zeros_like = _zeros

    def _full(self, node: fx.Node, call: Call) -> Meaning:
        fill = call.args[-1] if "fill_value" not in call.kwargs else call.kwargs["fill_value"]
        return self._filled(node, fill) if isinstance(fill, (int, float)) else None

    def _full_like(self, node: fx.Node, call: Call) -> Meaning:
        fill = call.args[1] if len(call.args) > 1 else call.kwargs["fill_value"]
        return self._filled(node, fill) if isinstance(fill, (int, float)) else None

    def _new_full(self, node: fx.Node, call: Call) -> Meaning:
        fill = call.args[2] if len(call.args) > 2 else call.kwargs["fill_value"]
        return self._filled(node, fill) if isinstance(fill, (int, float)) else None

    def _tensor(self, node: fx.Node, call: Call) -> Meaning:
        return self._filled(node, call.args[0]) if isinstance(call.args[0], (int, float)) else None

    def _scalar_tensor(self, node: fx.Node, call: Call) -> Meaning:
        return self._tensor(node, call)

    # --- the same elements in another place

    def _reshape(self, node: fx.Node, call: Call) -> Meaning:
        x = call.args[0]
        if value_of(x).dtype != value_of(node).dtype:
            return None  # view(dtype): the same bits
        moved = meanings.matching(shape_of(x), shape_of(node))
        return None if moved is None else meanings.moved(self.of(x), moved)

    def _transpose(self, node: fx.Node, call: Call) -> Meaning:
        rank = value_of(node).dim()
        order = list(range(rank))
        a, b = call.args[1] % rank, call.args[2] % rank
        order[a], order[b] = order[b], order[a]
        return meanings.moved(self.of(call.args[0]), order)

    def _t(self, node: fx.Node, call: Call) -> Meaning:
        return meanings.moved(self.of(call.args[0]), [1, 0])

    def _permute(self, node: fx.Node, call: Call) -> Meaning:
        dims = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
        return meanings.moved(self.of(call.args[0]), [d % len(dims) for d in dims])

    def _expand(self, node: fx.Node, call: Call) -> Meaning:
        x = call.args[0]
        added = value_of(node).dim() - value_of(x).dim()
        return meanings.moved(self.of(x), [*[None] * added, *range(value_of(x).dim())])

    _expand_as = _expand

    def _contiguous(self, node: fx.Node, call: Call) -> Meaning:
        return self.of(call.args[0])

    _detach = _contiguous

    def _getitem(self, node: fx.Node, call: Call) -> Meaning:
        x, index = call.args
        index = index if isinstance(index, tuple) else (index,)
        meaning = self.of(x)
        rank = value_of(x).dim() if isinstance(value_of(x), torch.Tensor) else None
        if meaning is None or rank is None:
            return None
        if index and all(isinstance(i, fx.Node) for i in index):
            return self._gathered(node, meaning, rank, index)
        given = sum(1 for i in index if i is not None and i is not Ellipsis)
        moved: list[int | None] = []
        dim = 0
        for i in index:
            if i is None:
                moved.append(None)
            elif i is Ellipsis:
                moved += range(dim, dim + rank - given)
                dim += rank - given
            elif isinstance(i, slice) and i.step in (None, 1):
                if i.start is not None and (type(i.start) is not int or i.start < 0):
                    return None
                meaning = meanings.shifted(meaning, dim, i.start or 0)
                moved.append(dim)
                dim += 1
            elif type(i) is int and i >= 0:
                meaning = meanings.shifted(meaning, dim, i)
                dim += 1
            else:
                return None
        return meanings.moved(meaning, [*moved, *range(dim, rank)])

    def _gathered(self, node: fx.Node, meaning: Meaning, rank: int, index: tuple[Any, ...]) -> Meaning:
        """``x[i, j]`` with tensors of indices."""
        found = [self.of(i) for i in index]
        places = [p for p in found if isinstance(p, Affine)]
        if len(places) != rank or len(found) != rank:
            return None
        out_rank = value_of(node).dim()
        # A negative index counts from the end; what is affine with these parts is never negative.
        if any(not meanings.not_negative(p) for p in places):
            return None

        def at(x: Affine) -> Affine:
            const, coef = x.const, [0] * out_rank
            for a, p in zip(x.coef, places, strict=True):
                if a:
                    const = const + a * p.const
                    padded = meanings.padded(p, out_rank)
                    coef = [c + a * b for c, b in zip(coef, padded.coef, strict=True)]
            return Affine(const, tuple(coef))

        return meanings.mapped(meaning, at, out_rank)

    def _to(self, node: fx.Node, call: Call) -> Meaning:
        source, dtype = self.of(call.args[0]), value_of(node).dtype
        if isinstance(source, Affine) and dtype == torch.bool:
            return (
                meanings.compared(source, "ne", 0)
                if source.constant and meanings.plain_number(source.const)
                else None
            )
        if isinstance(source, Affine) and not dtype.is_floating_point and isinstance(source.const, float):
            return None
        if isinstance(source, Keep) and dtype != torch.bool:
            return Choice(source, 1, 0)
        if isinstance(source, Choice) and dtype == torch.bool:
            return meanings.chosen(source, lambda x: x != 0)
        if isinstance(source, Choice) and not dtype.is_floating_point:
            return source if source.yes == int(source.yes) and source.no == int(source.no) else None
        return source

    # --- arithmetic

    def _pair(self, node: fx.Node, call: Call) -> tuple[Any, Any]:
        rank = value_of(node).dim()
        pair = []
        for x in call.args[:2]:
            value = value_of(x)
            if isinstance(value, torch.Tensor):
                meaning = self.of(x)
                if meaning is None:
                    raise ValueError
                pair.append(meanings.mapped(meaning, lambda a: meanings.padded(a, rank), rank))
            else:
                pair.append(Affine(value, (0,) * rank))
        return pair[0], pair[1]

    def _add(self, node: fx.Node, call: Call, sign: int = 1) -> Meaning:
        if call.args[2] != 1:
            return None
        a, b = self._pair(node, call)
        if isinstance(a, Affine) and isinstance(b, Affine):
            return Affine(
                a.const + sign * b.const, tuple(x + sign * y for x, y in zip(a.coef, b.coef, strict=True))
            )
        if isinstance(a, Choice) and meanings.is_number(b):
            return meanings.arithmetic(a, lambda x: x + sign * b.const)
        if isinstance(b, Choice) and meanings.is_number(a):
            return meanings.arithmetic(b, lambda x: a.const + sign * x)
        return None

    def _sub(self, node: fx.Node, call: Call) -> Meaning:
        return self._add(node, call, sign=-1)

    def _rsub(self, node: fx.Node, call: Call) -> Meaning:
        turned = Call("sub", (call.args[1], call.args[0], 1), {}, False)
        return self._add(node, turned, sign=-1)

    def _mul(self, node: fx.Node, call: Call) -> Meaning:
        a, b = self._pair(node, call)
        if isinstance(a, Keep) and isinstance(b, Keep):
            return meanings.both(a, b)
        if meanings.is_number(a):
            a, b = b, a
        if not meanings.is_number(b):
            return None
        if isinstance(a, Affine):
            if a.constant or type(b.const) is int:
                return Affine(a.const * b.const, tuple(c * int(b.const) if c else 0 for c in a.coef))
            return None
        return meanings.arithmetic(meanings.as_choice(a), lambda x: x * b.const)

    def _neg(self, node: fx.Node, call: Call) -> Meaning:
        x = self.of(call.args[0])
        if isinstance(x, Affine):
            return Affine(-x.const, tuple(-c for c in x.coef))
        return meanings.arithmetic(x, lambda n: -n) if isinstance(x, Choice) else None

    def _log(self, node: fx.Node, call: Call) -> Meaning:
        x = self.of(call.args[0])
        return (
            meanings.arithmetic(x, lambda n: math.log(n) if n else -math.inf)
            if isinstance(x, Choice)
            else None
        )

    def _diff(self, node: fx.Node, call: Call) -> Meaning:
        x, n, dim, prepend, append = call.args
        a, first = self.of(x), self.of(prepend)
        if n != 1 or append is not None or not isinstance(a, Affine) or not isinstance(first, Affine):
            return None
        step = a.coef[dim]
        if (
            shape_of(prepend)[dim] != 1
            or first.coef[:dim] != a.coef[:dim]
            or dim not in (-1, len(a.coef) - 1)
        ):
            return None
        if not same(a.const - first.const, step):
            return None
        return Affine(step, (0,) * len(a.coef))

    def _cumsum(self, node: fx.Node, call: Call) -> Meaning:
        x = self.of(call.args[0])
        rank = value_of(node).dim()
        if isinstance(x, Keep) and (x.never or not x.parts):
            x = Affine(0 if x.never else 1, (0,) * rank)
        if not isinstance(x, Affine) or not x.constant or not isinstance(x.const, int):
            return None
        coef = [0] * rank
        coef[call.args[1]] = int(x.const)
        return Affine(x.const, tuple(coef))

    # --- conditions

    def _compare(self, node: fx.Node, call: Call) -> Meaning:
        a, b = self._pair(node, call)
        name = call.name
        if isinstance(a, Affine) and not isinstance(b, Affine):
            a, b = b, a
            name = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}.get(name, name)
        if isinstance(a, Affine):
            difference = Affine(a.const - b.const, tuple(x - y for x, y in zip(a.coef, b.coef, strict=True)))
            return meanings.compared(difference, name, 0)
        if isinstance(a, Keep) and isinstance(b, Keep):
            if not b.parts and name in ("eq", "ne"):
                return a if (name == "eq") != b.never else meanings.negated(a)
            return None
        if meanings.is_number(b):
            tests = {
                "eq": lambda x: x == b.const,
                "ne": lambda x: x != b.const,
                "ge": lambda x: x >= b.const,
                "gt": lambda x: x > b.const,
                "le": lambda x: x <= b.const,
                "lt": lambda x: x < b.const,
            }
            return meanings.chosen(meanings.as_choice(a), tests[name])
        return None

    _eq = _ne = _ge = _gt = _le = _lt = _compare

    def _and(self, node: fx.Node, call: Call) -> Meaning:
        a, b = self._pair(node, call)
        return meanings.both(a, b) if isinstance(a, Keep) and isinstance(b, Keep) else None

    def _invert(self, node: fx.Node, call: Call) -> Meaning:
        x = self.of(call.args[0])
        return meanings.negated(x) if isinstance(x, Keep) else None

    def _where(self, node: fx.Node, call: Call) -> Meaning:
        rank = value_of(node).dim()
        when = self.of(call.args[0])
        yes, no = (self._one_number(x) for x in call.args[1:])
        if not isinstance(when, Keep) or yes is None or no is None:
            return None
        when = meanings.kept(when, lambda a: meanings.padded(a, rank), rank)
        if value_of(node).dtype == torch.bool:
            return meanings.chosen(Choice(when, yes, no), bool)
        return Choice(when, yes, no)

    def _masked_fill(self, node: fx.Node, call: Call) -> Meaning:
        x, mask, value = call.args
        turned = Call("where", (mask, value, x), {}, False)
        return self._where(node, turned)

    def _one_number(self, x: Any) -> float | None:
        """The number that all of a tensor's elements are, or a number."""
        if isinstance(x, (int, float)):
            return float(x)
        found = self.of(x)
        if isinstance(found, Keep) and (found.never or not found.parts):
            return 0.0 if found.never else 1.0
        if isinstance(found, Affine) and meanings.is_number(found):
            return float(found.const)
        return None

    def _tril(self, node: fx.Node, call: Call, sign: int = 1) -> Meaning:
        x, diagonal = self.of(call.args[0]), value_of(call.args[1])
        rank = value_of(node).dim()
        # tril keeps j <= i + diagonal, triu j >= i + diagonal.
        part = Affine(sign * diagonal, (*(0,) * (rank - 2), sign, -sign))
        if isinstance(x, Keep) and not x.never:
            return Keep((*x.parts, part), rank)
        if isinstance(x, Affine) and meanings.is_number(x):
            return Choice(Keep((part,), rank), x.const, 0)
        if isinstance(x, Choice) and x.no == 0:
            return Choice(Keep((*x.when.parts, part), rank, x.when.never), x.yes, 0)
        return None

    def _triu(self, node: fx.Node, call: Call) -> Meaning:
        return self._tril(node, call, sign=-1)
