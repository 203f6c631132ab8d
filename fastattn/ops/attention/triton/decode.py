"""Few queries against a cache: its keys are split over programs, and what these found is merged.

All queries that read one head of keys are the rows of one tile. Each split leaves its rows' softmax over its
own keys and their log-sum-exp; the merge weighs these by it.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.attention.library import new_heads_last
from fastattn.ops.attention.triton import launch
from fastattn.ops.attention.triton.arguments import (
    Pages,
    Place,
    as_arguments,
    band,
    rows,
    sinks,
    unit_last,
)
from fastattn.ops.attention.triton.tile import INF, LN2, LOG2E, biased, capped, from_float8, pair_of, seen

# Keys that a split has at least, so that merging costs less than it brings.
_LEAST: Final = 256
_MOST_SPLITS: Final = 128
# Of the parts that a merging program holds at a time.
_ELEMENTS: Final = 4096


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *problem: Any,
) -> tuple[Tensor, Tensor]:
    """Few queries against a cache, split over its keys; arguments as in `cpu.decode`."""
    batch, heads, q_length, _ = q.shape
    kv_heads, page_size, v_dim = k.shape[1], k.shape[2], v.shape[3]
    k_length = page_size * (1 if block_table is None else block_table.shape[1])
    out = new_heads_last(q, batch, heads, q_length, v_dim)
    lse = q.new_empty((batch, heads, q_length), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    options, bounds = as_arguments(problem), band(q_length, k_length, problem)
    config = launch.config("decode", q, v, options, bounds != (None, None))
    queries = max(16, gpu.power_of_two(heads // kv_heads * q_length))
    config = config._replace(block_q=queries)
    most = min(_MOST_SPLITS, gpu.cdiv(k_length, _LEAST))
    # Not of the batch, so that a sequence's result does not depend on what else is in it.
    splits = launch.parts(q.device, kv_heads, max(most, 1))
    partial = torch.empty((splits, batch, heads, q_length, v_dim), dtype=torch.float32, device=q.device)
    partial_lse = partial.new_empty((splits, batch, heads, q_length))
    with gpu.on(q.device):
        _decode[(batch * kv_heads, splits)](
            rows(q),
            rows(_stored(k)),
            rows(_stored(v)),
            _pages(block_table, page_size),
            k_scale,
            v_scale,
            partial,
            partial_lse,
            options,
            heads,
            heads // kv_heads,
            q_length,
            k_length,
            *bounds,
            problem[15],
            launch.shape(q, v, config, options, problem[15], False),
            FLOAT8=k.dtype == torch.float8_e4m3fn,
            **launch.options(config),
        )
        _merge[(batch * heads, q_length)](
            partial,
            partial_lse,
            rows(out),
            lse,
            sinks(problem[6]),
            heads,
            q_length,
            splits,
            V_DIM=v_dim,
            V_WIDTH=launch.width(v_dim),
            SPLITS=gpu.power_of_two(splits),
            SOME=min(gpu.power_of_two(splits), _ELEMENTS // launch.width(v_dim)),
            num_warps=4,
        )
    return out, lse


def _stored(x: Tensor) -> Tensor:
    """float8 as bytes: not every chip has it, and the interpreter does not."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _pages(table: Tensor | None, page_size: int) -> Pages:
    if table is None:
        return Pages(None, None, page_size)
    table = table.contiguous()
    return Pages(table, table.shape[1], page_size)


@triton.jit(do_not_specialize=["heads", "group", "q_length", "k_length", "first", "end"])
def _decode(
    q,
    k,
    v,
    pages,
    k_scale,
    v_scale,
    partial,
    partial_lse,
    problem,
    heads,
    group,
    q_length,
    k_length,
    first,
    end,
    scale,
    shape,
    FLOAT8: tl.constexpr,
):
    kv_heads = heads // group
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    row = tl.arange(0, shape.queries)[:, None]
    there = row < group * q_length
    head = kv_head * group + row // q_length
    i = tl.where(there, row % q_length, q_length)
    if k_scale is not None:
        scale *= tl.load(k_scale + tl.program_id(0))
    place = Place(batch, head, q_length, k_length, first, end, scale)

    column = tl.arange(0, shape.width)[None, :]
    q_ = tl.load(
        q.data + batch.to(tl.int64) * q.batch + head.to(tl.int64) * q.head + i.to(tl.int64) * q.row + column,
        mask=there & (column < shape.dim),
        other=0.0,
    )
    acc = tl.zeros([shape.queries, shape.v_width], tl.float32)
    total = tl.zeros([shape.queries], tl.float32)
    peak = tl.full([shape.queries], -INF, tl.float32)
    start, stop = _share(problem, place, i, shape.keys)
    for n in range(start, stop, shape.keys):
        j = n + tl.arange(0, shape.keys)
        keep = seen(problem, place, i, j[None, :])
        # What lies where no query looks may be anything, its page too.
        read = (tl.max(keep.to(tl.int32), 0) != 0)[:, None]
        page, slot = _slot(pages, batch, j[:, None], read)
        k_ = _load(k, page, kv_head, slot, read, shape.dim, shape.width, q_.dtype, FLOAT8)
        s = tl.dot(q_, tl.trans(k_), input_precision=shape.precision)
        s = biased(problem, place, capped(problem, place, s, shape.exact), i, j[None, :])
        s = tl.where(keep, s, -INF)
        new = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new == -INF, 0.0, new)
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(peak - base)
        total = total * rescale + tl.sum(p, 1)
        v_ = _load(v, page, kv_head, slot, read, shape.v_dim, shape.v_width, q_.dtype, FLOAT8)
        acc = tl.dot(p.to(v_.dtype), v_, acc * rescale[:, None], input_precision=shape.precision)
        peak = new
    empty = total == 0.0
    acc /= tl.where(empty, 1.0, total)[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale + tl.program_id(0))
    where = ((tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * group) * q_length + row
    v_column = tl.arange(0, shape.v_width)[None, :]
    tl.store(partial + where * shape.v_dim + v_column, acc, mask=there & (v_column < shape.v_dim))
    log2_sum = tl.where(empty, -INF, peak + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(partial_lse + where, log2_sum[:, None], mask=there)


@triton.jit
def _share(problem, place, i, KEYS: tl.constexpr):
    """Of the keys that some query sees those of this split, a multiple of KEYS."""
    there = i < place.q_length
    none = place.k_length
    start = tl.where(there, 0, none)
    stop = tl.where(there, none, 0)
    if place.first is not None:
        start = tl.maximum(start, i + place.first)
    if place.end is not None:
        stop = tl.minimum(stop, i + place.end)
    if problem.ranges is not None:
        lowest = tl.where(there, none, none)
        highest = tl.where(there, 0, 0)
        for pair in tl.static_range(problem.pairs):
            begin, behind = pair_of(problem, place, pair, i)
            sees = begin < behind
            lowest = tl.where(sees, tl.minimum(lowest, begin), lowest)
            highest = tl.where(sees, tl.maximum(highest, behind), highest)
        start = tl.maximum(start, lowest)
        stop = tl.minimum(stop, highest)
    sees = there & (start < stop)
    start_ = tl.min(tl.min(tl.where(sees, start, none), 1), 0) // KEYS * KEYS
    stop_ = tl.max(tl.max(tl.where(sees, stop, 0), 1), 0)
    each = tl.cdiv(tl.cdiv(tl.maximum(stop_ - start_, 0), tl.num_programs(1)), KEYS) * KEYS
    start_ += tl.program_id(1) * each
    return start_, tl.minimum(start_ + each, stop_)


@triton.jit
def _slot(pages, batch, j, read):
    """The page that key j lies in, and where in it."""
    if pages.table is None:
        page = batch + j * 0
        slot = j
    else:
        page = tl.load(pages.table + batch * pages.columns + j // pages.size, mask=read, other=0)
        slot = j % pages.size
    return page, slot


@triton.jit
def _load(
    x,
    page,
    kv_head,
    slot,
    read,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """``[keys, WIDTH]`` of the cache in `dtype`; 0 where not `read` and beyond DIM."""
    column = tl.arange(0, WIDTH)[None, :]
    data = x.data + page.to(tl.int64) * x.batch + kv_head.to(tl.int64) * x.head + slot.to(tl.int64) * x.row
    x_ = tl.load(data + column, mask=read & (column < DIM), other=0)
    if FLOAT8:
        x_ = from_float8(x_, tl.float32)
    elif x_.dtype == tl.int8:
        x_ = x_.to(tl.float32)  # the interpreter takes an integer's bits to be a bfloat16's
    return x_.to(dtype)


@triton.jit(do_not_specialize=["heads", "q_length", "splits"])
def _merge(
    partial,
    partial_lse,
    out,
    lse,
    sinks,
    heads,
    q_length,
    splits,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SOME: tl.constexpr,
):
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    i = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * q_length + i
    of_split = tl.num_programs(0).to(tl.int64) * q_length
    every = tl.arange(0, SPLITS)
    found = tl.load(partial_lse + every * of_split + row, mask=every < splits, other=-INF)
    peak = tl.max(found, 0)
    if sinks.data is not None:
        sink = tl.load(sinks.data + batch * sinks.batch + head * sinks.head) * LOG2E
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == -INF, 0.0, peak)
    total = tl.sum(tl.exp2(found - base), 0)
    if sinks.data is not None:
        total += tl.exp2(sink - base)
    empty = total == 0.0
    column = tl.arange(0, V_WIDTH)
    sum_ = tl.zeros([V_WIDTH], tl.float32)
    for at in range(0, splits, SOME):
        split = at + tl.arange(0, SOME)
        weight = tl.exp2(
            tl.load(partial_lse + split * of_split + row, mask=split < splits, other=-INF) - base
        )
        where = partial + (split * of_split + row)[:, None] * V_DIM + column[None, :]
        there = (split < splits)[:, None] & (column < V_DIM)[None, :]
        sum_ += tl.sum(tl.load(where, mask=there, other=0.0) * weight[:, None], 0)
    sum_ /= tl.where(empty, 1.0, total)
    to = out.data + batch.to(tl.int64) * out.batch + head.to(tl.int64) * out.head + i.to(tl.int64) * out.row
    tl.store(to + column, sum_.to(out.data.dtype.element_ty), mask=column < V_DIM)
    tl.store(lse + row, tl.where(empty, -INF, (base + tl.log2(tl.where(empty, 1.0, total))) * LN2))
