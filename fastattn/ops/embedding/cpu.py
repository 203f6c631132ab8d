"""The embedding by the C++ kernels. Speaks to `csrc/embedding/embedding.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.philox import drop_threshold


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """`fastattn::embedding` on CPU."""
    _backends.require("cpu")
    out = weight.new_empty((ids.shape[0], weight.shape[1]))
    torch.ops.fastattn_cpu.embedding(
        ids.contiguous(),
        _unit_last(weight),
        None if position_weight is None else _unit_last(position_weight),
        None if positions is None else positions.contiguous(),
        seed,
        drop_threshold(dropout),
        _backends.cpu_isa_id(),
        out,
    )
    return out


def gradient(dout: Tensor, ids: Tensor, rows: int, seed: Tensor | None, dropout: float, skip: int) -> Tensor:
    """`fastattn::embedding_gradient` on CPU: each row's sum is one thread's, in the order of ids."""
    _backends.require("cpu")
    grad = dout.new_zeros((rows, dout.shape[1]))
    torch.ops.fastattn_cpu.embedding_gradient(
        dout.contiguous(),
        ids.contiguous(),
        torch.argsort(ids, stable=True),
        seed,
        drop_threshold(dropout),
        skip,
        _backends.cpu_isa_id(),
        grad,
    )
    return grad


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
