"""The norms by the C++ kernels: lays the tensors out for them. Speaks to `csrc/layer_norm/layer_norm.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.layer_norm.library import new_gradients, new_outputs
from fastattn.ops.philox import drop_threshold


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    weight_offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastattn::layer_norm_forward` on CPU."""
    _backends.require("cpu")
    out, z, mean, rstd = new_outputs(x, residual, dropout, rms, sum_dtype)
    torch.ops.fastattn_cpu.layer_norm_forward(
        _unit_last(x),
        None if residual is None else _unit_last(residual),
        _floats(weight, weight_offset),
        _floats(bias),
        seed,
        drop_threshold(dropout),
        eps,
        _backends.cpu_isa_id(),
        out,
        z if z.dim() == 2 else None,
        None if rms else mean,
        rstd,
    )
    return out, z, mean, rstd


def backward(
    dout: Tensor,
    dsum: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    weight_offset: float,
    rms: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastattn::layer_norm_backward` on CPU."""
    _backends.require("cpu")
    grads = new_gradients(dout, z, wanted)
    torch.ops.fastattn_cpu.layer_norm_backward(
        _unit_last(dout),
        None if dsum is None else _unit_last(dsum),
        _unit_last(z),
        _floats(weight, weight_offset),
        None if rms else mean,
        rstd,
        seed,
        drop_threshold(dropout),
        _backends.cpu_isa_id(),
        *(grad if wanted & bit else None for grad, bit in zip(grads, (1, 2, 4, 8), strict=True)),
    )
    return grads


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _floats(x: Tensor | None, offset: float = 0.0) -> Tensor | None:
    if x is None:
        return None
    x = x.float().contiguous()
    return x + offset if offset else x
