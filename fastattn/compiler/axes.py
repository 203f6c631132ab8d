"""Which axis of a tensor is which, through products, transposes and views.

The axes of one attention are numbered: batch, heads, queries, keys, head_dim, whatever they are called. A
tensor's layout
is, for each of its dimensions, the axes that lie in it, outermost first: ``[B, H, L, D]`` is four of one
each, ``[B * H, L, D]`` has two in its first, and a dimension of size 1 that is broadcast has none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import fx

from fastattn.compiler.graph import Call, Size, plain, same, shape_of, value_of

Layout = tuple[tuple[int, ...], ...]


class NoMatch(Exception):
    """Why this is not attention that the pass replaces, in words."""


class Axes:
    """The numbered axes of one attention, their sizes, and what each was split into."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self._parts: dict[int, tuple[int, ...]] = {}

    def new(self, size: Size) -> int:
        self.sizes.append(plain(size))
        return len(self.sizes) - 1

    def whole(self, layout: Layout) -> Layout:
        """The layout in axes that are not split further."""
        return tuple(tuple(leaf for axis in dim for leaf in self._leaves(axis)) for dim in layout)

    def _leaves(self, axis: int) -> tuple[int, ...]:
        if axis not in self._parts:
            return (axis,)
        return tuple(leaf for part in self._parts[axis] for leaf in self._leaves(part))

    def size_of(self, dim: tuple[int, ...]) -> Size:
        return math.prod(self.sizes[axis] for axis in dim)

    def reshaped(self, layout: Layout, old: tuple[Size, ...], new: tuple[Size, ...]) -> Layout:
        """The layout behind a view from shape `old` to shape `new`.

        Raises:
            NoMatch: the view mixes axes.
        """
        dims: list[tuple[int, ...]] = []
        waiting = [(dim, n) for dim, n in zip(self.whole(layout), old, strict=True) if not same(n, 1) or dim]
        for size in new:
            if same(size, 1):
                # A broadcast dimension, unless an axis of size 1 is next.
                one = waiting and same(waiting[0][1], 1)
                dims.append(waiting.pop(0)[0] if one else ())
                continue
            while waiting and same(waiting[0][1], 1):
                waiting.pop(0)
            have: tuple[int, ...] = ()
            amount: Size = 1
            while waiting and not same(amount, size):
                dim, n = waiting.pop(0)
                if same(amount * n, size) or _divides(amount * n, size):
                    have, amount = have + dim, amount * n
                    continue
                # This dimension goes on in the next one of the view.
                dim, rest = self._split(dim, n, amount, size)
                have, amount = have + dim, size
                waiting.insert(0, rest)
            if not same(amount, size):
                raise NoMatch("a view mixes the axes of the scores")
            dims.append(have)
        if any(not same(n, 1) for _, n in waiting):
            raise NoMatch("a view mixes the axes of the scores")
        return tuple(dims)

    def _split(self, dim: tuple[int, ...], n: Size, amount: Size, size: Size) -> tuple[tuple[int, ...], Any]:
        """The part of a dimension of `n` that fills up `amount` to `size`, and the rest."""
        if not _divides(amount, size):
            raise NoMatch("a view mixes the axes of the scores")
        first = size // amount
        taken: tuple[int, ...] = ()
        have: Size = 1
        axes = list(dim)
        while axes and not same(have, first):
            axis = axes[0]
            if _divides(have * self.sizes[axis], first):
                taken, have = (*taken, axis), have * self.sizes[axis]
                axes.pop(0)
                continue
            here = first // have
            if not _divides(have, first) or not _divides(here, self.sizes[axis]):
                raise NoMatch("a view mixes the axes of the scores")
            parts = (self.new(here), self.new(self.sizes[axis] // here))
            self._parts[axis] = parts
            taken, have = (*taken, parts[0]), first
            axes[0] = parts[1]
        return taken, (tuple(axes), n // first)


def _divides(a: Size, b: Size) -> bool:
    return same(b % a, 0)


class Product(NamedTuple):
    """A batched product of two tensors over one axis.

    Attributes:
        left, right: the nodes.
        left_layout, right_layout, layout: theirs, and that of the result.
        over: the axis that is summed over.
        scale: factor on the result.
        added: what `baddbmm` adds, and its factor.
    """

    left: fx.Node
    right: fx.Node
    left_layout: Layout
    right_layout: Layout
    layout: Layout
    over: int
    scale: float = 1.0
    added: tuple[fx.Node, float] | None = None


PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


def product_of(call: Call, axes: Axes) -> Product:
    """The product that a call computes.

    Raises:
        NoMatch: it is of another kind.
    """
    if call.name == "einsum":
        return _einsum(call, axes)
    scale, added = 1.0, None
    if call.name == "baddbmm":
        start, left, right, beta, alpha = call.args
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            raise NoMatch("baddbmm with factors that are not numbers")
        scale = float(alpha)
        added = (start, float(beta)) if beta != 0 else None
    else:
        left, right = call.args
    a, b = shape_of(left), shape_of(right)
    if len(a) < 2 or len(b) < 2:
        raise NoMatch("a product with a vector")
    rank = max(len(a), len(b))
    padded = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    batch, left_batch, right_batch = [], [], []
    for x, y in zip(padded[0][:-2], padded[1][:-2], strict=True):
        axis = axes.new(y if same(x, 1) else x)
        batch.append((axis,))
        left_batch.append((axis,) if same(x, axes.sizes[axis]) else ())
        right_batch.append((axis,) if same(y, axes.sizes[axis]) else ())
        if not right_batch[-1] and not same(y, 1):
            raise NoMatch("a product of sizes that are not known to fit")
    m, over, n = axes.new(a[-2]), axes.new(a[-1]), axes.new(b[-1])
    return Product(
        left,
        right,
        (*left_batch[rank - len(a) :], (m,), (over,)),
        (*right_batch[rank - len(b) :], (over,), (n,)),
        (*batch, (m,), (n,)),
        over,
        scale,
        added,
    )


def _einsum(call: Call, axes: Axes) -> Product:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise NoMatch("an einsum of other than two tensors")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    ranks = [value_of(x).dim() for x in operands]
    if "..." in equation:
        spare = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation)
        dims = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
        terms = [
            term.replace("...", spare[max(dims) - n : max(dims)]) for term, n in zip(terms, dims, strict=True)
        ]
        output = output.replace("...", spare[: max(dims)])
    if not arrow:
        letters = "".join(terms)
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    for term in (*terms, output):
        if len(set(term)) != len(term):
            raise NoMatch("an einsum with a letter twice in one tensor")
    over = [c for c in terms[0] if c not in output]
    if len(over) != 1 or over != [c for c in terms[1] if c not in output]:
        raise NoMatch("an einsum that sums over other than one axis of both tensors")
    sizes: dict[str, Size] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, n in zip(term, shape_of(x), strict=True):
            if letter not in sizes or same(sizes[letter], 1):
                sizes[letter] = n
    number = {letter: axes.new(n) for letter, n in sizes.items()}

    def layout(term: str, x: fx.Node) -> Layout:
        found: list[tuple[int, ...]] = []
        for letter, n in zip(term, shape_of(x), strict=True):
            if not same(n, sizes[letter]):
                if not same(n, 1):
                    raise NoMatch("an einsum of sizes that are not known to fit")
                found.append(())
            else:
                found.append((number[letter],))
        return tuple(found)

    return Product(
        operands[0],
        operands[1],
        layout(terms[0], operands[0]),
        layout(terms[1], operands[1]),
        tuple((number[c],) for c in output),
        number[over[0]],
    )
