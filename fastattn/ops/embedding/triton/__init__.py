"""The embedding by Triton kernels: a program for a row of what is returned, and for a run of sorted ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.philox import drop_threshold


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """`fastattn::embedding` by a Triton kernel; a row whose id or position is not in its table is NaN."""
    count, dim = ids.shape[0], weight.shape[1]
    out = weight.new_empty((count, dim))
    if out.numel() == 0:
        return out
    threshold = drop_threshold(dropout)
    with gpu.on(weight.device):
        _look_up[(count, gpu.cdiv(dim, 1024))](
            ids,
            weight,
            position_weight,
            positions,
            seed if threshold else None,
            out,
            *weight.stride(),
            *((0, 0) if position_weight is None else position_weight.stride()),
            weight.shape[0],
            0 if position_weight is None else position_weight.shape[0],
            1 if positions is None else positions.shape[0],
            dim,
            threshold,
            65536 / (65536 - threshold),
            COLUMNS=min(1024, gpu.power_of_two(dim)),
        )
    return out


def gradient(dout: Tensor, ids: Tensor, rows: int, seed: Tensor | None, dropout: float, skip: int) -> Tensor:
    """`fastattn::embedding_gradient` by a Triton kernel: each row's sum is one program's, in ids' order."""
    grad = dout.new_zeros((rows, dout.shape[1]))
    if dout.numel() == 0:
        return grad
    dout, (found, order) = dout.contiguous(), torch.sort(ids, stable=True)
    count, dim = dout.shape
    threshold = drop_threshold(dropout)
    columns = min(256, gpu.power_of_two(dim))
    with gpu.on(dout.device):
        _sum[(count, gpu.cdiv(dim, columns))](
            dout,
            found,
            order,
            seed if threshold else None,
            grad,
            count,
            rows,
            dim,
            skip,
            threshold,
            65536 / (65536 - threshold),
            COLUMNS=columns,
        )
    return grad


@triton.jit
def _kept(seed, row, column, threshold):
    """Which columns of a row dropout leaves; the layout of the counter is in csrc/common/philox.h."""
    counter = column // 128 * 16 + column % 16
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, row, 0, 0)
    number = column % 128 // 16
    word = tl.where(number < 4, tl.where(number < 2, w0, w1), tl.where(number < 6, w2, w3))
    return ((word >> (number % 2 * 16).to(tl.uint32)) & 0xFFFF) >= threshold


@triton.jit
def _look_up(
    ids,
    weight,
    position_weight,
    positions,
    seed,
    out,
    weight_row,
    weight_column,
    position_row,
    position_column,
    weight_rows,
    position_rows,
    position_count,
    dim,
    threshold,
    factor,
    COLUMNS: tl.constexpr,
):
    """out[r] = dropout(weight[ids[r]] + position_weight[positions[r % position_count]])"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    token = tl.load(ids + row)
    known = (token >= 0) & (token < weight_rows)
    x = tl.load(weight + token * weight_row + column * weight_column, mask=inside & known, other=float("nan"))
    x = x.to(tl.float32)
    if position_weight is not None:
        place = tl.load(positions + row % position_count)
        known = (place >= 0) & (place < position_rows)
        where = position_weight + place * position_row + column * position_column
        x += tl.load(where, mask=inside & known, other=float("nan")).to(tl.float32)
    if seed is not None:
        x = tl.where(_kept(seed, tl.program_id(0), column, threshold), x * factor, 0.0)
    tl.store(out + row * dim + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    dout,
    found,
    order,
    seed,
    grad,
    count,
    rows,
    dim,
    skip,
    threshold,
    factor,
    COLUMNS: tl.constexpr,
):
    """grad[t] = sum of dout over rows with id t, by the program of the first of them in sorted order."""
    first = tl.program_id(0)
    target = tl.load(found + first)
    before = tl.load(found + first - 1, mask=first > 0, other=-1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    if (target != before) & (target != skip) & (target >= 0) & (target < rows):
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        i = first
        here = target
        while (i < count) & (here == target):
            row = tl.load(order + i)
            x = tl.load(dout + row * dim + column, mask=inside, other=0.0).to(tl.float32)
            if seed is not None:
                x = tl.where(_kept(seed, row.to(tl.int32), column, threshold), x * factor, 0.0)
            total += x
            i += 1
            here = tl.load(found + i, mask=i < count, other=-1)
        tl.store(grad + target * dim + column, total.to(grad.dtype.element_ty), mask=inside)
