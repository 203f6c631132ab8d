"""The pass: finds naive attention in a graph before autograd is traced, and puts one op in its place.

It works on the graph that dynamo hands to a backend, forward only, where the replacement brings its own
gradient; after the joint graph is made the decision to keep the L×L matrix has been taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from fastattn.compiler import op
from fastattn.compiler.axes import NoMatch
from fastattn.compiler.emit import Emitter
from fastattn.compiler.graph import (
    call_of,
    erase_unused,
    location_of,
    result_of,
    same_shape,
    storage_of,
    thread_writes,
    value_of,
    writes_of,
)
from fastattn.compiler.indices import Indices, Outer
from fastattn.compiler.inputs import before_repeat, before_widening
from fastattn.compiler.masks import Masking, masking_of, plain_mode
from fastattn.compiler.patterns import find, is_candidate
from fastattn.compiler.report import Record
from fastattn.compiler.site import Site
from fastattn.compiler.strides import as_it_lay
from fastattn.compiler.torch_calls import MultiHead, is_torch_call, site_of
from fastattn.ops.attention import explain

MAX_HEAD_DIM: Final = 512
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
    graphs = [x.graph for x in module.modules() if isinstance(x, fx.GraphModule)]
    if not any(_may_attend(node) for graph in graphs for node in graph.nodes):
        return []
    return [record for region in _regions(module) for record in _in_region(region)]


def _may_attend(node: fx.Node) -> bool:
    call = call_of(node)
    return (call is not None and call.name == "softmax") or is_torch_call(node)


@dataclass
class _Region:
    """A graph, and what is known of it before it is looked at.

    Attributes:
        module: whose graph it is.
        meanings: of its nodes.
        held_by: the higher-order op that holds it, where it must not be touched.
    """

    module: fx.GraphModule
    meanings: Indices
    held_by: str | None = None


def _in_region(region: _Region) -> list[Record]:
    graph = region.module.graph
    candidates = [node for node in graph.nodes if is_candidate(node) or is_torch_call(node)]
    records = [_one(node, region.meanings, region.held_by) for node in candidates]
    if any(record.rewritten for record in records):
        graph.lint()
        region.module.recompile()
    return records


def _regions(module: fx.GraphModule) -> list[_Region]:
    """A module's graph and those that higher-order ops in it hold, each with what its inputs are outside."""
    thread_writes(module.graph)
    found = [_Region(module, Indices(module.graph))]
    for region in found:
        held = [
            (node, x)
            for node in region.module.graph.nodes
            for x in node.all_input_nodes
            if x.op == "get_attr"
        ]
        for node, x in held:
            inner = _attribute(region.module, str(x.target))
            if not isinstance(inner, fx.GraphModule):
                continue
            name = getattr(node.target, "__name__", str(node.target))
            thread_writes(inner.graph)
            outer: Outer = {}
            inputs = inner.graph.find_nodes(op="placeholder")
            given = [a for a in node.args[1:] if isinstance(a, fx.Node)]
            # What is called in several places may be given something else in each.
            if name in _HOLDERS and len(given) == len(inputs) and len(x.users) == 1:
                outer = {a: (region.meanings, b) for a, b in zip(inputs, given, strict=True)}
            held_by = region.held_by or (None if name in _HOLDERS else name)
            found.append(_Region(inner, Indices(inner.graph, outer), held_by))
    return found


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _one(node: fx.Node, meanings: Indices, held_by: str | None) -> Record:
    record = Record(location_of(node))
    heads: MultiHead | None = None
    try:
        if held_by is not None:
            raise NoMatch(f"it is inside {held_by}")
        if node.target is torch.nn.functional.multi_head_attention_forward:
            heads = MultiHead(node)
            site = heads.site()
        else:
            site = site_of(node) if is_torch_call(node) else find(node)
        record.describe(site)
        masking = masking_of(site, meanings)
        record.mask = masking.words
        _check_kernel(site)
        _check_between(site)
        new = _emit(site, masking, None if heads is None else value_of(site.q[0]).dtype)
    except Exception as error:  # the model runs as it was, whatever it holds that this does not foresee
        if heads is not None:
            erase_unused(heads.write.nodes[::-1])
        foreseen = isinstance(error, NoMatch)
        record.reason = str(error) if foreseen else f"unexpected {type(error).__name__}: {_first_line(error)}"
        return record
    if heads is not None:
        heads.close(new)
    else:
        site.out.replace_all_uses_with(new)
    erase_unused([*node.users, *reversed(site.nodes)])
    record.rewritten = True
    return record


def _check_kernel(site: Site) -> None:
    """Raise where no kernel computes this, and what would holds the whole matrix as the naive code does."""
    for axis in (site.inner, site.width):
        dim = site.axes.sizes[axis]
        if type(dim) is int and not 1 <= dim <= MAX_HEAD_DIM:
            raise NoMatch(f"expected a head_dim of 1 to {MAX_HEAD_DIM}, got {dim}")
    q = value_of(site.q[0])
    if q.device.type == "meta":
        return
    with plain_mode():
        tiny = torch.zeros((1, 1, 1, 8), dtype=result_of(site.out).dtype, device=q.device)
        found = explain(tiny, tiny, tiny)
    if found.backend == "reference":
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in found.reasons.items())
        raise NoMatch(f"no kernel for it: {why}")


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


def _emit(site: Site, masking: Masking, dtype: torch.dtype | None) -> fx.Node:
    """The nodes that stand for the site, before its last; the last of them. `dtype`: of those, if not its."""
    write = Emitter(site)
    try:
        new = _attend(write, masking, dtype or value_of(site.out).dtype)
        found, wanted = value_of(new), value_of(site.out)
        if dtype is not None:
            return new
        if found.dtype != wanted.dtype or not same_shape(found.shape, wanted.shape):
            expected = f"{wanted.dtype} {list(wanted.shape)}"
            raise NoMatch(f"it would give {found.dtype} {list(found.shape)}, not {expected}")
        new = as_it_lay(write, new, site.out)
    except Exception as error:
        # What was not foreseen leaves the site as it was, too.
        erase_unused(write.nodes[::-1])
        raise NoMatch(_first_line(error)) from None
    return new


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _attend(write: Emitter, masking: Masking, out_dtype: torch.dtype) -> fx.Node:
    """The nodes that compute a site's attention, in the layout and dtype that its last node has."""
    site = write.site
    score_dtype = out_dtype if len(site.nodes) == 1 else value_of(site.nodes[0]).dtype
    # A cast to more digits before the product is what the kernels do inside.
    q, k, v = ((before_widening(node), layout) for node, layout in (site.q, site.k, site.v))
    k, v = before_repeat(site, k, v)
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
    return write.as_before(write.cast(write.weighted(new), out_dtype))
