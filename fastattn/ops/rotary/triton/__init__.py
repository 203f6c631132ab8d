"""The rotation by a Triton kernel: a program for each block of rows of a few heads.

Source: Su et al., "RoFormer", 2021 (arXiv 2104.09864), equation 34.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.rotary.library import UNTURNED

# Elements a program takes at a time, and heads that share the angles it has looked up.
_TILE: Final = 2048
_HEADS: Final = 4
_UNTURNED: Final = tl.constexpr(UNTURNED)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    start: int,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """`fastattn::rotary` by a Triton kernel; a row whose position is not in the tables is NaN."""
    out = torch.empty_like(x)
    batch, heads, length, dim = x.shape
    if x.numel() == 0:
        return out
    half = cos.shape[1]
    width = gpu.power_of_two(half)
    rows = max(1, min(_TILE // (2 * width), gpu.power_of_two(length)))
    grid = (gpu.cdiv(length, rows), gpu.cdiv(heads, _HEADS), batch)
    with gpu.on(x.device):
        _rotate[grid](
            x,
            out,
            cos,
            sin,
            positions,
            *x.stride(),
            *out.stride(),
            *cos.stride(),
            *sin.stride(),
            0 if positions is None or positions.shape[0] == 1 else positions.stride(0),
            0 if positions is None else positions.stride(1),
            start,
            heads,
            length,
            cos.shape[0],
            -1.0 if inverse else 1.0,
            HALF=half,
            WIDTH=width,
            REST=dim - 2 * half,
            REST_WIDTH=gpu.power_of_two(max(1, dim - 2 * half)),
            ROWS=rows,
            HEADS=_HEADS,
            INTERLEAVED=interleaved,
            num_warps=4,
        )
    return out


@triton.jit
def _rotate(
    x,
    out,
    cos,
    sin,
    positions,
    x_batch,
    x_head,
    x_row,
    x_column,
    out_batch,
    out_head,
    out_row,
    out_column,
    cos_row,
    cos_column,
    sin_row,
    sin_column,
    position_batch,
    position_row,
    start,
    heads,
    length,
    table_rows,
    sign,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, a sin + b cos) for the pairs of ROWS rows of HEADS heads."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    if positions is None:
        position = start + row.to(tl.int64)
    else:
        position = tl.load(positions + batch * position_batch + row * position_row, mask=inside, other=0)
    turned = (position != _UNTURNED)[:, None]
    known = (position >= 0) & (position < table_rows) & inside
    position = tl.where(known, position, 0)[:, None]

    pair = tl.arange(0, WIDTH)[None, :]
    listed = known[:, None] & (pair < HALF)
    wrong = tl.where(turned, float("nan"), 1.0)
    c = tl.load(cos + position * cos_row + pair * cos_column, mask=listed, other=0.0)
    s = tl.load(sin + position * sin_row + pair * sin_column, mask=listed, other=0.0)
    c = tl.where(known[:, None], c.to(tl.float32), wrong)
    s = s.to(tl.float32) * sign

    rest = tl.arange(0, REST_WIDTH)[None, :]
    row_ = row[:, None].to(tl.int64)
    first = tl.program_id(1) * HEADS
    for i in tl.static_range(HEADS):
        head = first + i
        own = inside[:, None] & (head < heads)
        there = own & (pair < HALF)
        from_ = x + batch * x_batch + head.to(tl.int64) * x_head + row_ * x_row
        to = out + batch * out_batch + head.to(tl.int64) * out_head + row_ * out_row
        if INTERLEAVED:
            # Both of a pair in one load of neighbours.
            column = tl.arange(0, 2 * WIDTH)[None, :]
            both = own & (column < 2 * HALF)
            tile = tl.load(from_ + column * x_column, mask=both, other=0.0)
            a, b = tl.split(tile.reshape(ROWS, WIDTH, 2))
        else:
            a = tl.load(from_ + pair * x_column, mask=there, other=0.0)
            b = tl.load(from_ + (HALF + pair) * x_column, mask=there, other=0.0)
        # A row that is not turned is the same bits, infinities and all.
        a_ = tl.where(turned, a.to(tl.float32) * c - b.to(tl.float32) * s, a.to(tl.float32))
        b_ = tl.where(turned, a.to(tl.float32) * s + b.to(tl.float32) * c, b.to(tl.float32))
        a_, b_ = a_.to(out.dtype.element_ty), b_.to(out.dtype.element_ty)
        if INTERLEAVED:
            tl.store(to + column * out_column, tl.join(a_, b_).reshape(ROWS, 2 * WIDTH), mask=both)
        else:
            tl.store(to + pair * out_column, a_, mask=there)
            tl.store(to + (HALF + pair) * out_column, b_, mask=there)
        if REST > 0:
            passed = own & (rest < REST)
            kept = tl.load(from_ + (2 * HALF + rest) * x_column, mask=passed, other=0.0)
            tl.store(to + (2 * HALF + rest) * out_column, kept, mask=passed)
