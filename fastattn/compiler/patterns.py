"""What naive attention looks like.

A site is found from its softmax. Back from there, through whatever is elementwise or only moves elements, is
a product of queries and keys; forward, another product with the values:

    S = q kᵀ · scale     scale before, after or inside; a number, symbolic, or a tensor that is the same for
    all keys S = cap · tanh(S / cap)
    S = S + bias, masked_fill(S, mask, low), where(mask, S, low)
    P = softmax(S) over the keys, in any dtype, cast back
    out = dropout(P) v

each step at most once or often, in any layout and with views in between: `Axes` tells which axis is which.
`find` only reads the graph and gives a `Site` for each, or why it is not one. What masks mean is settled in
`masks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fastattn.compiler.axes import PRODUCTS, Axes, Layout, NoMatch, Product, product_of
from fastattn.compiler.graph import (
    Call,
    call_of,
    fixed_number,
    is_symbolic_number,
    is_tensor,
    same,
    shape_of,
    value_of,
)
from fastattn.compiler.site import Site, Term, constant_of, fixed_probability

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Step = tuple[fx.Node, Call, int]  # node, call, which argument the scores are


def is_candidate(node: fx.Node) -> bool:
    """Whether a node is a softmax whose result reaches a product."""
    call = call_of(node)
    if call is None or call.name != "softmax":
        return False
    return any(_reaches_product(user) for user in node.users)


def _reaches_product(node: fx.Node) -> bool:
    for _ in range(12):
        call = call_of(node)
        if call is None:
            return False
        if call.name in PRODUCTS:
            return True
        if call.name not in _AFTER or not node.users:
            return False
        node = next(iter(node.users))
    return False


def find(softmax: fx.Node) -> Site:
    """The attention around a softmax.

    Raises:
        NoMatch: why it is none that can be replaced.
    """
    axes = Axes()
    call = call_of(softmax)
    assert call is not None
    back = _back(call.args[0], softmax)
    first = back[0][0]
    product = product_of(back[0][1], axes)
    _check_dtype(first)
    after, out, out_call = _after(softmax)
    site = Site(
        softmax,
        [*(step[0] for step in back), softmax, *(step[0] for step in after), out],
        out,
        axes,
        (product.left, product.left_layout),
        (product.right, product.right_layout),
        (product.right, product.right_layout),
        product.layout,
        product.over,
        -1,
        scale=product.scale,
    )
    layout = _Scores(site, product).through(back[1:])
    dim = _one_dim(call.args[1], len(layout))
    key_axes = axes.whole(layout)[dim]
    if len(key_axes) != 1:
        raise NoMatch("the softmax runs over more than one axis of the product of queries and keys")
    layout = _Weights(site).through(after, layout)
    _close(site, product, out_call, layout, key_axes[0], after[-1][0] if after else softmax)
    return site


def _check_dtype(node: fx.Node) -> None:
    dtype = value_of(node).dtype
    if dtype not in _DTYPES:
        raise NoMatch(f"expected float32, bfloat16 or float16, got {dtype}")


def _one_dim(dim: Any, rank: int) -> int:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int):
        raise NoMatch(f"softmax over dim={dim}")
    return dim % rank


_BEFORE = frozenset(
    (
        "mul",
        "div",
        "add",
        "sub",
        "masked_fill",
        "where",
        "tanh",
        "to",
        "contiguous",
        "reshape",
        "transpose",
        "permute",
    )
)
_AFTER = frozenset(
    ("to", "dropout", "contiguous", "reshape", "transpose", "permute", "mul", "div", "masked_fill")
)


def _back(node: Any, user: fx.Node, depth: int = 0) -> list[Step]:
    """From the product of queries and keys to `node`, which only `user` may use."""
    call = call_of(node)
    if call is None or not is_tensor(node) or depth > 40:
        raise NoMatch("the scores are not a product of queries and keys")
    _used_once(node, user, "the scores")
    if call.name in PRODUCTS:
        if call.in_place:
            raise NoMatch("the scores are written into something else")
        return [(node, call, 0)]
    if call.name not in _BEFORE:
        raise NoMatch(f"the scores go through {call.name}")
    places = {"where": (1, 2), "add": (0, 1), "mul": (0, 1)}.get(
        call.name, (0, 1) if call.name == "sub" else (0,)
    )
    failed: NoMatch | None = None
    for place in places:
        x = call.args[place]
        if not is_tensor(x) or not value_of(x).is_floating_point():
            continue
        try:
            found = _back(x, node, depth + 1)
        except NoMatch as error:
            failed = failed or error
            continue
        if call.in_place and place == 1:
            raise NoMatch("the scores are written into something else")
        return [*found, (node, call, place)]
    raise failed or NoMatch("the scores are not a product of queries and keys")


# What reads no more of a tensor than its shape and dtype.
_SHAPE_ONLY = frozenset(
    (
        "ones_like",
        "zeros_like",
        "full_like",
        "empty_like",
        "new_ones",
        "new_zeros",
        "new_full",
        "new_empty",
        "size",
    )
)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Those who use a node's elements."""
    return [x for x in node.users if (call := call_of(x)) is None or call.name not in _SHAPE_ONLY]


def _named(node: fx.Node) -> str:
    call = call_of(node)
    if call is not None:
        return call.name
    return "the graph's output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


def _used_once(node: fx.Node, user: fx.Node, what: str) -> None:
    others = [other for other in _readers(node) if other is not user]
    if others:
        raise NoMatch(f"{what} have another user: {_named(others[0])}")


def _after(softmax: fx.Node) -> tuple[list[Step], fx.Node, Call]:
    """What the probabilities go through, up to the product with the values."""
    steps: list[Step] = []
    node = softmax
    while True:
        users = _readers(node)
        if len(users) != 1:
            others = [user for user in users if not _reaches_product(user)] or users[1:]
            raise NoMatch(f"the probabilities have another user: {_named(others[0])}")
        user = users[0]
        call = call_of(user)
        if call is not None and call.name in PRODUCTS:
            return steps, user, call
        if call is None or call.name not in _AFTER:
            raise NoMatch(f"the probabilities go through {_named(user)}")
        place = 0 if call.args[0] is node else 1
        if call.args[place] is not node or (place == 1 and call.name != "mul"):
            raise NoMatch(f"the probabilities go through {call.name}")
        if call.in_place and place == 1:
            raise NoMatch("the probabilities are written into something else")
        steps.append((user, call, place))
        node = user


class _Moves:
    """What only moves elements, or changes their precision, for scores and probabilities alike."""

    def __init__(self, site: Site) -> None:
        self.site, self.axes = site, site.axes

    def step(self, node: fx.Node, call: Call, place: int, layout: Layout) -> Layout:
        rule: Callable[..., Layout | None] = getattr(self, f"_{call.name}")
        return rule(node, call, place, layout) or layout

    def _to(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        if value_of(node).dtype not in (*_DTYPES, torch.float64):
            raise NoMatch(f"a cast to {value_of(node).dtype}")

    def _contiguous(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        pass

    def _reshape(self, node: fx.Node, call: Call, place: int, layout: Layout) -> Layout:
        return self.axes.reshaped(layout, shape_of(call.args[0]), shape_of(node))

    def _transpose(self, node: fx.Node, call: Call, place: int, layout: Layout) -> Layout:
        dims = list(layout)
        a, b = (_one_dim(d, len(dims)) for d in call.args[1:])
        dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)

    def _permute(self, node: fx.Node, call: Call, place: int, layout: Layout) -> Layout:
        order = call.args[1] if isinstance(call.args[1], (tuple, list)) else call.args[1:]
        return tuple(layout[_one_dim(d, len(layout))] for d in order)

    def _keeps_shape(self, node: fx.Node, source: fx.Node) -> None:
        old, new = shape_of(source), shape_of(node)
        if len(old) != len(new) or not all(same(a, b) for a, b in zip(old, new, strict=True)):
            raise NoMatch("the scores are broadcast against something larger")


def _factor(x: Any, divided: bool) -> float:
    """A number, or one over it."""
    number = fixed_number(x)
    if number is None:
        raise NoMatch("a number that the values of tensors decide")
    if divided and number == 0:
        raise NoMatch("a division by 0")
    return 1 / number if divided else number


class _Scores(_Moves):
    """The algebra from the product of queries and keys to the softmax."""

    def __init__(self, site: Site, product: Product) -> None:
        super().__init__(site)
        self.after_tanh, self.shifted = False, False
        self.inside = 1.0
        if product.added is not None:
            start, beta = product.added
            self._add_term(start, product.layout, beta)

    def through(self, steps: list[Step]) -> Layout:
        layout = self.site.layout
        for node, call, place in steps:
            if call.name not in ("reshape", "transpose", "permute"):
                self._keeps_shape(node, call.args[place])
            layout = self.step(node, call, place, layout)
        site = self.site
        if self.after_tanh:
            # scale · tanh(inside · q kᵀ) = cap · tanh(cap · inside · q kᵀ / cap)
            site.softcap, site.scale = site.scale, site.scale * self.inside
        if not site.scale > 0:
            raise NoMatch(f"a scale of {site.scale}")
        return layout

    def _scaled(self, number: float) -> None:
        site = self.site
        if not number > 0 and (self.after_tanh or site.added or site.fills):
            raise NoMatch(f"scores multiplied by {number}")
        site.scale *= number
        site.added = [term._replace(number=term.number * number) for term in site.added]
        site.fills = [term._replace(number=term.number * number) for term in site.fills]

    def _mul(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        self._by(call.args[1 - place], layout, divided=False)

    def _div(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        if place != 0 or call.args[2] is not None:
            raise NoMatch("the scores are divided with rounding, or divide")
        self._by(call.args[1], layout, divided=True)

    def _by(self, other: Any, layout: Layout, *, divided: bool) -> None:
        site = self.site
        if isinstance(other, (int, float)):
            self._scaled(_factor(other, divided))
            return
        plain = not (self.after_tanh or self.shifted or site.added or site.fills)
        if is_symbolic_number(other):
            if not plain:
                self._scaled(_factor(other, divided))
                return
            site.symbols.append((other, divided))
            return
        if not plain or not is_tensor(other):
            raise NoMatch("the scores are multiplied by a tensor behind a mask, a bias or tanh")
        site.factors.append(Term(other, layout, -1.0 if divided else 1.0))

    def _tanh(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        site = self.site
        if self.after_tanh or self.shifted or site.added or site.fills:
            raise NoMatch("tanh of scores that are masked or have a bias")
        for symbol, divided in site.symbols:
            site.scale *= _factor(symbol, divided)
        site.symbols = []
        self.after_tanh, self.inside, site.scale = True, site.scale, 1.0

    def _add(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        alpha = call.args[2]
        if not isinstance(alpha, (int, float)) or (place == 1 and alpha != 1):
            raise NoMatch("add with an alpha")
        self._add_term(call.args[1 - place], layout, float(alpha))

    def _sub(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        alpha = call.args[2]
        if place != 0 or not isinstance(alpha, (int, float)):
            raise NoMatch("the scores are subtracted from something")
        self._add_term(call.args[1], layout, -float(alpha))

    def _add_term(self, other: Any, layout: Layout, number: float) -> None:
        if not is_tensor(other):
            self.shifted = True  # the same for a whole row, which a softmax does not see
            return
        if not value_of(other).is_floating_point():
            raise NoMatch(f"a bias of {value_of(other).dtype}")
        self.site.added.append(Term(other, layout, number))

    def _masked_fill(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        self._fill(call.args[1], call.args[2], layout, keeps=False)

    def _where(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        self._fill(call.args[0], call.args[3 - place], layout, keeps=place == 1)

    def _fill(self, mask: Any, value: Any, layout: Layout, *, keeps: bool) -> None:
        number = constant_of(value)
        if number is None:
            raise NoMatch("a mask that puts in something other than one number")
        if not is_tensor(mask):
            raise NoMatch("a mask that is no tensor")
        self.site.fills.append(Term(mask, layout, number, keeps))


class _Weights(_Moves):
    """What happens to the probabilities before they meet the values."""

    def through(self, steps: list[Step], layout: Layout) -> Layout:
        for node, call, place in steps:
            if call.name not in ("reshape", "transpose", "permute"):
                self._keeps_shape(node, call.args[place])
            layout = self.step(node, call, place, layout)
        return layout

    def _dropout(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        training, p = call.args[2], call.args[1]
        if isinstance(training, fx.Node):
            raise NoMatch("dropout that is turned on by a tensor")
        if not training:
            return
        number = fixed_probability(p)
        if number > 0 and self.site.dropout > 0:
            raise NoMatch("two dropouts")
        self.site.dropout = max(self.site.dropout, number)

    def _mul(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        other = call.args[1 - place]
        if isinstance(other, (int, float)):
            self.site.weight *= float(other)
        elif is_tensor(other):
            self.site.weights.append(Term(other, layout))
        else:
            raise NoMatch("the probabilities are multiplied by a symbolic number")

    def _div(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        if not isinstance(call.args[1], (int, float)) or call.args[2] is not None:
            raise NoMatch("the probabilities are divided")
        self.site.weight *= _factor(call.args[1], divided=True)

    def _masked_fill(self, node: fx.Node, call: Call, place: int, layout: Layout) -> None:
        if constant_of(call.args[2]) != 0:
            raise NoMatch("the probabilities are filled with something other than 0")
        self.site.zeros.append(Term(call.args[1], layout))


def _close(site: Site, product: Product, out_call: Call, layout: Layout, keys: int, weights: fx.Node) -> None:
    """Join the probabilities' layout with the product of them and the values, and name the axes."""
    axes = site.axes
    inner = Axes()  # of the second product alone
    second = product_of(out_call, inner)
    if second.added is not None:
        raise NoMatch("something is added to the product with the values")
    on_left = second.left is weights
    if second.left is second.right:
        raise NoMatch("the probabilities are multiplied by themselves")
    p_layout, v_layout = second.left_layout, second.right_layout
    v = second.right
    if not on_left:
        p_layout, v_layout, v = v_layout, p_layout, second.left
    _check_dtype(v)
    mapped: dict[int, tuple[int, ...]] = {}
    for theirs, own in zip(p_layout, axes.whole(layout), strict=True):
        if theirs:
            mapped[theirs[0]] = own
        elif any(not same(axes.sizes[axis], 1) for axis in own):
            raise NoMatch("the probabilities are broadcast against the values")
    if mapped.get(second.over) != (keys,):
        raise NoMatch("the softmax does not run over the axis that the values are summed over")
    for dim, n in zip(v_layout, shape_of(v), strict=True):
        if dim and dim[0] not in mapped:
            mapped[dim[0]] = (axes.new(n),)
            site.width = mapped[dim[0]][0]
    for dim in second.layout:
        if dim and dim[0] not in mapped:
            raise NoMatch("the product with the values has an axis of neither")

    def ours(theirs: Layout) -> Layout:
        return tuple(tuple(a for axis in dim for a in mapped[axis]) for dim in theirs)

    site.v = (v, ours(v_layout))
    site.layout = ours(second.layout)
    site.keys = keys
    site.weight *= second.scale
    _name_axes(site, product)


def _name_axes(site: Site, product: Product) -> None:
    axes = site.axes
    left = {a for dim in axes.whole(product.left_layout) for a in dim}
    right = {a for dim in axes.whole(product.right_layout) for a in dim}
    if site.keys in left and site.keys not in right:
        site.q, site.k = (product.right, product.right_layout), (product.left, product.left_layout)
        left, right = right, left
    elif site.keys not in right or site.keys in left:
        raise NoMatch("the softmax runs over an axis of both queries and keys")
    values = {a for dim in axes.whole(site.v[1]) for a in dim}
    scores = [a for dim in axes.whole(product.layout) for a in dim]
    own = [a for a in scores if a in left and a not in right]
    rows = [a for a in own if a not in values]
    if site.width < 0 or not rows:
        raise NoMatch("there is no axis of queries, or none of the values' own")
    site.rows = rows[-1]
    site.batch = tuple(a for a in scores if a not in (site.rows, site.keys))
    if set(values) - {site.keys, site.width} - set(site.batch):
        raise NoMatch("the values have an axis that the scores have not")
    site.q, site.k, site.v = ((node, axes.whole(layout)) for node, layout in (site.q, site.k, site.v))
    site.layout = axes.whole(site.layout)
