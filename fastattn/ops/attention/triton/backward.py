"""The gradients of q, k and v, each tile of them by one program: no sum depends on which program comes first.

With P = exp(S - lse), dP = dout vᵀ and delta = rowsum(dout · out) - dlse:
dS = P (dP - delta), dv = Pᵀ dout, dk = scale dSᵀ q, dq = scale dS k. One kernel goes over queries for dk and
dv, one over keys for dq, which costs two products more than one kernel of both, and needs no atomic sums.

Source: Dao, "FlashAttention-2", ICLR 2024 (arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.attention.library import WANTED_QKV, new_gradients
from fastattn.ops.attention.triton import launch
from fastattn.ops.attention.triton.arguments import Place, Saved, as_arguments, band, rows, unit_last
from fastattn.ops.attention.triton.biases import bias_gradient, relative_gradient
from fastattn.ops.attention.triton.tile import (
    INF,
    LOG2E,
    PADDING,
    cleared,
    fetch_rows,
    fetch_values,
    gradient_of_scores,
    in_order,
    kept,
    load_rows,
    padded_row,
    store_rows,
)
from fastattn.ops.attention.triton.tiles import Tiles, bound_tiles, list_tiles, need_list
from fastattn.ops.attention.triton.walk import nth_part, nth_whole, of_interest, through_keys, through_queries

# Elements of out that a program of the first kernel reads.
_ELEMENTS: Final = 8192


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *problem: Any,
) -> tuple[Tensor, ...]:
    """`fastattn::attention_backward` by Triton's kernels."""
    *given, wanted = problem
    dq, dk, dv, dbias, drelative, dsinks = grads = new_gradients(q, k, v, lse, given, wanted)
    batch, heads, q_length, _ = q.shape
    if lse.numel() == 0:
        return tuple(x.zero_() for x in grads)
    dout, q, k, v, out = (unit_last(x) for x in (dout, q, k, v, out))
    lse = lse.contiguous()
    padded = gpu.cdiv(q_length, PADDING.value) * PADDING.value
    some = min(PADDING.value, _ELEMENTS // launch.width(v.shape[3]))
    log2_sum, delta = lse.new_empty((2, batch, heads, padded)).unbind()
    bounds = band(q_length, k.shape[2], given)
    saved = Saved(q, k, v, dout, log2_sum, delta, as_arguments(given), bounds, given[15])
    with gpu.on(q.device):
        _rows[(padded // some * batch * heads,)](
            rows(out),
            rows(dout),
            lse,
            None if dlse is None else dlse.contiguous(),
            log2_sum,
            delta,
            heads,
            q_length,
            DIM=v.shape[3],
            WIDTH=launch.width(v.shape[3]),
            ROWS=some,
            num_warps=4,
        )
        if k.shape[2] == 0:
            for x in (dq, dk, dv, dbias, drelative):
                x.zero_()
        else:
            if wanted & WANTED_QKV:
                _keys_and_values(saved, dk, dv)
                _queries(saved, dq)
            if dbias.numel() > 0:
                bias_gradient(saved, dbias)
            if drelative.numel() > 0:
                relative_gradient(saved, drelative)
    if dsinks.numel() > 0:
        # A sink's dP is 0.
        share = torch.exp(given[6][:, :, None] - lse).masked_fill(lse == float("-inf"), 0.0)
        dsinks.copy_((-share * delta[:, :, :q_length]).sum(2).sum_to_size(dsinks.shape))
    return grads


def _keys_and_values(saved: Saved, dk: Tensor, dv: Tensor) -> None:
    q, k, v, dout, log2_sum, delta, options, bounds, scale = saved
    (batch, heads, q_length, _), (_, kv_heads, k_length, _) = q.shape, k.shape
    config = launch.config("dkdv", q, v, options, bounds != (None, None))
    tma = launch.by_tma(q, dout)
    tiles = Tiles()
    lengths, sizes = (q_length, k_length), (config.block_q, config.block_k)
    if need_list(options):
        tiles = list_tiles(options, bounds, batch, heads, lengths, sizes, of_keys=True)
    elif options.ranges is not None:
        tiles = bound_tiles(options, bounds, batch, lengths, sizes)
    _dk_dv[(gpu.cdiv(k_length, config.block_k) * batch * kv_heads,)](
        launch.streamed(q, config.block_q, tma),
        rows(k),
        rows(v),
        launch.streamed(dout, config.block_q, tma),
        log2_sum,
        delta,
        rows(dk),
        rows(dv),
        options,
        tiles,
        batch,
        heads,
        heads // kv_heads,
        launch.together(q, dout, kv_heads),
        q_length,
        k_length,
        *bounds,
        scale,
        launch.shape(q, v, config, options, scale, tma),
        GROUPED=heads != kv_heads,
        **launch.options(config),
    )


def _queries(saved: Saved, dq: Tensor) -> None:
    q, k, v, dout, log2_sum, delta, options, bounds, scale = saved
    (batch, heads, q_length, _), k_length = q.shape, k.shape[2]
    config = launch.config("dq", q, v, options, bounds != (None, None))
    tma = launch.by_tma(k, v)
    tiles = Tiles()
    if need_list(options):
        sizes = (config.block_q, config.block_k)
        tiles = list_tiles(options, bounds, batch, heads, (q_length, k_length), sizes)
    _dq[(gpu.cdiv(q_length, config.block_q) * batch * heads,)](
        rows(q),
        launch.streamed(k, config.block_k, tma),
        launch.streamed(v, config.block_k, tma),
        rows(dout),
        log2_sum,
        delta,
        rows(dq),
        options,
        tiles,
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


@triton.jit(do_not_specialize=["heads", "q_length"])
def _rows(
    out,
    dout,
    lse,
    dlse,
    log2_sum,
    delta,
    heads,
    q_length,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """lse in base 2 and delta, padded; +inf and 0 for a row with nothing to attend to, and in the padding."""
    tiles = tl.cdiv(q_length, PADDING) * (PADDING // ROWS)
    batch_head = tl.program_id(0) // tiles
    at = tl.program_id(0) % tiles * ROWS
    batch = batch_head // heads
    head = batch_head % heads
    i = at + tl.arange(0, ROWS)
    there = i < q_length
    where = batch_head.to(tl.int64) * q_length + i
    padded = padded_row(heads, batch, head, q_length) + i
    out_ = load_rows(out, batch, head, at, q_length, ROWS, DIM, WIDTH).to(tl.float32)
    dout_ = load_rows(dout, batch, head, at, q_length, ROWS, DIM, WIDTH).to(tl.float32)
    delta_ = tl.sum(out_ * dout_, 1)
    if dlse is not None:
        delta_ -= tl.load(dlse + where, mask=there, other=0.0)
    lse_ = tl.load(lse + where, mask=there, other=-INF)
    empty = lse_ == -INF
    tl.store(log2_sum + padded, tl.where(empty, INF, lse_ * LOG2E))
    tl.store(delta + padded, tl.where(empty, 0.0, delta_))


_UNSPECIALIZED = ["batches", "heads", "group", "together", "q_length", "k_length", "first", "end"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _dk_dv(
    q,
    k,
    v,
    dout,
    log2_sum,
    delta,
    dk,
    dv,
    problem,
    tiles,
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
    GROUPED: tl.constexpr,
):
    KEYS: tl.constexpr = shape.keys
    kv_heads = heads // group
    tile, batch_head = in_order(
        tl.program_id(0), tl.cdiv(k_length, KEYS), batches * kv_heads, together, LAST_FIRST=False
    )
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    at = tile * KEYS
    k_ = load_rows(k, batch, kv_head, at, k_length, KEYS, shape.dim, shape.width)
    v_ = load_rows(v, batch, kv_head, at, k_length, KEYS, shape.v_dim, shape.v_width)
    dk_ = tl.zeros([KEYS, shape.width], tl.float32)
    dv_ = tl.zeros([KEYS, shape.v_width], tl.float32)
    if GROUPED and tiles.by_head:
        for member in range(group):
            place = Place(batch, kv_head * group + member, q_length, k_length, first, end, scale)
            dk_, dv_ = _of_heads(
                dk_, dv_, k_, v_, q, dout, log2_sum, delta, problem, tiles, place, heads, 1, at, shape,
                SEVERAL=False,
            )  # fmt: skip
    else:
        place = Place(batch, kv_head * group, q_length, k_length, first, end, scale)
        dk_, dv_ = _of_heads(
            dk_, dv_, k_, v_, q, dout, log2_sum, delta, problem, tiles, place, heads, group, at, shape,
            SEVERAL=GROUPED,
        )  # fmt: skip
    if problem.seed is not None:
        dv_ *= problem.factor
    store_rows(dk, batch, kv_head, at, k_length, dk_ * scale, KEYS, shape.dim, shape.width)
    store_rows(dv, batch, kv_head, at, k_length, dv_, KEYS, shape.v_dim, shape.v_width)


@triton.jit
def _of_heads(
    dk, dv, k_, v_, q, dout, log2_sum, delta, problem, tiles, place, heads, count, at, shape,
    SEVERAL: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv with the share of `count` query heads that see the same; one if not SEVERAL.

    A loop over heads around those over queries would take registers that these need.
    """
    walk = through_queries(place, tiles, heads, at, shape.queries, shape.keys)
    wholes, parts = walk.wholes, walk.parts
    if SEVERAL:
        wholes, parts = count * wholes, count * parts
    for t in range(wholes):
        head, n = place.head, t
        if SEVERAL:
            head, n = place.head + t // walk.wholes, t % walk.wholes
        here = Place(place.batch, head, place.q_length, place.k_length, place.first, place.end, place.scale)
        m = nth_whole(tiles, walk, n, shape.queries)
        dk, dv = _of_queries(
            dk, dv, k_, v_, q, dout, log2_sum, delta, problem, here, heads, m, at, shape, MASKED=False
        )  # fmt: skip
    for t in range(parts):
        head, n = place.head, t
        if SEVERAL:
            head, n = place.head + t // walk.parts, t % walk.parts
        here = Place(place.batch, head, place.q_length, place.k_length, place.first, place.end, place.scale)
        m = nth_part(tiles, walk, n, shape.queries)
        dk, dv = _of_queries(
            dk, dv, k_, v_, q, dout, log2_sum, delta, problem, here, heads, m, at, shape, MASKED=True
        )  # fmt: skip
    return dk, dv


@triton.jit
def _of_queries(
    dk, dv, k_, v_, q, dout, log2_sum, delta, problem, place, heads, m, at, shape, MASKED: tl.constexpr
):  # fmt: skip
    """dk / scale and dv with the share of a tile of queries from m; scores lie as ``[keys, queries]``."""
    i = m + tl.arange(0, shape.queries)
    j = at + tl.arange(0, shape.keys)
    batch, head, length = place.batch, place.head, place.q_length
    q_ = fetch_rows(q, batch, head, m, length, shape.queries, shape)
    dout_ = fetch_values(dout, batch, head, m, length, shape.queries, shape)
    row = padded_row(heads, batch, head, length)
    log2_sum_ = tl.load(log2_sum + row + i)
    delta_ = tl.load(delta + row + i)
    if MASKED:
        q_ = cleared(problem, q_, log2_sum_ != INF)
        dout_ = cleared(problem, dout_, log2_sum_ != INF)
    qk = tl.dot(k_, tl.trans(q_), input_precision=shape.precision)
    dp = tl.dot(v_, tl.trans(dout_), input_precision=shape.precision)
    keep = None
    if problem.seed is not None:
        keep = tl.trans(kept(problem, place, i, at, shape.keys))
    p, _, dx = gradient_of_scores(
        problem,
        place,
        qk,
        dp,
        log2_sum_[None, :],
        delta_[None, :],
        keep,
        i[None, :],
        j[:, None],
        shape.exact,
        MASKED,
    )
    dv = tl.dot(p.to(dout_.dtype), dout_, dv, input_precision=shape.precision)
    dk = tl.dot(dx.to(q_.dtype), q_, dk, input_precision=shape.precision)
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _dq(
    q,
    k,
    v,
    dout,
    log2_sum,
    delta,
    dq,
    problem,
    tiles,
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
    place = Place(batch, head, q_length, k_length, first, end, scale)
    at = tile * QUERIES
    i = at + tl.arange(0, QUERIES)
    row = padded_row(heads, batch, head, q_length) + i
    q_ = load_rows(q, batch, head, at, q_length, QUERIES, shape.dim, shape.width)
    dout_ = load_rows(dout, batch, head, at, q_length, QUERIES, shape.v_dim, shape.v_width)
    log2_sum_ = tl.load(log2_sum + row)[:, None]
    delta_ = tl.load(delta + row)[:, None]
    dq_ = tl.zeros([QUERIES, shape.width], tl.float32)
    walk = through_keys(problem, place, tiles, heads, at, QUERIES, shape.keys)
    for t in range(walk.wholes):
        n = nth_whole(tiles, walk, t, shape.keys)
        dq_ = _of_keys(
            dq_,
            q_,
            dout_,
            log2_sum_,
            delta_,
            k,
            v,
            problem,
            place,
            walk,
            head // group,
            i,
            n,
            shape,
            MASKED=False,
        )
    for t in range(walk.parts):
        n = nth_part(tiles, walk, t, shape.keys)
        dq_ = _of_keys(
            dq_,
            q_,
            dout_,
            log2_sum_,
            delta_,
            k,
            v,
            problem,
            place,
            walk,
            head // group,
            i,
            n,
            shape,
            MASKED=True,
        )
    store_rows(dq, batch, head, at, q_length, dq_ * scale, QUERIES, shape.dim, shape.width)


@triton.jit
def _of_keys(
    dq, q_, dout_, log2_sum_, delta_, k, v, problem, place, walk, kv_head, i, n, shape, MASKED: tl.constexpr
):
    """dq / scale with the share of a tile of keys from n."""
    j = n + tl.arange(0, shape.keys)
    length = place.k_length
    k_ = fetch_rows(k, place.batch, kv_head, n, length, shape.keys, shape, MASKED)
    v_ = fetch_values(v, place.batch, kv_head, n, length, shape.keys, shape, MASKED)
    if MASKED:
        k_ = cleared(problem, k_, of_interest(walk, n, shape.keys))
    qk = tl.dot(q_, tl.trans(k_), input_precision=shape.precision)
    dp = tl.dot(dout_, tl.trans(v_), input_precision=shape.precision)
    keep = None
    if problem.seed is not None:
        keep = kept(problem, place, i, n, shape.keys)
    _, _, dx = gradient_of_scores(
        problem, place, qk, dp, log2_sum_, delta_, keep, i[:, None], j[None, :], shape.exact, MASKED
    )
    return tl.dot(dx.to(k_.dtype), k_, dq, input_precision=shape.precision)
