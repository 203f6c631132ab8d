"""The norms by Triton's kernels: a program holds a row in registers, read from memory once.

Source: Ba, Kiros & Hinton, "Layer Normalization", 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.layer_norm.library import new_gradients, new_outputs
from fastattn.ops.philox import drop_threshold

# Columns that one of Philox's groups serves, in 16 lanes of 8 numbers.
_GROUP: Final = 128
# Programs of the backward pass for each multiprocessor: they add up rows, and their sums are added up.
_PROGRAMS: Final = 4


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    weight_offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastattn::layer_norm_forward` by a Triton kernel."""
    outputs = new_outputs(x, residual, dropout, rms, sum_dtype)
    out, z, mean, rstd = outputs
    rows, columns = x.shape
    if x.numel() == 0:
        return outputs
    threshold = drop_threshold(dropout)
    with gpu.on(x.device):
        _forward[(rows,)](
            x,
            residual,
            weight,
            bias,
            seed if threshold else None,
            out,
            z if z.dim() == 2 else None,
            None if rms else mean,
            rstd,
            *x.stride(),
            *((0, 0) if residual is None else residual.stride()),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            threshold,
            65536 / (65536 - threshold),
            eps,
            weight_offset,
            COLUMNS=columns,
            **_sizes(columns),
        )
    return outputs


def backward(
    dout: Tensor,
    dsum: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    weight_offset: float,
    rms: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastattn::layer_norm_backward` by a Triton kernel."""
    grads = new_gradients(dout, z, wanted)
    rows, columns = z.shape
    if z.numel() == 0:
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    dx, dresidual, dweight, dbias = (
        grad if wanted & bit else None for grad, bit in zip(grads, (1, 2, 4, 8), strict=True)
    )
    chunk = gpu.cdiv(rows, min(rows, _PROGRAMS * _processors(z.device)))
    programs = gpu.cdiv(rows, chunk)
    # What a program adds up of dweight and dbias.
    partial = z.new_empty((2, programs, columns), dtype=torch.float32)
    threshold = drop_threshold(dropout)
    with gpu.on(z.device):
        _backward[(programs,)](
            dout,
            dsum,
            z,
            weight,
            None if rms else mean,
            rstd,
            seed if threshold else None,
            dx,
            dresidual,
            None if dweight is None else partial[0],
            None if dbias is None else partial[1],
            *dout.stride(),
            *((0, 0) if dsum is None else dsum.stride()),
            *z.stride(),
            0 if weight is None else weight.stride(0),
            threshold,
            65536 / (65536 - threshold),
            weight_offset,
            rows,
            chunk,
            COLUMNS=columns,
            **_sizes(columns),
        )
        for sums, total in zip(partial, (dweight, dbias), strict=True):
            if total is not None:
                torch.sum(sums, 0, out=total)
    return grads


def _sizes(columns: int) -> dict[str, Any]:
    width = max(_GROUP, gpu.power_of_two(columns))
    return {"WIDTH": width, "num_warps": max(1, min(16, width // 512))}


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _kept(seed, row, threshold, WIDTH: tl.constexpr):
    """bool ``[WIDTH]``: the columns of a row that dropout leaves; the layout is csrc/common/philox.h's."""
    counter = tl.arange(0, WIDTH // 8)
    zero = tl.zeros([WIDTH // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, zero + row, zero, zero)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    # [lane of a group, word & 1, word >> 1, half] -> [group, word >> 1, word & 1, half, lane]
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(WIDTH // 128, 16, 2, 2, 2)
    return (numbers >= threshold).permute(0, 3, 2, 4, 1).reshape(WIDTH)


@triton.jit
def _weights(weight, step, offset, column, inside):
    """weight + offset, in float32; 1 without a weight."""
    w = tl.full(column.shape, 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + column * step, mask=inside, other=0.0).to(tl.float32) + offset
    return w


@triton.jit(do_not_specialize=["threshold"])
def _forward(
    x,
    residual,
    weight,
    bias,
    seed,
    out,
    z,
    mean,
    rstd,
    x_row,
    x_column,
    residual_row,
    residual_column,
    weight_step,
    bias_step,
    threshold,
    factor,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """z = residual + dropout(x), out = (z - mean) · rstd · weight + bias, of one row."""
    row = tl.program_id(0)
    row_ = row.to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    z_ = tl.load(x + row_ * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        z_ = tl.where(_kept(seed, row, threshold, WIDTH), z_ * factor, 0.0)
    if residual is not None:
        from_ = residual + row_ * residual_row + column * residual_column
        z_ += tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        rounded = z_.to(z.dtype.element_ty)
        tl.store(z + row_ * COLUMNS + column, rounded, mask=inside)
        z_ = rounded.to(tl.float32)

    centered = z_
    if mean is not None:
        mean_ = tl.sum(z_, 0) / COLUMNS
        tl.store(mean + row, mean_)
        centered = tl.where(inside, z_ - mean_, 0.0)
    rstd_ = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / COLUMNS + eps)
    tl.store(rstd + row, rstd_)
    out_ = centered * rstd_ * _weights(weight, weight_step, offset, column, inside)
    if bias is not None:
        out_ += tl.load(bias + column * bias_step, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row_ * COLUMNS + column, out_.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold", "rows", "chunk"])
def _backward(
    dout,
    dz,
    z,
    weight,
    mean,
    rstd,
    seed,
    dx,
    dresidual,
    dweight,
    dbias,
    dout_row,
    dout_column,
    dz_row,
    dz_column,
    z_row,
    z_column,
    weight_step,
    threshold,
    factor,
    offset,
    rows,
    chunk,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A chunk of rows; with y = (z - mean) · rstd and g = dout · weight,

    dz = rstd · (g - mean(g) - y · mean(g · y)), dweight = Σ dout · y, dbias = Σ dout.
    """
    first = tl.program_id(0) * chunk
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    w = _weights(weight, weight_step, offset, column, inside)
    sum_weight = tl.zeros([WIDTH], tl.float32)
    sum_bias = tl.zeros([WIDTH], tl.float32)
    for i in range(tl.minimum(chunk, rows - first)):
        row = first + i
        row_ = row.to(tl.int64)
        rstd_ = tl.load(rstd + row)
        y = tl.load(z + row_ * z_row + column * z_column, mask=inside, other=0.0).to(tl.float32)
        if mean is not None:
            y -= tl.load(mean + row)
        y *= rstd_
        # 0 past the row's end, and so is all that is summed.
        dout_ = tl.load(dout + row_ * dout_row + column * dout_column, mask=inside, other=0.0).to(tl.float32)
        sum_weight += dout_ * y
        sum_bias += dout_
        g = dout_ * w
        d = g - y * (tl.sum(g * y, 0) / COLUMNS)
        if mean is not None:
            d -= tl.sum(g, 0) / COLUMNS
        d *= rstd_
        if dz is not None:
            d += tl.load(dz + row_ * dz_row + column * dz_column, mask=inside, other=0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(dresidual + row_ * COLUMNS + column, d.to(dresidual.dtype.element_ty), mask=inside)
        if dx is not None:
            if seed is not None:
                d = tl.where(_kept(seed, row, threshold, WIDTH), d * factor, 0.0)
            tl.store(dx + row_ * COLUMNS + column, d.to(dx.dtype.element_ty), mask=inside)
    to = tl.program_id(0).to(tl.int64) * COLUMNS + column
    if dweight is not None:
        tl.store(dweight + to, sum_weight, mask=inside)
    if dbias is not None:
        tl.store(dbias + to, sum_bias, mask=inside)
