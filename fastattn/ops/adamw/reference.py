"""AdamW as its equations, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """`fastattn.ops.adamw.adamw_step`; rounded to the tensors' dtype once, from float32 or wider."""
    beta1, beta2 = betas
    for p, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = torch.promote_types(p.dtype, torch.float32)
        g_ = g.to(wide) * factor
        m_ = beta1 * m.to(wide) + (1 - beta1) * g_
        v_ = beta2 * v.to(wide) + (1 - beta2) * g_ * g_
        unbiased_m, unbiased_v = m_ / (1 - beta1 ** t.item()), v_ / (1 - beta2 ** t.item())
        p.copy_((1 - lr * weight_decay) * p.to(wide) - lr * unbiased_m / (unbiased_v.sqrt() + eps))
        m.copy_(m_)
        v.copy_(v_)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`fastattn.ops.adamw.total_norm`."""
    return torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt().float()
