"""The rotation by the C++ kernels: lays the tensors out for them. Speaks to `csrc/rotary/rotary.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import _backends


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    start: int,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """`fastattn::rotary` on CPU."""
    _backends.require("cpu")
    out = torch.empty_like(x)
    if positions is not None:
        positions = positions.contiguous()
    target = out if out.stride(-1) == 1 or out.shape[-1] == 1 else torch.empty(x.shape, dtype=x.dtype)
    torch.ops.fastattn_cpu.rotary(
        _unit_last(x),
        _unit_last(cos),
        _unit_last(sin),
        positions,
        start,
        interleaved,
        inverse,
        _backends.cpu_isa_id(),
        target,
    )
    return out if target is out else out.copy_(target)


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
