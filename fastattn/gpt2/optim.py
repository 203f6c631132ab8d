"""The optimizer of a GPT-2 run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastattn.optim import AdamW


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
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    ours: bool = False,
) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`.

    Args:
        model: any.
        lr: learning rate.
        weight_decay: of matrices and embeddings.
        betas: of the two moments.
        ours: `fastattn.optim.AdamW`, which clips too, rather than torch's.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    groups = parameter_groups(model, weight_decay)
    if ours:
        return AdamW(groups, lr=lr, betas=betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def clip_and_step(model: nn.Module, optimizer: torch.optim.AdamW, max_norm: float) -> float:
    """A step of `optimizer` by gradients scaled down to `max_norm` together; returns their norm before.

    Args:
        model: of the parameters.
        optimizer: of `make_optimizer`.
        max_norm: the largest norm; `math.inf` for any.

    Raises:
        FloatingPointError: the norm is not finite. The parameters are then as before, but on a GPU where the
            optimizer clips in its own pass, which has made them NaN.
    """
    if isinstance(optimizer, AdamW):
        optimizer.max_norm = max_norm
        optimizer.step()
        assert optimizer.grad_norm is not None
        norm = float(optimizer.grad_norm)
    else:
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        if math.isfinite(norm):
            optimizer.step()
    if not math.isfinite(norm):
        raise FloatingPointError(f"expected a finite gradient, got gradient norm {norm}")
    return norm


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
