"""Matrix products by the C++ kernels, or by torch's BLAS where that was measured to be faster."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.linear import gradients, measured
from fastattn.ops.linear.epilogues import ADD, STORE


def matmul(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``out = a @ b + bias``, or ``out += a @ b``, with accumulators in float32.

    Args:
        a: ``[M, K]`` in float32, bfloat16 or float16.
        b: ``[K, N]`` in one of them.
        out: ``[M, N]`` in one of them, its last stride 1; float32 to accumulate.
        bias: ``[N]``; none where accumulating.
        accumulate: add to what `out` holds.

    Returns:
        out.
    """
    if measured.choice(a, b, out, gemm).ours:
        return gemm(a, b, out, bias=bias, epilogue=ADD if accumulate else STORE)
    if accumulate:
        return torch.addmm(out, a, b, out=out)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias.to(out.dtype), a, b, out=out)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    epilogue: int = STORE,
    activation: int = 0,
    u: Tensor | None = None,
    gate: Tensor | None = None,
    h: Tensor | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """``S = a @ b + bias``, and what the epilogue makes of it, as csrc/linear/problem.h says of C, `out`."""
    isa = _backends.cpu_isa_id()
    if bias is not None:
        bias = bias.contiguous()
    torch.ops.fastattn_cpu.gemm(_unit(a), _unit(b), bias, epilogue, activation, u, gate, h, d, isa, out)
    return out


def _unit(x: Tensor) -> Tensor:
    """A matrix one of whose strides is 1."""
    return x if 1 in x.stride() or x.numel() <= 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`fastattn::linear_forward` on CPU."""
    _backends.require("cpu")
    out = x.new_empty((x.shape[0], weight.shape[0]))
    return matmul(x, weight.t(), out, bias=bias)


def backward(dout: Tensor, x: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::linear_backward` on CPU."""
    _backends.require("cpu")
    return gradients.backward(matmul, dout, x, weight, wanted)
