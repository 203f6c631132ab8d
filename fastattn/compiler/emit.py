"""What brings a site's tensors into the layout of `fastattn.attention`, and its result back, as nodes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastattn.compiler.axes import Layout, NoMatch
from fastattn.compiler.graph import Writer, same, shape_of, value_of
from fastattn.compiler.masks import Masking
from fastattn.compiler.site import Site, Term

Dim = tuple[int, ...]


class Emitter(Writer):
    """Writes before the last node of a site.

    `groups` are the axes of the four canonical dimensions where a tensor has queries or keys third and, last,
    an axis
    of its own: batch, heads, those two.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site.out)
        self.site, self.axes = site, site.axes
        self.batch: Dim = site.batch
        self.heads: Dim = ()

    def settle_heads(self, k_layout: Layout) -> None:
        """Share the batch's axes out to batch and heads: heads are those that the keys have fewer of."""
        batch = self.site.batch
        if len(batch) < 2:
            return
        there = {axis for dim in k_layout for axis in dim}
        missing = 0
        while missing < len(batch) and batch[-1 - missing] not in there:
            missing += 1
        heads = 1 if missing == 0 else missing + 1 if len(batch) - missing >= 2 else missing
        self.batch, self.heads = batch[: len(batch) - heads], batch[len(batch) - heads :]

    def size(self, axis: int) -> Any:
        """The size of an axis: a number, or a node that gives it."""
        wanted = self.axes.sizes[axis]
        if type(wanted) is int:
            return wanted
        for node, layout in (self.site.q, self.site.k, self.site.v):
            for d, dim in enumerate(self.axes.whole(layout)):
                if dim == (axis,) and same(shape_of(node)[d], wanted):
                    return self.call(torch.ops.aten.sym_size.int, node, d)
        for node in self.graph.nodes:
            if node is self.before:
                break
            value = value_of(node)
            if isinstance(value, torch.SymInt) and same(value, wanted):
                return node
        raise NoMatch("a size that no input has")

    def product(self, dim: Dim) -> Any:
        """The size of merged axes."""
        found: Any = 1
        for axis in dim:
            size = self.size(axis)
            if type(found) is int and (type(size) is int or found == 1):
                found = found * size if type(size) is int else size
            else:
                found = self.call(operator.mul, found, size)
        return found

    def sizes(self, dims: list[Dim]) -> list[Any]:
        """For a reshape: at most one is left to torch."""
        found: list[Any] = []
        for dim in dims:
            whole = self.axes.size_of(dim)
            if type(whole) is int:
                found.append(whole)
            elif -1 not in found:
                found.append(-1)
            else:
                found.append(self.product(dim))
        return found

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if value_of(node).dtype == dtype else self.call(Tensor.to, node, dtype)

    def canonical(self, node: fx.Node, layout: Layout, last: Dim, own: int) -> fx.Node:
        """A tensor as ``[batch, heads, own, last]``; 1 where it is broadcast."""
        wanted: list[Dim] = [self.batch, self.heads, (own,), last]
        whole = (self.batch, self.heads)
        if any(len(dim) > 1 and dim not in whole for dim in layout):
            split: list[Dim] = []
            for dim in layout:
                split += [dim] if len(dim) < 2 or dim in whole else [(axis,) for axis in dim]
            node, layout = (
                self.call(torch.reshape, node, self._split_sizes(node, layout, split)),
                tuple(split),
            )
        # Each wanted dimension is there as it is, not at all, or in parts that are to be merged.
        order: list[int] = []
        pieces: list[list[Dim | None]] = []
        for dim in wanted:
            if dim in layout and dim:
                pieces.append([dim])
                order.append(layout.index(dim))
                continue
            there = [(axis,) if (axis,) in layout else None for axis in dim]
            pieces.append(there if any(there) else [None])  # type: ignore[arg-type]
            order += [layout.index(one) for one in there if one is not None]
        spare = [d for d, dim in enumerate(layout) if d not in order]
        if any(layout[d] for d in spare):
            raise NoMatch("a tensor has an axis that the scores have not")
        order = [*spare, *order]
        if order != list(range(len(order))):
            node = self.call(torch.permute, node, order)
        for _ in spare:
            node = self.call(torch.squeeze, node, 0)
        at = 0
        for dim, parts in zip(wanted, pieces, strict=True):
            for part in parts:
                if part is None:
                    node = self.call(torch.unsqueeze, node, at)
                at += 1
            if len(parts) > 1:
                at -= len(parts)
                if None in parts:
                    node = self._expanded(node, {at + i: self.size(axis) for i, axis in enumerate(dim)})
                node = self.call(torch.flatten, node, at, at + len(parts) - 1)
                at += 1
        return node

    def _split_sizes(self, node: fx.Node, layout: Layout, split: list[Dim]) -> list[Any]:
        """The sizes of a tensor whose merged dimensions are taken apart; those of single ones are its own."""
        sizes = self.sizes(split)
        own = {dim: n for dim, n in zip(layout, shape_of(node), strict=True) if len(dim) < 2}
        return [
            own[dim] if dim in own and type(own[dim]) is int else n
            for dim, n in zip(split, sizes, strict=True)
        ]

    def _expanded(self, node: fx.Node, sizes: dict[int, Any]) -> fx.Node:
        shape = [sizes.get(d, -1) for d in range(value_of(node).dim())]
        return self.call(Tensor.expand, node, shape)

    def expanded(self, node: fx.Node, dim: int, axes: Dim) -> fx.Node:
        """A tensor whose batch or heads are no longer broadcast."""
        if not axes or same(self.axes.size_of(axes), 1) or not same(shape_of(node)[dim], 1):
            return node
        return self._expanded(node, {dim: self.product(axes)})

    def scaled(self, q: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Queries times what multiplies the scores and is the same for all keys."""
        found = q
        for symbol, divided in self.site.symbols:
            found = self.call(torch.div if divided else torch.mul, found, symbol)
        for term in self.site.factors:
            factor = self.term(term)
            if not same(shape_of(factor)[3], 1):
                raise NoMatch("the scores are multiplied by a tensor that is not the same for all keys")
            found = self.call(torch.div if term.number < 0 else torch.mul, found, factor)
        return self.expanded(self.expanded(self.cast(found, dtype), 0, self.batch), 1, self.heads)

    def grouped(self, tensors: list[fx.Node]) -> list[fx.Node]:
        """Keys and values with the whole batch, and the same number of heads."""
        k, v = (self.expanded(x, 0, self.batch) for x in tensors)
        if not same(shape_of(k)[1], shape_of(v)[1]):
            k, v = (self.expanded(x, 1, self.heads) for x in (k, v))
        heads = [shape_of(x)[1] for x in (k, v)]
        if not same(*heads):
            raise NoMatch(f"keys of {heads[0]} heads and values of {heads[1]}")
        return [k, v]

    def term(self, term: Term) -> fx.Node:
        """A tensor that joins the scores, as ``[batch or 1, heads or 1, queries or 1, keys or 1]``."""
        shape = shape_of(term.node)
        layout = self.axes.whole(term.layout)
        if len(shape) > len(layout):
            raise NoMatch("the scores are broadcast against something larger")
        layout = tuple(
            () if same(n, 1) else dim
            for n, dim in zip(shape, layout[len(layout) - len(shape) :], strict=True)
        )
        return self.canonical(term.node, layout, (self.site.keys,), self.site.rows)

    def keep(self, masking: Masking) -> fx.Node | None:
        found: fx.Node | None = None
        for term in masking.keep:
            one = self.term(term)
            if value_of(one).dtype != torch.bool:
                one = self.call(torch.eq, one, 0)
            if not term.keeps:
                one = self.call(torch.logical_not, one)
            found = one if found is None else self.call(torch.logical_and, found, one)
        return found

    def bias(self, masking: Masking) -> fx.Node | None:
        found: fx.Node | None = None
        for term in masking.bias:
            one = self.term(term)
            if term.number != 1:
                one = self.call(torch.mul, one, term.number)
            found = one if found is None else self.call(torch.add, found, one)
        return found

    def weighted(self, out: fx.Node) -> fx.Node:
        """The result times what multiplies the probabilities and is the same for all keys."""
        for term in self.site.weights:
            factor = self.term(term)
            if not same(shape_of(factor)[3], 1):
                raise NoMatch(
                    "the probabilities are multiplied by a tensor that is not the same for all keys"
                )
            out = self.call(torch.mul, out, factor)
        return out if self.site.weight == 1 else self.call(torch.mul, out, self.site.weight)

    def as_before(self, out: fx.Node) -> fx.Node:
        """``[batch, heads, queries, width]`` as the product with the values gave it."""
        site = self.site
        have: list[Dim] = [self.batch, self.heads, (site.rows,), (site.width,)]
        wanted = [dim for dim in site.layout if dim]
        if all(dim in have for dim in wanted):
            kept = [d for d, dim in enumerate(have) if dim]
        else:
            single: list[Dim] = [(axis,) for dim in have for axis in dim]
            out = self.call(torch.reshape, out, self.sizes(single))
            have, kept = single, list(range(len(single)))
        for d in reversed(range(len(have))):
            if d not in kept:
                out = self.call(torch.squeeze, out, d)
        have = [have[d] for d in kept]
        flat = [one for dim in wanted for one in ([dim] if dim in have else [(axis,) for axis in dim])]
        order = [have.index(one) for one in flat]
        if order != list(range(len(order))):
            out = self.call(torch.permute, out, order)
        if len(flat) != len(site.layout):
            out = self.call(torch.reshape, out, self.sizes(list(site.layout)))
        return out
