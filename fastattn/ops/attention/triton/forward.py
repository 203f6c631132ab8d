"""out and lse in one pass over the keys: the softmax is rescaled whenever a larger score turns up.

Source: Dao et al., "FlashAttention", NeurIPS 2022 (arXiv 2205.14135), algorithm 1, in the form of Dao,
"FlashAttention-2", ICLR 2024 (arXiv 2307.08691): one program for one tile of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.attention.library import new_heads_last
from fastattn.ops.attention.triton import launch
from fastattn.ops.attention.triton.arguments import Place, Scales, as_arguments, band, rows, sinks, unit_last
from fastattn.ops.attention.triton.tile import (
    INF,
    LN2,
    LOG2E,
    biased,
    capped,
    cleared,
    fetch_rows,
    fetch_values,
    from_float8,
    in_order,
    kept,
    load_rows,
    seen,
    store_rows,
)
from fastattn.ops.attention.triton.tiles import Tiles, list_tiles, need_list
from fastattn.ops.attention.triton.walk import nth_part, nth_whole, of_interest, through_keys


def forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    """`fastattn::attention_forward` by Triton's kernels."""
    return _attention(q, k, v, q.dtype, Scales(), problem)


def forward_float8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *problem: Any,
) -> tuple[Tensor, Tensor]:
    """`fastattn::attention_float8` by Triton's kernels."""
    scales = Scales(q_scale, k_scale, v_scale)
    if not launch.multiplies_float8(q.device, q.shape[3]):
        q, k, v = (x.view(torch.uint8) for x in (q, k, v))
    return _attention(q, k, v, torch.bfloat16, scales, problem)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, scales: Scales, problem: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    batch, heads, q_length, _ = q.shape
    k_length = k.shape[2]
    out = new_heads_last(q, batch, heads, q_length, v.shape[3], dtype)
    lse = q.new_empty((batch, heads, q_length), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    scale = problem[15]
    options, bounds = as_arguments(problem), band(q_length, k_length, problem)
    config = launch.config("forward", q, v, options, bounds != (None, None))
    tma = launch.by_tma(k, v)
    with gpu.on(q.device):
        tiles = Tiles()
        if need_list(options):
            sizes = (config.block_q, config.block_k)
            tiles = list_tiles(options, bounds, batch, heads, (q_length, k_length), sizes)
        _forward[(gpu.cdiv(q_length, config.block_q) * batch * heads,)](
            rows(q),
            launch.streamed(k, config.block_k, tma),
            launch.streamed(v, config.block_k, tma),
            rows(out),
            lse,
            options,
            tiles,
            sinks(problem[6]),
            scales,
            batch,
            heads,
            heads // k.shape[1],
            launch.together(k, v, heads),
            q_length,
            k_length,
            *bounds,
            scale,
            launch.shape(q, v, config, options, scale, tma),
            **launch.options(config),
        )
    return out, lse


@triton.jit(
    do_not_specialize=["batches", "heads", "group", "together", "q_length", "k_length", "first", "end"]
)
def _forward(
    q,
    k,
    v,
    out,
    lse,
    problem,
    tiles,
    sinks,
    scales,
    batches,
    heads,
    group,
    together,
    q_length,
    k_length,
    first,
    end,
    scale,
    shape,
):
    QUERIES: tl.constexpr = shape.queries
    tile, batch_head = in_order(
        tl.program_id(0), tl.cdiv(q_length, QUERIES), batches * heads, together, LAST_FIRST=True
    )
    batch = batch_head // heads
    head = batch_head % heads
    kv_row = batch * (heads // group) + head // group
    if scales.q is not None:
        scale *= tl.load(scales.q + batch_head)
    if scales.k is not None:
        scale *= tl.load(scales.k + kv_row)
    place = Place(batch, head, q_length, k_length, first, end, scale)
    at = tile * QUERIES
    i = at + tl.arange(0, QUERIES)
    q_ = load_rows(q, batch, head, at, q_length, QUERIES, shape.dim, shape.width)
    if shape.float8 == "bytes":
        q_ = from_float8(q_, tl.float16)

    acc = tl.zeros([QUERIES, shape.v_width], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], -INF, tl.float32)
    walk = through_keys(problem, place, tiles, heads, at, QUERIES, shape.keys)
    for t in range(walk.wholes):
        n = nth_whole(tiles, walk, t, shape.keys)
        acc, total, peak = _attend(
            acc, total, peak, q_, k, v, problem, place, walk, head // group, i, n, shape, MASKED=False
        )
    for t in range(walk.parts):
        n = nth_part(tiles, walk, t, shape.keys)
        acc, total, peak = _attend(
            acc, total, peak, q_, k, v, problem, place, walk, head // group, i, n, shape, MASKED=True
        )

    if sinks.data is not None:
        sink = tl.load(sinks.data + batch * sinks.batch + head * sinks.head) * LOG2E
        new = tl.maximum(peak, sink)
        base = tl.where(new == -INF, 0.0, new)
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.exp2(sink - base)
        acc *= rescale[:, None]
        peak = new
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc /= total[:, None]
    if problem.seed is not None:
        acc *= problem.factor
    if scales.v is not None:
        acc *= tl.load(scales.v + kv_row)
    store_rows(out, batch, head, at, q_length, acc, QUERIES, shape.v_dim, shape.v_width)
    lse_ = tl.where(empty, -INF, (peak + tl.log2(total)) * LN2)
    tl.store(lse + batch_head.to(tl.int64) * q_length + i, lse_, mask=i < q_length)


@triton.jit
def _attend(acc, total, peak, q_, k, v, problem, place, walk, kv_head, i, n, shape, MASKED: tl.constexpr):
    """One tile of keys more: the sums of exp(S - peak) v and of exp(S - peak), and the peak of S so far."""
    rows_ = i[:, None]
    j = (n + tl.arange(0, shape.keys))[None, :]
    k_ = fetch_rows(k, place.batch, kv_head, n, place.k_length, shape.keys, shape, MASKED)
    if shape.float8 == "bytes":
        k_ = from_float8(k_, tl.float16)
    s = tl.dot(q_, tl.trans(k_), input_precision=shape.precision)
    if shape.plain:
        factor = place.scale * LOG2E
    else:
        factor = 1.0
        s = biased(problem, place, capped(problem, place, s, shape.exact), rows_, j)
    if MASKED:
        s = tl.where(seen(problem, place, rows_, j), s, -INF)
    new = tl.maximum(peak, tl.max(s, 1) * factor)
    # A row that has seen nothing so far must not come to exp2(-inf + inf).
    base = tl.where(new == -INF, 0.0, new)
    p = tl.exp2(s * factor - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(p, 1)
    if problem.seed is not None:
        p = tl.where(kept(problem, place, i, n, shape.keys), p, 0.0)
    v_ = fetch_values(v, place.batch, kv_head, n, place.k_length, shape.keys, shape, MASKED)
    if shape.float8 == "bytes":
        v_ = from_float8(v_, tl.float16)
    elif shape.float8 == "native":
        v_ = v_.to(tl.float16)  # weighed in float8, it would lose three digits of four
    if MASKED:
        v_ = cleared(problem, v_, of_interest(walk, n, shape.keys))
    acc = tl.dot(p.to(v_.dtype), v_, acc * rescale[:, None], input_precision=shape.precision)
    return acc, total, new
