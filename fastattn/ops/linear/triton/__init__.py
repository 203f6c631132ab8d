"""Matrix products with epilogues on GPUs, in Triton."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops.interpreter import interpreted, mend
from fastattn.ops.linear import gradients
from fastattn.ops.linear.triton.gemm import gemm

__all__ = ["backward", "forward", "gemm"]

if interpreted():
    mend()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`fastattn::linear_forward`."""
    return gemm(x, weight.t(), x.new_empty((x.shape[0], weight.shape[0])), bias=bias)


def backward(dout: Tensor, x: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::linear_backward`."""
    return gradients.backward(gemm, dout, x, weight, wanted)
