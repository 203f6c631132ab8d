"""Attention that is a call of torch's: `F.scaled_dot_product_attention`, and
`F.multi_head_attention_forward`, which dynamo leaves whole in graphs of `nn.MultiheadAttention` and
`nn.TransformerEncoderLayer`."""

from __future__ import annotations

import inspect
import math
from typing import Any, Final

import torch
from torch import fx

from fastattn.compiler.axes import Axes, Layout, NoMatch
from fastattn.compiler.graph import Writer, call_of, same, shape_of, value_of
from fastattn.compiler.site import Site, Term, fixed_probability

_MHA: Final = torch.nn.functional.multi_head_attention_forward
_MHA_ARGUMENTS: Final = inspect.signature(_MHA)


def is_torch_call(node: fx.Node) -> bool:
    """Whether a node is one of torch's own attentions."""
    if node.op != "call_function":
        return False
    if node.target is _MHA:
        return True
    call = call_of(node)
    return call is not None and call.name == "scaled_dot_product_attention"


def site_of(node: fx.Node) -> Site:
    """The attention that a call of `scaled_dot_product_attention` computes.

    Raises:
        NoMatch: why it can't be replaced.
    """
    call = call_of(node)
    assert call is not None
    q, k, v, mask, dropout, causal, scale, grouped = call.args
    if any(value_of(x).is_nested for x in (q, k, v)):
        raise NoMatch("nested tensors")
    axes = Axes()
    ranks = {value_of(x).dim() for x in (q, k, v)}
    if len(ranks) != 1 or min(ranks) < 3:
        raise NoMatch("expected queries, keys and values of as many dimensions, 3 or more")
    lead = [
        axes.new(max((shape_of(x)[d] for x in (q, k, v)), key=lambda n: not same(n, 1)))
        for d in range(ranks.pop() - 2)
    ]
    rows, keys = axes.new(shape_of(q)[-2]), axes.new(shape_of(k)[-2])
    inner, width = axes.new(shape_of(q)[-1]), axes.new(shape_of(v)[-1])

    def layout(x: fx.Node, *last: int) -> Layout:
        found: list[tuple[int, ...]] = []
        for n, axis in zip(shape_of(x), lead, strict=False):
            heads = grouped and axis == lead[-1] and len(lead) > 1
            if not heads and same(n, 1) and not same(axes.sizes[axis], 1):
                found.append(())
            elif heads or same(n, axes.sizes[axis]):
                found.append((axis,))
            else:
                raise NoMatch("sizes that are not known to fit")
        return (*found, *((axis,) for axis in last))

    site = _site(
        node, axes, (q, layout(q, rows, inner)), (k, layout(k, keys, inner)), (v, layout(v, keys, width))
    )
    site.rows, site.keys, site.inner, site.width = rows, keys, inner, width
    site.batch, site.layout = tuple(lead), tuple((axis,) for axis in (*lead, rows, width))
    site.causal, site.dropout = bool(causal), fixed_probability(dropout)
    _set_scale(site, scale)
    if mask is not None:
        _mask(site, mask, tuple((axis,) for axis in (*lead, rows, keys)), hides=False)
    return site


Placed = tuple[fx.Node, Layout]


def _site(node: fx.Node, axes: Axes, q: Placed, k: Placed, v: Placed) -> Site:
    return Site(node, [node], node, axes, q, k, v, layout=(), inner=-1, width=-1)


def _set_scale(site: Site, scale: Any) -> None:
    if scale is None:
        dim = site.axes.sizes[site.inner]
        if type(dim) is not int:
            raise NoMatch("a head_dim that is not fixed")
        site.scale = 1 / math.sqrt(dim)
    elif isinstance(scale, fx.Node):
        site.symbols.append((scale, False))
    else:
        site.scale = float(scale)
    if not site.scale > 0:
        raise NoMatch(f"a scale of {site.scale}")


def _mask(site: Site, mask: fx.Node, layout: Layout, *, hides: bool) -> None:
    if value_of(mask).dtype == torch.bool:
        site.fills.append(Term(mask, layout, -math.inf, keeps=not hides))
    elif value_of(mask).is_floating_point():
        site.added.append(Term(mask, layout))
    else:
        raise NoMatch(f"a mask of {value_of(mask).dtype}")


class MultiHead:
    """One call of `F.multi_head_attention_forward`: its projections, and the attention between them.

    Raises:
        NoMatch: why it can't be replaced.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        bound = _MHA_ARGUMENTS.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        self.given = given = bound.arguments
        for user in node.users:
            call = call_of(user)
            if call is None or call.name != "getitem" or (call.args[1] != 0 and user.users):
                raise NoMatch("the weights are asked for")
        for name in ("bias_k", "bias_v", "static_k", "static_v"):
            if given[name] is not None:
                raise NoMatch(f"{name} is given")
        if given["add_zero_attn"]:
            raise NoMatch("add_zero_attn is given")
        if value_of(given["query"]).dim() != 3 or type(given["training"]) is not bool:
            raise NoMatch("expected a batch of queries, and training or not")
        self.write = Writer(node)

    def site(self) -> Site:
        """The attention between the projections, which are written into the graph."""
        given, axes = self.given, Axes()
        heads = given["num_heads"]
        q, k, v = (
            self.write.call(torch.unflatten, x, -1, [heads, given["embed_dim_to_check"] // heads])
            for x in self._projected()
        )
        rows, keys, batch = (axes.new(n) for n in (shape_of(q)[0], shape_of(k)[0], shape_of(q)[1]))
        head, inner, width = (axes.new(n) for n in (heads, shape_of(q)[3], shape_of(v)[3]))

        def layout(length: int, last: int) -> Layout:
            return ((length,), (batch,), (head,), (last,))

        site = _site(
            self.node, axes, (q, layout(rows, inner)), (k, layout(keys, inner)), (v, layout(keys, width))
        )
        site.rows, site.keys, site.inner, site.width = rows, keys, inner, width
        site.batch, site.layout = (batch, head), layout(rows, width)
        site.dropout = fixed_probability(given["dropout_p"]) if given["training"] else 0.0
        _set_scale(site, None)
        padding, mask = given["key_padding_mask"], given["attn_mask"]
        # As torch does, which takes the mask to be what is_causal says.
        site.causal = bool(given["is_causal"]) and padding is None and not given["need_weights"]
        if mask is not None and not site.causal:
            merged = ((batch, head),) if value_of(mask).dim() == 3 else ()
            _mask(site, mask, (*merged, (rows,), (keys,)), hides=True)
        if padding is not None:
            _mask(site, padding, ((batch,), (keys,)), hides=True)
        return site

    def _projected(self) -> list[fx.Node]:
        given, call = self.given, self.write.call
        inputs = [given["query"], given["key"], given["value"]]
        bias, width = given["in_proj_bias"], given["embed_dim_to_check"]

        def part(x: fx.Node | None, first: int, count: int, dim: int = 0) -> fx.Node | None:
            return None if x is None else call(torch.narrow, x, dim, first * width, count * width)

        if given["use_separate_proj_weight"]:
            own = [given[f"{name}_proj_weight"] for name in "qkv"]
            return [
                call(torch.nn.functional.linear, x, w, part(bias, i, 1))
                for i, (x, w) in enumerate(zip(inputs, own, strict=True))
            ]
        weight = given["in_proj_weight"]
        if inputs[0] is inputs[1] is inputs[2]:
            whole = call(torch.nn.functional.linear, inputs[0], weight, bias)
            return [call(torch.narrow, whole, 2, i * width, width) for i in range(3)]
        q = call(torch.nn.functional.linear, inputs[0], part(weight, 0, 1), part(bias, 0, 1))
        if inputs[1] is inputs[2]:
            both = call(torch.nn.functional.linear, inputs[1], part(weight, 1, 2), part(bias, 1, 2))
            return [q, *(call(torch.narrow, both, 2, i * width, width) for i in range(2))]
        return [
            q,
            *(
                call(torch.nn.functional.linear, inputs[i], part(weight, i, 1), part(bias, i, 1))
                for i in (1, 2)
            ),
        ]

    def close(self, out: fx.Node) -> None:
        """Let who used the call's result use the projection of ``out [L, B, H, D]``."""
        given = self.given
        merged = self.write.call(torch.flatten, out, 2, 3)
        found = self.write.call(
            torch.nn.functional.linear, merged, given["out_proj_weight"], given["out_proj_bias"]
        )
        for user in list(self.node.users):
            user.replace_all_uses_with(found)
