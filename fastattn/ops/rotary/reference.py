"""The rotation as its equation, in eager PyTorch: any device, any dtype, autograd by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of dimensions: ``(a, b) -> (a cos - b sin, a sin + b cos)``.

    Args:
        x: ``[..., D]``.
        cos: broadcastable to ``[..., R / 2]``, R <= D: of the angle of each pair.
        sin: the same of its sine.
        interleaved: the pairs are the dimensions (0, 1), (2, 3), …; else (0, R/2), (1, R/2 + 1), …

    Returns:
        x's shape and dtype; the products and sums are in float32 or wider, and rounded once. Dimensions
        behind R are x's own.
    """
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).to(dtype).unbind(-1)
    else:
        a, b = turned.to(dtype).split(half, -1)
    pair = (
        torch.addcmul(a * cos, b, sin, value=-1).to(x.dtype),
        torch.addcmul(a * sin, b, cos).to(x.dtype),
    )
    if interleaved:
        return torch.cat((torch.stack(pair, -1).flatten(-2), rest), -1)
    return torch.cat((*pair, rest), -1)
