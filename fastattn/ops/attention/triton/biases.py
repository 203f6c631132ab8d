"""The gradients of biases: dS summed over what they broadcast over, in parts that are added in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.attention.triton import launch
from fastattn.ops.attention.triton.arguments import Place, Saved, rows
from fastattn.ops.attention.triton.tile import gradient_of_scores, kept, load_rows, padded_row


def bias_gradient(saved: Saved, dbias: Tensor) -> None:
    """dS into dbias, float32 ``[B or 1, H or 1, L_q or 1, L_k or 1]``."""
    q, k, v, dout, log2_sum, delta, options, bounds, scale = saved
    (batch, heads, q_length, _), k_length = q.shape, k.shape[2]
    config = launch.config("bias", q, v, options, bounds != (None, None))
    whole = (batch, heads, q_length, k_length)
    over = [size == 1 and full != 1 for size, full in zip(dbias.shape, whole, strict=True)]
    counts = (batch, heads, gpu.cdiv(q_length, config.block_q), gpu.cdiv(k_length, config.block_k))
    summed = [count if some else 1 for count, some in zip(counts, over, strict=True)]
    own = [1 if some else count for count, some in zip(counts, over, strict=True)]
    items = summed[0] * summed[1] * summed[2] * summed[3]
    splits = launch.parts(q.device, own[0] * own[1] * own[2] * own[3], items)
    partial = dbias if splits == 1 else dbias.new_empty((splits, *dbias.shape))
    _dbias[(own[0] * own[1] * own[2] * own[3], splits)](
        rows(q),
        rows(k),
        rows(v),
        rows(dout),
        log2_sum,
        delta,
        partial,
        options,
        heads,
        heads // k.shape[1],
        *own[1:],
        *summed,
        gpu.cdiv(items, splits),
        q_length,
        k_length,
        *bounds,
        scale,
        launch.shape(q, v, config, options, scale, False),
        OVER_QUERIES=over[2],
        OVER_KEYS=over[3],
        **launch.options(config),
    )
    if splits > 1:
        torch.sum(partial, 0, out=dbias)


_UNSPECIALIZED = [
    "heads",
    "group",
    "own_heads",
    "own_queries",
    "own_keys",
    "size",
    "batches_each",
    "heads_each",
    "queries_each",
    "keys_each",
    "items",
    "q_length",
    "k_length",
    "first",
    "end",
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _dbias(
    q,
    k,
    v,
    dout,
    log2_sum,
    delta,
    dbias,
    problem,
    heads,
    group,
    own_heads,
    own_queries,
    own_keys,
    batches_each,
    heads_each,
    queries_each,
    keys_each,
    items,
    q_length,
    k_length,
    first,
    end,
    scale,
    shape,
    OVER_QUERIES: tl.constexpr,
    OVER_KEYS: tl.constexpr,
):
    """A tile of dbias: of what it sums over there are `..._each` tiles, of which a split adds `items`."""
    own_n = tl.program_id(0) % own_keys
    own_m = tl.program_id(0) // own_keys % own_queries
    row_of_own = tl.program_id(0) // own_keys // own_queries
    own_batch = row_of_own // own_heads
    own_head = row_of_own % own_heads
    split = tl.program_id(1)
    acc = tl.zeros([shape.queries, shape.keys], tl.float32)
    start = split * items
    stop = tl.minimum(start + items, batches_each * heads_each * queries_each * keys_each)
    for item in range(start, stop):
        n = (own_n + item % keys_each) * shape.keys
        rest = item // keys_each
        m = (own_m + rest % queries_each) * shape.queries
        rest = rest // queries_each
        place = Place(
            own_batch + rest // heads_each,
            own_head + rest % heads_each,
            q_length,
            k_length,
            first,
            end,
            scale,
        )
        if _in_band(place, m, n, shape):
            acc += _ds(
                q, k, v, dout, log2_sum, delta, problem, place, heads, group, m, n, shape, ALIGNED=True
            )
    row = own_m * shape.queries + tl.arange(0, shape.queries)
    column = own_n * shape.keys + tl.arange(0, shape.keys)
    here = split.to(tl.int64) * (tl.num_programs(0) // (own_queries * own_keys)) + row_of_own
    if OVER_QUERIES and OVER_KEYS:
        tl.store(dbias + here, tl.sum(tl.sum(acc, 1), 0))
    elif OVER_QUERIES:
        tl.store(dbias + here * k_length + column, tl.sum(acc, 0), mask=column < k_length)
    elif OVER_KEYS:
        tl.store(dbias + here * q_length + row, tl.sum(acc, 1), mask=row < q_length)
    else:
        there = (row < q_length)[:, None] & (column < k_length)[None, :]
        where = (here * q_length + row)[:, None] * k_length + column[None, :]
        tl.store(dbias + where, acc, mask=there)


@triton.jit
def _in_band(place, m, n, shape):
    """Whether some query of the tile from m sees some key of the one from n, as far as the band goes."""
    sees = n < place.k_length
    if place.first is not None:
        sees &= n + shape.keys > m + place.first
    if place.end is not None:
        sees &= n < m + shape.queries - 1 + place.end
    return sees


@triton.jit
def _ds(q, k, v, dout, log2_sum, delta, problem, place, heads, group, m, n, shape, ALIGNED: tl.constexpr):
    """dS of a tile of queries from m and of keys from n, which may lie before the first."""
    i = m + tl.arange(0, shape.queries)
    j = n + tl.arange(0, shape.keys)
    batch, head, kv_head = place.batch, place.head, place.head // group
    row = padded_row(heads, batch, head, place.q_length) + i
    q_ = load_rows(q, batch, head, m, place.q_length, shape.queries, shape.dim, shape.width)
    dout_ = load_rows(dout, batch, head, m, place.q_length, shape.queries, shape.v_dim, shape.v_width)
    k_ = load_rows(k, batch, kv_head, n, place.k_length, shape.keys, shape.dim, shape.width)
    v_ = load_rows(v, batch, kv_head, n, place.k_length, shape.keys, shape.v_dim, shape.v_width)
    log2_sum_ = tl.load(log2_sum + row)[:, None]
    delta_ = tl.load(delta + row)[:, None]
    qk = tl.dot(q_, tl.trans(k_), input_precision=shape.precision)
    dp = tl.dot(dout_, tl.trans(v_), input_precision=shape.precision)
    keep = None
    if problem.seed is not None:
        keep = kept(problem, place, i, n, shape.keys, ALIGNED)
    _, ds, _ = gradient_of_scores(
        problem,
        place,
        qk,
        dp,
        log2_sum_,
        delta_,
        keep,
        i[:, None],
        j[None, :],
        shape.exact,
        MASKED=True,
    )
    return ds


def relative_gradient(saved: Saved, drelative: Tensor) -> None:
    """dS summed along its diagonals into drelative, float32 ``[B or 1, H or 1, R]``."""
    q, k, v, dout, log2_sum, delta, options, bounds, scale = saved
    (batch, heads, q_length, _), k_length = q.shape, k.shape[2]
    config = launch.config("relative", q, v, options, bounds != (None, None))
    keys = gpu.power_of_two(config.block_q + config.block_k - 1)
    own_batches, own_heads, size = drelative.shape
    of_queries = gpu.cdiv(q_length, config.block_q)
    summed = (batch // own_batches, heads // own_heads, of_queries)
    items = summed[0] * summed[1] * summed[2]
    tiles = gpu.cdiv(size, config.block_k)
    splits = launch.parts(q.device, tiles * own_batches * own_heads, items)
    partial = drelative if splits == 1 else drelative.new_empty((splits, *drelative.shape))
    _drelative[(own_batches * own_heads * tiles, splits)](
        rows(q),
        rows(k),
        rows(v),
        rows(dout),
        log2_sum,
        delta,
        partial,
        options,
        heads,
        heads // k.shape[1],
        own_heads,
        size,
        *summed,
        gpu.cdiv(items, splits),
        q_length,
        k_length,
        *bounds,
        scale,
        launch.shape(q, v, config._replace(block_k=keys), options, scale, False),
        DISTANCES=config.block_k,
        **launch.options(config),
    )
    if splits > 1:
        torch.sum(partial, 0, out=drelative)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _drelative(
    q,
    k,
    v,
    dout,
    log2_sum,
    delta,
    drelative,
    problem,
    heads,
    group,
    own_heads,
    size,
    batches_each,
    heads_each,
    queries_each,
    items,
    q_length,
    k_length,
    first,
    end,
    scale,
    shape,
    DISTANCES: tl.constexpr,
):
    """DISTANCES entries of drelative; of query i these are keys from i + a number: a skewed tile of dS."""
    tiles = tl.cdiv(size, DISTANCES)
    at = tl.program_id(0) % tiles * DISTANCES
    row_of_own = tl.program_id(0) // tiles
    own_batch = row_of_own // own_heads
    own_head = row_of_own % own_heads
    split = tl.program_id(1)
    acc = tl.zeros([DISTANCES], tl.float32)
    start = split * items
    stop = tl.minimum(start + items, batches_each * heads_each * queries_each)
    for item in range(start, stop):
        m = item % queries_each * shape.queries
        rest = item // queries_each
        place = Place(
            own_batch + rest // heads_each,
            own_head + rest % heads_each,
            q_length,
            k_length,
            first,
            end,
            scale,
        )
        if problem.origin is None:
            n = m + at - q_length
            if (n + shape.keys > 0) & _in_band(place, m, n, shape):
                ds = _ds(
                    q, k, v, dout, log2_sum, delta, problem, place, heads, group, m, n, shape, ALIGNED=False
                )
                acc += _along_diagonals(ds, DISTANCES)
        else:
            # That number is one for all queries of a document; a tile may hold several documents.
            i = m + tl.arange(0, shape.queries)
            there = i < q_length
            origin = problem.origin + place.batch * problem.origin_batch + i
            none = q_length + k_length + 1
            shift = tl.where(there, tl.load(origin, mask=there, other=0) - i, none)
            of_document = tl.min(shift, 0)
            while of_document < none:
                n = m + of_document + at - q_length - k_length
                if (n < k_length) & (n + shape.keys > 0):
                    ds = _ds(
                        q,
                        k,
                        v,
                        dout,
                        log2_sum,
                        delta,
                        problem,
                        place,
                        heads,
                        group,
                        m,
                        n,
                        shape,
                        ALIGNED=False,
                    )
                    acc += _along_diagonals(tl.where((shift == of_document)[:, None], ds, 0.0), DISTANCES)
                of_document = tl.min(tl.where(shift > of_document, shift, none), 0)
    distance = at + tl.arange(0, DISTANCES)
    here = split.to(tl.int64) * (tl.num_programs(0) // tiles) + row_of_own
    tl.store(drelative + here * size + distance, acc, mask=distance < size)


@triton.jit
def _along_diagonals(ds, DISTANCES: tl.constexpr):
    """sum over a of ds[a, a + c] for each c below DISTANCES."""
    skewed = tl.arange(0, ds.shape[0])[:, None] + tl.arange(0, DISTANCES)[None, :]
    return tl.sum(tl.gather(ds, skewed, 1), 0)
