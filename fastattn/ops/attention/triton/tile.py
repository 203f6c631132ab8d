"""What the kernels share: tiles of q, k and v, of scores under softcap and biases, of masks, and of dropout.

Queries `i` and keys `j` are indices of shapes that broadcast, ``[queries, 1]`` and ``[1, keys]`` or the other
way round: nothing here depends on which way a tile lies. Scores are in base 2: a probability is one exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
# Rows of lse and delta are padded to a multiple of this, so that tiles of them are loaded whole and aligned.
PADDING = tl.constexpr(128)


@triton.jit
def in_order(pid, tiles, heads, together, LAST_FIRST: tl.constexpr):
    """Which tile of which head program `pid` computes.

    The tiles of `together` heads, whose keys and values fit the L2 cache, go before those of the next heads,
    the longest first: under a causal mask a head's last queries, or its first keys.
    """
    section = pid // (together * tiles)
    rest = pid - section * together * tiles
    size = tl.minimum(together, heads - section * together)
    tile = rest // size
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, section * together + rest % size


@triton.jit
def load_rows(
    x,
    batch,
    head,
    at,
    length,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Rows `at` to ``at + ROWS`` of ``x[batch, head]``, ``[ROWS, WIDTH]``; 0 beyond DIM columns.

    Where MASKED, rows before the first and behind the last of `length` are 0; if not, all of them are there.
    """
    data = x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + at.to(tl.int64) * x.row
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    where = data + row * x.row + column
    there = (at + row >= 0) & (at + row < length)
    if MASKED and WIDTH == DIM:
        x_ = tl.load(where, mask=there, other=0.0)
    elif MASKED:
        x_ = tl.load(where, mask=there & (column < DIM), other=0.0)
    elif WIDTH == DIM:
        x_ = tl.load(where)
    else:
        x_ = tl.load(where, mask=column < DIM, other=0.0)
    return x_


@triton.jit
def fetch_rows(x, batch, head, at, length, ROWS: tl.constexpr, shape, MASKED: tl.constexpr = True):
    """`load_rows` of q or k; where `shape.tma` by the tensor memory accelerator, which fills with 0."""
    if shape.tma:
        x_ = x.load([batch, head, at, 0]).reshape(ROWS, shape.width)
    else:
        x_ = load_rows(x, batch, head, at, length, ROWS, shape.dim, shape.width, MASKED)
    return x_


@triton.jit
def fetch_values(x, batch, head, at, length, ROWS: tl.constexpr, shape, MASKED: tl.constexpr = True):
    """The same of v or dout."""
    if shape.tma:
        x_ = x.load([batch, head, at, 0]).reshape(ROWS, shape.v_width)
    else:
        x_ = load_rows(x, batch, head, at, length, ROWS, shape.v_dim, shape.v_width, MASKED)
    return x_


@triton.jit
def cleared(problem, x, there):
    """Rows of x with 0 where they are not `there` under ranges: what lies in padding may be NaN."""
    if problem.ranges is not None:
        x = tl.where(there[:, None], x, 0.0).to(x.dtype)
    return x


@triton.jit
def from_float8(bits, dtype: tl.constexpr):
    """What bytes of float8_e4m3fn stand for."""
    # Its exponent and fraction as float32's, whose exponent counts from 127 and not from 7: 2^120 apart.
    size = bits & 0x7F
    wide = (size.to(tl.uint32) << 20) | ((bits & 0x80).to(tl.uint32) << 24)
    value = wide.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(size == 0x7F, float("nan"), value).to(dtype)


@triton.jit
def store_rows(
    x, batch, head, at, length, values, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """``[ROWS, WIDTH]`` to rows `at` to ``at + ROWS`` of ``x[batch, head]``, as far as they are there."""
    data = x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + at.to(tl.int64) * x.row
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    there = (at + row < length) & (column < DIM)
    tl.store(data + row * x.row + column, values.to(x.data.dtype.element_ty), mask=there)


@triton.jit
def padded_row(heads, batch, head, length):
    """Where the row of one head begins in a ``[B, H, length]`` whose rows are padded."""
    return (batch * heads + head).to(tl.int64) * (tl.cdiv(length, PADDING) * PADDING)


@triton.jit
def in_place(data, batch, head, row, column, place, i, j):
    """Pointers to scores (i, j), by their strides."""
    data += place.batch.to(tl.int64) * batch + place.head.to(tl.int64) * head
    return data + i.to(tl.int64) * row + j.to(tl.int64) * column


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """To 2 units in the last place where EXACT; if not, to 2 units of 1's last place."""
    size = tl.minimum(tl.abs(x), 10.0)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    if EXACT:
        z = x * x
        near = -5.70498872745e-3
        near = near * z + 2.06390887954e-2
        near = near * z - 5.37397155531e-2
        near = near * z + 1.33314422036e-1
        near = near * z - 3.33332819422e-1
        far = tl.where(size < 0.625, near * z * x + x, far)
    return tl.where(x == x, far, x)


@triton.jit
def capped(problem, place, qk, EXACT: tl.constexpr):
    """log2(e) · softcap(scale · q kᵀ)."""
    if problem.softcap is None:
        x = qk * (place.scale * LOG2E)
    else:
        x = (problem.softcap * LOG2E) * tanh(qk * (place.scale / problem.softcap), EXACT)
    return x


@triton.jit
def biased(problem, place, x, i, j):
    """x + log2(e) · bias. The most negative finite bias stays finite in base 2: it is no mask."""
    there = (i < place.q_length) & (j >= 0) & (j < place.k_length)
    if problem.bias is not None:
        where = in_place(
            problem.bias,
            problem.bias_batch,
            problem.bias_head,
            problem.bias_row,
            problem.bias_column,
            place,
            i,
            j,
        )
        bias = tl.load(where, mask=there, other=0.0).to(tl.float32)
        sum_ = x + bias * LOG2E
        x = tl.where(bias == -INF, bias, tl.where(sum_ < -LARGEST, -LARGEST, sum_))
    if problem.relative is not None:
        if problem.origin is None:
            distance = j - i + place.q_length
        else:
            origin = problem.origin + place.batch * problem.origin_batch + i
            distance = j - tl.load(origin, mask=i < place.q_length, other=0) + place.q_length + place.k_length
        relative = problem.relative + place.batch.to(tl.int64) * problem.relative_batch
        relative += place.head.to(tl.int64) * problem.relative_head
        x += tl.load(relative + distance, mask=there, other=0.0) * LOG2E
    return x


@triton.jit
def seen(problem, place, i, j):
    """Which keys each query sees, by band, ranges, blocks and mask."""
    keep = (i < place.q_length) & (j >= 0) & (j < place.k_length)
    if place.first is not None:
        keep &= j >= i + place.first
    if place.end is not None:
        keep &= j < i + place.end
    if problem.ranges is not None:
        any_pair = i != i
        for pair in tl.static_range(problem.pairs):
            start, stop = pair_of(problem, place, pair, i)
            any_pair |= (j >= start) & (j < stop)
        keep &= any_pair
    if problem.blocks is not None:
        block = in_place(
            problem.blocks,
            problem.blocks_batch,
            problem.blocks_head,
            problem.blocks_row,
            problem.blocks_column,
            place,
            i // problem.block_q,
            j // problem.block_k,
        )
        keep &= tl.load(block, mask=keep, other=0) != 0
    if problem.mask is not None:
        mask = in_place(
            problem.mask,
            problem.mask_batch,
            problem.mask_head,
            problem.mask_row,
            problem.mask_column,
            place,
            i,
            j,
        )
        keep &= tl.load(mask, mask=keep, other=0) != 0
    return keep


@triton.jit
def pair_of(problem, place, pair, i):
    """First key and the one behind the last of each query; an empty range for a query that is not there."""
    data = problem.ranges + place.batch.to(tl.int64) * problem.ranges_batch + pair * problem.ranges_pair
    data += i * problem.ranges_row
    there = i < place.q_length
    return tl.load(data, mask=there, other=0), tl.load(data + 1, mask=there, other=0)


@triton.jit
def kept(problem, place, i, at, KEYS: tl.constexpr, ALIGNED: tl.constexpr = True):
    """bool ``[queries, KEYS]``: which of the keys from `at` dropout leaves; i is ``[queries]``.

    The layout of the counter is in csrc/common/philox.h: a call for 16 lanes serves 128 keys.
    ALIGNED: `at` is a multiple of KEYS.
    """
    seed = tl.load(problem.seed)
    row = (problem.q_start + i)[:, None]
    start = problem.k_start + at
    if ALIGNED and problem.aligned and (KEYS == 32 or KEYS == 64 or KEYS == 128):
        counter = start // 128 * 16 + tl.arange(0, 16)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, counter, row, place.head, place.batch)
        if KEYS == 128:
            words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [queries, lane, word & 1, word >> 1]
            keep = (tl.join(words & 0xFFFF, words >> 16) >= problem.threshold).permute(0, 3, 2, 4, 1)
        elif KEYS == 64:
            second = start // 64 % 2 == 1
            words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
            keep = (tl.join(words & 0xFFFF, words >> 16) >= problem.threshold).permute(0, 2, 3, 1)
        else:
            quarter = start // 32 % 4
            word = tl.where(quarter < 2, tl.where(quarter == 0, w0, w1), tl.where(quarter == 2, w2, w3))
            keep = (tl.join(word & 0xFFFF, word >> 16) >= problem.threshold).permute(0, 2, 1)
        keep = keep.reshape(i.shape[0], KEYS)
    else:
        # A call for each key, of whose eight numbers seven are thrown away.
        key = tl.maximum(start + tl.arange(0, KEYS)[None, :], 0)
        counter = key // 128 * 16 + key % 16
        w0, w1, w2, w3 = tl.philox(seed, counter, row, place.head, place.batch)
        number = key % 128 // 16
        low = tl.where(number < 2, w0, w1)
        word = tl.where(number < 4, low, tl.where(number < 6, w2, w3))
        keep = ((word >> (number % 2 * 16).to(tl.uint32)) & 0xFFFF) >= problem.threshold
    return keep


@triton.jit
def gradient_of_scores(
    problem, place, qk, dp, log2_sum, delta, keep, i, j, EXACT: tl.constexpr, MASKED: tl.constexpr
):
    """From q kᵀ and dout vᵀ of a tile, either way round, what the gradients are products of.

    Returns:
        the probabilities P that weigh v, without dropout's factor; dS = P (dP - delta), of the scores with
        their biases; and d(q kᵀ) / scale.
    """
    x = capped(problem, place, qk, EXACT)
    s = biased(problem, place, x, i, j)
    if MASKED:
        visible = seen(problem, place, i, j)
        s = tl.where(visible, s, -INF)
    p = tl.exp2(s - log2_sum)
    if problem.seed is not None:
        dp = tl.where(keep, dp * problem.factor, 0.0)
    ds = p * (dp - delta)
    if MASKED and problem.ranges is not None:
        ds = tl.where(visible, ds, 0.0)  # dp may be NaN where nobody looks
    dx = ds
    if problem.softcap is not None:
        share = x / (problem.softcap * LOG2E)
        dx = ds * (1.0 - share * share)
    if problem.seed is not None:
        p = tl.where(keep, p, 0.0)
    return p, ds, dx
