"""``C = epilogue(A B + bias)`` in tiles, the same epilogues as csrc/linear/problem.h."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.activations import NAMES
from fastattn.ops.linear import epilogues

_ADD: Final = tl.constexpr(epilogues.ADD)
_ACTIVATE: Final = tl.constexpr(epilogues.ACTIVATE)
_GATE: Final = tl.constexpr(epilogues.GATE)
_SLOPE: Final = tl.constexpr(epilogues.SLOPE)
_GATE_SLOPE: Final = tl.constexpr(epilogues.GATE_SLOPE)
_GELU: Final = tl.constexpr(NAMES.index("gelu"))
_GELU_TANH: Final = tl.constexpr(NAMES.index("gelu_tanh"))
_SILU: Final = tl.constexpr(NAMES.index("silu"))
_RELU: Final = tl.constexpr(NAMES.index("relu"))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """f(x) and f'(x)."""
    if KIND == _GELU:
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * phi, phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if KIND == _GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
        s = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627159528 * x * x))
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881478585 * x * x)
    if KIND == _SILU:
        s = tl.sigmoid(x)
        return x * s, s + x * s * (1.0 - s)
    positive = tl.where(x > 0, x, 0.0)
    if KIND == _RELU:
        return positive, tl.where(x > 0, 1.0, 0.0)
    return positive * positive, 2.0 * positive


@triton.jit
def _gemm(
    a,
    b,
    bias,
    u,
    gate,
    h,
    d,
    c,
    M,
    N,
    K,
    a_row,
    a_column,
    b_row,
    b_column,
    c_row,
    EPILOGUE: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs go down GROUP tiles of rows before they go right: neighbours share tiles in the cache.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside_m, inside_n = rows < M, columns < N

    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        terms = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        inside_k = terms < K
        left = tl.load(
            a + rows[:, None] * a_row + terms[None, :] * a_column,
            mask=inside_m[:, None] & inside_k[None, :],
            other=0.0,
        )
        right = tl.load(
            b + terms[:, None] * b_row + columns[None, :] * b_column,
            mask=inside_k[:, None] & inside_n[None, :],
            other=0.0,
        )
        s = tl.dot(left, right, s, input_precision=PRECISION)

    if bias is not None:
        s += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    at = rows[:, None] * c_row + columns[None, :]
    element = c.dtype.element_ty
    if EPILOGUE == _ADD:
        s += tl.load(c + at, mask=inside, other=0.0)
    elif EPILOGUE == _ACTIVATE:
        if u is not None:
            tl.store(u + at, s.to(element), mask=inside)
        s, _ = activate(s, KIND)
    elif EPILOGUE == _GATE:
        if u is not None:
            tl.store(u + at, s.to(element), mask=inside)
        gated, _ = activate(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), KIND)
        s *= gated
    elif EPILOGUE == _SLOPE:
        value, slope = activate(tl.load(u + at, mask=inside, other=0.0).to(tl.float32), KIND)
        if h is not None:
            tl.store(h + at, value.to(element), mask=inside)
        s *= slope
    elif EPILOGUE == _GATE_SLOPE:
        value, slope = activate(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), KIND)
        linear = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        if h is not None:
            tl.store(h + at, (value * linear).to(element), mask=inside)
        tl.store(d + at, (s * linear * slope).to(element), mask=inside)
        s *= value
    tl.store(c + at, s.to(element), mask=inside)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    epilogue: int = epilogues.STORE,
    activation: int = 0,
    u: Tensor | None = None,
    gate: Tensor | None = None,
    h: Tensor | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """``S = a @ b + bias``, and what the epilogue makes of it; `out`, u, gate, h, d are contiguous alike."""
    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return out
    blocks = _blocks(a.dtype, m, epilogue)
    with gpu.on(a.device):
        _gemm[(gpu.cdiv(m, blocks["BLOCK_M"]) * gpu.cdiv(n, blocks["BLOCK_N"]),)](
            a,
            b,
            bias if bias is None else bias.contiguous(),
            u,
            gate,
            h,
            d,
            out,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            EPILOGUE=epilogue,
            KIND=activation,
            PRECISION=gpu.precision(a.dtype),
            **blocks,
        )
    return out


def _blocks(dtype: torch.dtype, rows: int, epilogue: int) -> dict[str, Any]:
    """Tiles that leave the tensor cores of sm_80 to sm_100 busy and spill nothing there."""
    if epilogue in (epilogues.SLOPE, epilogues.GATE_SLOPE) and dtype != torch.float32:
        # Several matrices are read and written beside the sums.
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
