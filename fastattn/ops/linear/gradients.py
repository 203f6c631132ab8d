"""The gradients of a linear layer out of matrix products, whosever they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.ops.linear.library import WANTED_BIAS, WANTED_WEIGHT, WANTED_X

Product = Callable[[Tensor, Tensor, Tensor], object]  # (a, b, out): out = a @ b


def backward(
    product: Product, dout: Tensor, x: Tensor, weight: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::linear_backward`."""
    dx, dweight, dbias = (x.new_empty((0,)) for _ in range(3))
    if wanted & WANTED_X:
        dx = x.new_empty(x.shape)
        product(dout, weight, dx)
    if wanted & WANTED_WEIGHT:
        dweight = weight_gradient(product, dout, x, weight)
    if wanted & WANTED_BIAS:
        dbias = column_sums(dout)
    return dx, dweight, dbias


def weight_gradient(product: Product, dout: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``doutᵀ x``, laid out in memory as `weight` is."""
    grad = torch.empty_like(weight)
    if grad.stride(-1) == 1:
        product(dout.t(), x, grad)
    else:
        product(x.t(), dout, grad.t())
    return grad


def column_sums(x: Tensor) -> Tensor:
    """``1ᵀ x``, added up in float32."""
    return x.sum(0, dtype=torch.float32).to(x.dtype)
