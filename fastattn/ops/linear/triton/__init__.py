"""Matrix products with epilogues on GPUs, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.interpreter import interpreted, mend
from fastattn.ops.linear.library import WANTED_BIAS, WANTED_WEIGHT, WANTED_X
from fastattn.ops.linear.triton.gemm import gemm

__all__ = ["backward", "forward", "gemm"]

if interpreted():
    mend()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`fastattn::linear_forward`."""
    return gemm(x, weight.t(), x.new_empty((x.shape[0], weight.shape[0])), bias=bias)


def backward(dout: Tensor, x: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::linear_backward`."""
    dx, dweight, dbias = (x.new_empty((0,)) for _ in range(3))
    if wanted & WANTED_X:
        dx = gemm(dout, weight, x.new_empty(x.shape))
    if wanted & WANTED_WEIGHT:
        dweight = torch.empty_like(weight)
        if dweight.stride(-1) == 1:
            gemm(dout.t(), x, dweight)
        else:
            gemm(x.t(), dout, dweight.t())
    if wanted & WANTED_BIAS:
        dbias = dout.sum(0, dtype=torch.float32).to(dout.dtype)
    return dx, dweight, dbias
