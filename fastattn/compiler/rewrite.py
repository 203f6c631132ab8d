"""The pass: finds naive attention in a graph before autograd is traced, and puts one op in its place.

It works on the graph that dynamo hands to a backend, forward only, where the replacement brings its own
gradient; after the joint graph is made the decision to keep the L×L matrix has been taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx

from fastattn.compiler import op
from fastattn.compiler.axes import Layout, NoMatch
from fastattn.compiler.emit import Emitter
from fastattn.compiler.graph import (
    call_of,
    erase_unused,
    location_of,
    same,
    shape_of,
    storage_of,
    thread_writes,
    value_of,
    writes_of,
)
from fastattn.compiler.indices import Indices
from fastattn.compiler.masks import Masking, masking_of
from fastattn.compiler.patterns import Site, find, is_candidate
from fastattn.compiler.report import Record

# Calls that change how what follows them is computed.
_MODES: Final = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_TRANSFORMS: Final = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")
_TRANSFORMS_END: Final = ("_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting")
# Higher-order ops whose graphs are computed as they stand, once or again.
_HOLDERS: Final = (
    "tag_activation_checkpoint",
    "invoke_subgraph",
    "wrap",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
)


def replace_attention(module: fx.GraphModule) -> list[Record]:
    """Replace every naive attention in a graph module, and in the regions it holds, by fastattn's.

    Args:
        module: as dynamo, or `torch.export`, made it: its nodes have fake values noted. Changed in place.

    Returns:
        A record for each site, whether replaced or left.
    """
    records = []
    for graph_module, inside in _graphs(module):
        graph = graph_module.graph
        candidates = [node for node in graph.nodes if is_candidate(node)]
        if not candidates:
            continue
        thread_writes(graph)
        meanings = Indices(graph)
        changed = False
        for softmax in candidates:
            record = _one(softmax, meanings, inside)
            records.append(record)
            changed = changed or record.rewritten
        if changed:
            graph.lint()
            graph_module.recompile()
    return records


def _graphs(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, str | None]]:
    """A module's graph and its regions'; with the op that holds it, where it must not be touched."""
    yield module, None
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        for x in node.all_input_nodes:
            if x.op != "get_attr":
                continue
            held = _attribute(module, str(x.target))
            if isinstance(held, fx.GraphModule):
                for inner, inside in _graphs(held):
                    yield inner, inside or (None if name in _HOLDERS else name)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _one(softmax: fx.Node, meanings: Indices, inside: str | None) -> Record:
    record = Record(location_of(softmax))
    try:
        if inside is not None:
            raise NoMatch(f"it is inside {inside}")
        site = find(softmax)
        record.describe(site)
        masking = masking_of(site, meanings)
        record.mask = masking.words
        _check_between(site)
        replacement = _emit(site, masking)
    except NoMatch as error:
        record.reason = str(error)
        return record
    site.out.replace_all_uses_with(replacement)
    erase_unused(list(reversed(site.nodes)))
    record.rewritten = True
    return record


def _check_between(site: Site) -> None:
    """Raise where what lies between the first and the last node of a site makes a difference to moving the
    first behind the last."""
    first, last, own = site.nodes[0], site.nodes[-1], set(site.nodes)
    inputs = {storage_of(node) for node in _inputs(site)}
    between, nesting = False, 0
    for node in site.softmax.graph.nodes:
        name = getattr(node.target, "__name__", "")
        nesting += (name in _TRANSFORMS) - (name in _TRANSFORMS_END)
        if node is first:
            between = True
            if nesting:
                raise NoMatch("it is inside a functorch transform")
        if node is last:
            return
        if not between:
            continue
        if name in (*_MODES, *_TRANSFORMS, *_TRANSFORMS_END):
            raise NoMatch(f"{name} is between its products")
        if node not in own and any(storage_of(x) in inputs for x in writes_of(node)):
            raise NoMatch("one of its inputs is written into before its end")


def _inputs(site: Site) -> Iterator[fx.Node]:
    for node in site.nodes:
        yield from (
            x for x in node.all_input_nodes if isinstance(value_of(x), Tensor) and x not in site.nodes
        )


def _emit(site: Site, masking: Masking) -> fx.Node:
    """The nodes that stand for the site, before its last; the last of them."""
    write = Emitter(site)
    out_dtype, score_dtype = value_of(site.out).dtype, value_of(site.nodes[0]).dtype
    q, k, v = site.q, site.k, site.v
    # A cast to more digits before the product is what the kernels do inside.
    q, k, v = ((_before_widening(node), layout) for node, layout in (q, k, v))
    k, v = _before_repeat(site, k, v)
    given = {value_of(x[0]).dtype for x in (q, k, v)}
    if given == {out_dtype} or score_dtype == out_dtype:
        dtype = out_dtype
    else:
        dtype = torch.promote_types(score_dtype, out_dtype)
    write.settle_heads(k[1])
    tensors = [
        write.cast(write.canonical(node, layout, (last,), own), dtype)
        for (node, layout), own, last in (
            (q, site.rows, site.inner),
            (k, site.keys, site.inner),
            (v, site.keys, site.width),
        )
    ]
    tensors[0] = write.scaled(tensors[0], dtype)
    tensors[1:] = write.grouped(tensors[1:])
    new = write.call(
        torch.ops.fastattn.rewritten_attention.default,
        *tensors,
        write.keep(masking),
        write.bias(masking),
        masking.left,
        masking.right,
        masking.bottom_right,
        site.scale,
        site.softcap,
        site.dropout,
        masking.empty,
        op.version(),
    )
    new = write.weighted(new)
    new = write.as_before(write.cast(new, out_dtype))
    found, wanted = value_of(new), value_of(site.out)
    if found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        raise NoMatch(
            f"it would give {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        )
    if not all(same(a, b) for a, b in zip(found.shape, wanted.shape, strict=True)):
        raise NoMatch(f"it would give {list(found.shape)}, not {list(wanted.shape)}")
    return new


def _before_widening(node: fx.Node) -> fx.Node:
    call = call_of(node)
    if call is None or call.name != "to" or call.in_place or not call.args:
        return node
    source = call.args[0]
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), Tensor):
        return node
    narrow, wide = value_of(source).dtype, value_of(node).dtype
    if narrow in (torch.bfloat16, torch.float16) and wide == torch.float32:
        return _before_widening(source)
    return node


Placed = tuple[fx.Node, Layout]


def _before_repeat(site: Site, k: Placed, v: Placed) -> tuple[Placed, Placed]:
    """The keys and values before each head of theirs was repeated for a group of queries' heads."""
    found = [_unrepeated(site, *x) for x in (k, v)]
    if found[0] is None or found[1] is None or found[0][2] != found[1][2]:
        return k, v
    return found[0][:2], found[1][:2]


def _unrepeated(site: Site, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, tuple[int, ...]] | None:
    """The node without its repetition, its layout, and the axes that are repeated over."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    source = call.args[0]
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
