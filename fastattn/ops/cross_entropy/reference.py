"""The losses as torch computes them from whole logits: any device, any dtype, autograd by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """The loss of each row.

    Args:
        logits: ``[N, V]``.
        target: int64 ``[N]``.
        weight: of the classes, ``[V]``.
        softcap: 0 for none.

    Returns:
        ``[N]``, in float32 or logits' dtype if that is wider; 0 where the target is `ignore_index`.
    """
    s = logits.to(_wide(logits.dtype))
    w = s.new_ones(s.shape[1]) if weight is None else weight.to(s.dtype)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    log_p = F.log_softmax(s, -1)

    loss = (1 - label_smoothing) * F.nll_loss(log_p, target, w, ignore_index=ignore_index, reduction="none")
    ignored = target == ignore_index
    if label_smoothing:
        loss = loss - label_smoothing / s.shape[1] * (log_p @ w).masked_fill(ignored, 0)
    if z_loss:
        w_y = w[target.masked_fill(ignored, 0)]
        loss = loss + z_loss * (w_y * torch.logsumexp(s, -1) ** 2).masked_fill(ignored, 0)
    return loss


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: float
) -> Tensor:
    """The loss of each row, of ``x @ weightᵀ + bias``.

    Args:
        x: ``[N, D]``.
        weight: ``[V, D]``.
        target: int64 ``[N]``.
        bias: ``[V]``.
        options: those of `cross_entropy` from `ignore_index` on.
    """
    wide = _wide(x.dtype)
    logits = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy(logits, target, None, *options)  # type: ignore[arg-type]


def linear_kl_div(
    student_x: Tensor, student_weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """``T² · KL(softmax(t / T) || softmax(s / T))`` of each row, t and s the products of x and weightᵀ.

    Args:
        student_x: ``[N, D]``.
        student_weight: ``[V, D]``.
        teacher_x: ``[N, D_teacher]``.
        teacher_weight: ``[V, D_teacher]``.
        temperature: T.

    Returns:
        ``[N]``, in float32 or the student's dtype if that is wider.
    """
    wide = _wide(student_x.dtype)
    log_q, log_p = (
        F.log_softmax(F.linear(x.to(wide), weight.to(wide)) / temperature, -1)
        for x, weight in ((student_x, student_weight), (teacher_x, teacher_weight))
    )
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if it is wider."""
    return torch.promote_types(dtype, torch.float32)
