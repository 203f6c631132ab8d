"""The MLP on GPUs: products with epilogues in Triton, those without by torch's BLAS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.interpreter import interpreted, mend
from fastattn.ops.linear.epilogues import ADD
from fastattn.ops.linear.triton import gemm
from fastattn.ops.mlp import composed
from fastattn.ops.mlp.triton.dropout import dropout_add

__all__ = ["backward", "forward"]

if interpreted():
    mend()


def _matmul(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``out = a @ b + bias`` or ``out += a @ b``."""
    if accumulate:
        return gemm(a, b, out, epilogue=ADD)
    if out.dtype != a.dtype:
        return gemm(a, b, out, bias=bias)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


_PRODUCTS = composed.Products(_matmul, gemm, dropout_add)


def forward(*problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::mlp_forward`."""
    return composed.forward(_PRODUCTS, *problem)


def backward(*problem: Any) -> tuple[Tensor, ...]:
    """`fastattn::mlp_backward`."""
    return composed.backward(_PRODUCTS, *problem)
