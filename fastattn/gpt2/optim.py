"""The optimizer of a GPT-2 run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices and embeddings decay, biases and norms do not.

    Args:
        model: any; tied parameters count once.
        weight_decay: of the first group.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3), 0.1)]
        [1, 1]
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, floor: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to ``floor · peak`` at the last step.

    Args:
        step: 0 to ``steps - 1``.
        peak: the highest.
        warmup: steps until it is reached.
        steps: of the whole run.
        floor: share of the peak at the end.

    Example:
        >>> [round(learning_rate(s, peak=1.0, warmup=2, steps=5, floor=0.1), 3) for s in range(5)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(1, steps - 1 - warmup), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
