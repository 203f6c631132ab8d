"""The losses in plain PyTorch, from whole logits in one dtype, and how far ours are from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.testing import Errors, assert_within_budget, force_isa, present_isas

BACKENDS = ["reference", "triton", *(f"cpu-{isa}" for isa in present_isas())]


@contextmanager
def using(name: str) -> Iterator[str]:
    """The backend of one of BACKENDS, on its instruction set."""
    backend, _, isa = name.partition("-")
    if backend == "triton":
        pytest.importorskip("triton")
    if not isa:
        yield backend
        return
    with force_isa(isa):
        yield backend


def textbook(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`fastattn.cross_entropy` out of torch's own."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits, flat = logits.flatten(0, -2), target.flatten()
    if weight is not None:
        weight = weight.to(logits.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(logits, flat, weight, reduction="none", **options)
    ignored = flat == ignore_index
    w = torch.ones_like(loss) if weight is None else weight[flat.masked_fill(ignored, 0)]
    w = w.masked_fill(ignored, 0)
    if z_loss:
        loss = loss + z_loss * w * torch.logsumexp(logits, -1) ** 2
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / w.sum()


def textbook_kl_div(
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """`fastattn.linear_kl_div` out of torch's own."""
    teacher_x, teacher_weight = teacher_x.to(student_x.dtype), teacher_weight.to(student_x.dtype)
    log_q = F.log_softmax(F.linear(student_x, student_weight) / temperature, -1)
    log_p = F.log_softmax(F.linear(teacher_x, teacher_weight) / temperature, -1)
    each = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if mask is not None:
        each = each * mask[..., None]
    rows = log_q[..., 0].numel() if mask is None else int(mask.sum())
    if reduction == "none":
        return each.sum(-1)
    return each.sum() / {"sum": 1, "batchmean": rows, "mean": rows * log_q.shape[-1]}[reduction]


def assert_right(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    rounded: bool = False,
) -> None:
    """Loss and every gradient within the error budget.

    Args:
        ours, plain: take the tensors by name.
        tensors: in float64; of which gradients are taken.
        dtype: what ours and plain are given them in.
        rounded: ours rounds logits to that dtype, so that its loss in float32 has their rounding.
    """

    def results(function: Callable[..., Tensor], given: torch.dtype) -> list[Tensor]:
        # What a dtype can't hold is no error of ours.
        leaves = {name: x.to(dtype).to(given).requires_grad_() for name, x in tensors.items()}
        loss = function(**leaves)
        g = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
        (loss.double() * g).sum().backward()
        return [loss.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]

    found, near = results(ours, dtype), results(plain, dtype)
    exact = results(plain, torch.float64)
    names = ["loss", *("d" + name for name in tensors)]
    assert len(found) == len(near) == len(exact) == len(names)
    scale = max(float(x.abs().max()) for x in exact)
    assert_within_budget(
        [
            Errors(
                name,
                _distance(a, c),
                _distance(b, c),
                float(c.abs().max()),
                dtype if rounded else a.dtype,
                scale,
            )
            for name, a, b, c in zip(names, found, near, exact, strict=True)
        ]
    )


def _distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b).abs().max())
