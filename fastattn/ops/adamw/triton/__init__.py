"""AdamW by a Triton kernel: one launch for all parameters, which it finds by a table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu

# Elements a program updates, and how many at a time: more do not fit its registers.
_RUN: Final = 16384
_BLOCK: Final = 1024
_TYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    """`fastattn.ops.adamw.adamw_step` by a Triton kernel."""
    device = params[0].device
    beta1, beta2 = betas
    addresses, scales, runs = [], [], []
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        t = float(steps[i])
        addresses.append([*(x.data_ptr() for x in tensors), tensors[0].numel()])
        scales.append([lr / (1 - beta1**t), (1 - beta2**t) ** -0.5])
        runs += [[i, run] for run in range(gpu.cdiv(tensors[0].numel(), _RUN))]
    if not runs:
        return
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=torch.float32, device=device)
    with gpu.on(device):
        _step[(len(runs),)](
            torch.tensor(addresses, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.tensor(runs, dtype=torch.int32, device=device),
            factor,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            1 - lr * weight_decay,
            TYPE=_TYPES[params[0].dtype],
            RUN=_RUN,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`fastattn.ops.adamw.total_norm` on a GPU: torch's own, of a few launches for all tensors."""
    norms = torch._foreach_norm(list(tensors), 2.0, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


@triton.jit
def _step(
    addresses,
    scales,
    runs,
    factor,
    new1,
    beta2,
    new2,
    eps,
    decay,
    TYPE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m = (1 - new1) m + new1 g, v = beta2 v + new2 g², new = 1 - beta,
    p = decay p - step_size m / (sqrt(v) root + eps)."""
    tensor = tl.load(runs + 2 * tl.program_id(0)).to(tl.int64)
    first = tl.load(runs + 2 * tl.program_id(0) + 1).to(tl.int64) * RUN
    row = addresses + 5 * tensor
    param = tl.load(row).to(tl.pointer_type(TYPE))
    grad = tl.load(row + 1).to(tl.pointer_type(TYPE))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(TYPE))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(TYPE))
    count = tl.load(row + 4)
    step_size = tl.load(scales + 2 * tensor)
    root = tl.load(scales + 2 * tensor + 1)

    scale = tl.load(factor)
    for block in range(0, RUN, BLOCK):
        i = first + block + tl.arange(0, BLOCK)
        inside = i < count
        g = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32) * scale
        m = tl.load(exp_avg + i, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + i, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(param + i, mask=inside, other=0.0).to(tl.float32) * decay
        m += (g - m) * new1
        v = v * beta2 + g * g * new2
        p -= step_size * m / (tl.sqrt_rn(v) * root + eps)
        tl.store(param + i, p.to(TYPE), mask=inside)
        tl.store(exp_avg + i, m.to(TYPE), mask=inside)
        tl.store(exp_avg_sq + i, v.to(TYPE), mask=inside)
