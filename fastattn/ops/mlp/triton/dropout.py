"""``residual + dropout(x)``, element by element."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.philox import drop_threshold

_ROWS = 16
_COLUMNS = tl.constexpr(128)  # what a call of Philox for 16 lanes serves


@triton.jit
def _dropout_add(
    x, residual, seed, out, M, N, x_row, residual_row, out_row, threshold, factor, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    wide = row.to(tl.int64)[:, None]
    value = tl.load(x + wide * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        # The layout is in csrc/common/philox.h: [row, lane, word & 1, word >> 1, half] of the numbers.
        counter = tl.program_id(1) * 16 + tl.arange(0, 16)[None, :]
        none = row[:, None] * 0
        w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, row[:, None], none, none)
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        keep = (tl.join(words & 0xFFFF, words >> 16) >= threshold).permute(0, 3, 2, 4, 1)
        value = tl.where(keep.reshape(ROWS, _COLUMNS), value * factor, 0.0)
    if residual is not None:
        value += tl.load(residual + wide * residual_row + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + wide * out_row + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def dropout_add(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float, out: Tensor
) -> Tensor:
    """``out = residual + dropout(x)``, all ``[rows, columns]`` with unit column strides."""
    if residual is not None:
        residual = residual.contiguous()
    rows, columns = x.shape
    if x.numel() == 0:
        return out
    threshold = 0 if seed is None else drop_threshold(dropout)
    with gpu.on(x.device):
        _dropout_add[(gpu.cdiv(rows, _ROWS), gpu.cdiv(columns, _COLUMNS.value))](
            x,
            residual,
            seed,
            out,
            rows,
            columns,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            threshold,
            65536 / (65536 - threshold),
            ROWS=_ROWS,
        )
    return out
