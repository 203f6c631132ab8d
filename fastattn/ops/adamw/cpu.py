"""AdamW by the C++ kernels. Speaks to `csrc/adamw/adamw.cpp`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import _backends


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float | Tensor,
) -> None:
    """`fastattn.ops.adamw.adamw_step` on CPU."""
    _backends.require("cpu")
    torch.ops.fastattn_cpu.adamw_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        *betas,
        eps,
        weight_decay,
        float(factor),
        _backends.cpu_isa_id(),
    )


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`fastattn.ops.adamw.total_norm` on CPU."""
    _backends.require("cpu")
    squares: float = torch.ops.fastattn_cpu.sum_of_squares(tensors, _backends.cpu_isa_id())
    return torch.tensor(math.sqrt(squares) if squares >= 0 else math.nan, dtype=torch.float32)
