"""Queries, keys and values before what the kernels do themselves: casts to more digits, repeated heads."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fastattn.compiler.axes import Layout
from fastattn.compiler.graph import call_of, is_written, same, shape_of, stops_gradient, value_of
from fastattn.compiler.site import Site

Placed = tuple[fx.Node, Layout]


def before_widening(node: fx.Node) -> fx.Node:
    """The node without casts of half precision to float32."""
    call = call_of(node)
    if call is None or call.name != "to" or call.in_place or not call.args:
        return node
    source = call.args[0]
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), Tensor):
        return node
    if is_written(source) or stops_gradient(node, source):
        return node
    narrow, wide = value_of(source).dtype, value_of(node).dtype
    if narrow in (torch.bfloat16, torch.float16) and wide == torch.float32:
        return before_widening(source)
    return node


def before_repeat(site: Site, k: Placed, v: Placed) -> tuple[Placed, Placed]:
    """The keys and values before each head of theirs was repeated for a group of queries' heads."""
    found = [_unrepeated(site, *x) for x in (k, v)]
    if found[0] is None or found[1] is None or found[0][2] != found[1][2]:
        return k, v
    if len(site.batch) < 2 or is_written(found[0][0]) or is_written(found[1][0]):
        return k, v
    return found[0][:2], found[1][:2]


def _unrepeated(site: Site, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, tuple[int, ...]] | None:
    """The node without its repetition, its layout, and the axes that are repeated over."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    source = call.args[0]
    if stops_gradient(node, source):
        return None
    axes = site.axes
    if call.name in ("transpose", "permute", "contiguous"):
        rank = len(layout)
        if call.name == "contiguous":
            order = list(range(rank))
        elif call.name == "transpose":
            order = list(range(rank))
            a, b = call.args[1] % rank, call.args[2] % rank
            order[a], order[b] = order[b], order[a]
        else:
            dims = call.args[1] if isinstance(call.args[1], (tuple, list)) else call.args[1:]
            order = [d % rank for d in dims]
        inner: list[tuple[int, ...]] = [()] * rank
        for at, d in enumerate(order):
            inner[d] = layout[at]
        return _unrepeated(site, source, tuple(inner))
    dim, groups = -1, 1
    base = source
    if call.name == "repeat_interleave" and type(call.args[1]) is int:
        dim, groups = call.args[2] % len(layout), call.args[1]
    elif call.name == "reshape":
        expand = call_of(source)
        if expand is None or expand.name != "expand":
            return None
        base = expand.args[0]
        wide, narrow, merged = shape_of(source), shape_of(base), shape_of(node)
        repeated = [d for d, (x, y) in enumerate(zip(wide, narrow, strict=False)) if not same(x, y)]
        if len(wide) != len(narrow) or len(repeated) != 1 or len(merged) != len(wide) - 1:
            return None
        at = repeated[0]
        if at == 0 or type(wide[at]) is not int or not same(narrow[at], 1):
            return None
        expected = (*wide[: at - 1], wide[at - 1] * wide[at], *wide[at + 1 :])
        if not all(same(x, y) for x, y in zip(expected, merged, strict=True)):
            return None
        dim, groups = at - 1, wide[at]
    if dim < 0 or len(layout[dim]) != 1:
        return None
    axis = layout[dim][0]
    size = axes.sizes[axis]
    if axis not in site.batch or type(size) is not int or size % groups or site.batch[-1] != axis:
        return None
    if call.name == "repeat_interleave":
        return base, layout, (axis, groups)
    return base, (*layout[:dim], layout[dim], (), *layout[dim + 1 :]), (axis, groups)
