"""The norms as torch computes them: any device, any dtype, autograd by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.philox import drop_threshold, dropout_keep


def add(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float, dtype: torch.dtype
) -> Tensor:
    """``residual + dropout(x)``.

    Args:
        x: ``[rows, columns]``.
        residual: the same shape, or None.
        seed: int64 ``[1]`` where dropout is above 0.
        dropout: probability in [0, 1), taken in 65,536ths.
        dtype: of the sum.

    Returns:
        ``[rows, columns]``; the sum is in float32 or wider, and rounded once.
    """
    z = x.to(torch.promote_types(torch.float32, x.dtype))
    threshold = drop_threshold(dropout)
    if seed is not None and threshold:
        keep = dropout_keep(seed, dropout, (1, 1, *x.shape))[0, 0]
        z = torch.where(keep, z * (65536 / (65536 - threshold)), 0)
    return (z if residual is None else residual + z).to(dtype)


def norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    rms: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The layer norm of each row, or its RMS norm.

    Args:
        z: ``[rows, columns]``.
        weight: ``[columns]``, or None for ones; `weight_offset` is added to it.
        bias: ``[columns]``, or None for zeros.
        eps: added to the variance, or to the mean square.
        weight_offset: 1 for models whose weight is around 0.
        rms: the mean is not taken away.
        dtype: of what is returned.

    Returns:
        ``[rows, columns]``.
    """
    wide = torch.promote_types(torch.float32, z.dtype)
    if weight is not None and weight_offset:
        weight = weight.to(wide) + weight_offset
    if not {dtype, *(x.dtype for x in (weight, bias) if x is not None)} <= {z.dtype}:
        z = z.to(wide)
        weight, bias = (x if x is None else x.to(wide) for x in (weight, bias))
    if not rms:
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps).to(dtype)
    return F.rms_norm(z, z.shape[-1:], weight, eps).to(dtype)
