"""The MLP by the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.linear.cpu import gemm, matmul
from fastattn.ops.mlp import composed
from fastattn.ops.philox import drop_threshold


def dropout_add(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float, out: Tensor
) -> Tensor:
    """``out = residual + dropout(x)``, all ``[rows, columns]`` with unit column strides."""
    if residual is not None:
        residual = residual.contiguous()
    threshold = 0 if seed is None else drop_threshold(dropout)
    torch.ops.fastattn_cpu.dropout_add(x, residual, seed, threshold, _backends.cpu_isa_id(), out)
    return out


_PRODUCTS = composed.Products(matmul, gemm, dropout_add)


def forward(*problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::mlp_forward` on CPU."""
    _backends.require("cpu")
    return composed.forward(_PRODUCTS, *problem)


def backward(*problem: Any) -> tuple[Tensor, ...]:
    """`fastattn::mlp_backward` on CPU."""
    _backends.require("cpu")
    return composed.backward(_PRODUCTS, *problem)
