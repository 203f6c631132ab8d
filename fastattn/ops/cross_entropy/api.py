"""`fastattn.cross_entropy` and its kin: checks, the choice of a backend, the call. Speaks to people."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.cross_entropy import library, reference

_REDUCTIONS: Final = ("mean", "sum", "none")
_KL_REDUCTIONS: Final = ("batchmean", "mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of logits and class indices, as torch's, without a second tensor of the logits' size.

    With S the logits, y the target, w the classes' weights and e the label smoothing, the loss of a row is
    ``(1 - e) · w_y · (lse - S_y) + e / V · Σ w_j · (lse - S_j) + z_loss · w_y · lse²``, lse = log Σ exp S.

    Args:
        logits: ``[..., V]``, the classes last, in float32, bfloat16, float16 or float64.
        target: int64 or int32 ``[...]``.
        weight: of the classes, ``[V]``; it has no gradient.
        ignore_index: rows with this target have loss 0 and are not counted.
        reduction: ``"mean"`` (over the rows that count, by their targets' weights), ``"sum"`` or ``"none"``.
        label_smoothing: e, in [0, 1].
        softcap: c; S = c · tanh(logits / c) takes the logits' place.
        z_loss: the factor that keeps lse near 0.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None takes the best that can run this.

    Returns:
        The loss, a scalar or ``[...]``, in float32, or float64 for float64.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the backend asked for can't run this.
        IndexError: on CPU, a target that is no class.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016 (label smoothing); Chowdhery
        et al., "PaLM", JMLR 2023 (z-loss); Gemma Team, "Gemma 2", 2024 (softcap).

    Example:
        >>> import torch, fastattn
        >>> fastattn.cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)
    """
    choice.check_tensors(logits=logits, target=target, weight=weight)
    _check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected [..., V] with V >= 1, got {list(logits.shape)}")
    target = _as_target(target, logits, logits.shape[:-1], logits.shape[-1])
    options = _options(ignore_index, label_smoothing, softcap, z_loss)
    _check_reduction(reduction, _REDUCTIONS)
    weight = _as_class_weight(weight, logits)
    chosen = choice.choose(logits, backend)

    rows, flat = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if chosen == "reference":
        with choice.no_autocast(logits.device):
            loss = reference.cross_entropy(rows, flat, weight, *options)
    else:
        loss = library.cross_entropy(rows, flat, weight, *options, chosen)
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / _count(flat, ignore_index, weight).to(total.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy` of ``x @ weightᵀ + bias``, logits that are never held: a model's head and loss in one.

    The logits and their gradient are made and used up a chunk of rows at a time, in float32 (in x's dtype on
    CPUs whose own product of it is faster); the sums of the loss are always in float32. With reduction
    ``"mean"`` or ``"sum"`` forward makes the gradients at once (three matrix products in all); with
    ``"none"``, and in float16, whose small gradients need the loss's scale, backward makes the logits again.

    Args:
        x: ``[..., D]`` in float32, bfloat16, float16 or float64.
        weight: ``[V, D]`` in x's dtype.
        target: int64 or int32 ``[...]``.
        bias: ``[V]`` in x's dtype.
        ignore_index, reduction, label_smoothing, softcap, z_loss: as those of `cross_entropy`.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"`` (which does hold the logits); None takes the best.

    Returns:
        The loss, a scalar or ``[...]``, in float32, or float64 for float64.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the backend asked for can't run this.
        IndexError: on CPU, a target that is no class.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025; Hsu et al.,
        "Liger Kernel", 2024 (gradients in forward).

    Example:
        >>> import torch, fastattn
        >>> x, head = torch.ones(2, 3), torch.zeros(4, 3)
        >>> fastattn.linear_cross_entropy(x, head, torch.tensor([1, 0]))
        tensor(1.3863)
    """
    choice.check_tensors(x=x, weight=weight, target=target, bias=bias)
    x, weight, bias = choice.autocast(x, weight, bias)
    _check_linear("x", x, "weight", weight)
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    _check_alike("x", x, weight=weight, bias=bias)
    target = _as_target(target, x, x.shape[:-1], weight.shape[0])
    options = _options(ignore_index, label_smoothing, softcap, z_loss)
    _check_reduction(reduction, _REDUCTIONS)
    chosen = choice.choose(x, backend)

    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    count = _count(flat, ignore_index) if reduction == "mean" else None
    if chosen == "reference":
        with choice.no_autocast(x.device):
            loss = reference.linear_cross_entropy(rows, weight, flat, bias, *options)
        return _reduced(loss, reduction, count, target)
    share = _share(reduction, count, flat)
    loss = library.linear_loss("linear_cross_entropy", share, (*options, chosen), rows, weight, flat, bias)
    if reduction == "mean" and rows.shape[0] == 0:
        loss = loss + torch.nan
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_kl_div(
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """Distillation from a teacher's head into a student's without either's logits: KL(teacher || student).

    With t = teacher_x @ teacher_weightᵀ, s = student_x @ student_weightᵀ, p = softmax(t / T) and
    q = softmax(s / T), the loss of a row is ``T² · Σ p_j · (log p_j - log q_j)``: times T², so that its
    gradient does not shrink with T.

    Args:
        student_x: ``[..., D]`` in float32, bfloat16, float16 or float64.
        student_weight: ``[V, D]`` in that dtype.
        teacher_x: ``[..., D_teacher]`` in that dtype; neither it nor the next may require a gradient.
        teacher_weight: ``[V, D_teacher]`` in that dtype.
        mask: bool ``[...]``, True for the rows that count; all if None. Where none does, the loss is 0.
        temperature: T > 0.
        reduction: ``"batchmean"`` (the mean over the rows that count), ``"mean"`` (over their V classes too,
            as torch's `kl_div` means it), ``"sum"`` or ``"none"`` (the loss of each row).
        backend: ``"cpu"``, ``"triton"`` or ``"reference"`` (which does hold the logits); None takes the best.

    Returns:
        The loss, a scalar or ``[...]``, in float32, or float64 for float64.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the backend asked for can't run this.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    Example:
        >>> import torch, fastattn
        >>> x, head = torch.ones(2, 3), torch.eye(3)
        >>> fastattn.linear_kl_div(x, head, torch.ones(2, 5), torch.zeros(3, 5), temperature=2.0)
        tensor(0.)
    """
    tensors = {
        "student_x": student_x,
        "student_weight": student_weight,
        "teacher_x": teacher_x,
        "teacher_weight": teacher_weight,
    }
    choice.check_tensors(**tensors, mask=mask)
    for name in ("teacher_x", "teacher_weight"):
        if torch.is_grad_enabled() and tensors[name].requires_grad:
            raise ValueError(
                f"{name}: expected one that requires no gradient, got one that does: .detach() it"
            )
    student_x, student_weight, teacher_x, teacher_weight = choice.autocast(*tensors.values())
    _check_linear("student_x", student_x, "student_weight", student_weight)
    _check_linear("teacher_x", teacher_x, "teacher_weight", teacher_weight)
    _check_alike(
        "student_x",
        student_x,
        student_weight=student_weight,
        teacher_x=teacher_x,
        teacher_weight=teacher_weight,
    )
    if teacher_x.shape[:-1] != student_x.shape[:-1]:
        raise ValueError(
            f"teacher_x: expected [{_sizes(student_x.shape[:-1])}, D_teacher], got {list(teacher_x.shape)}"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected {student_weight.shape[0]} classes, as the student's, "
            f"got {teacher_weight.shape[0]}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student_x.shape[:-1]):
        raise ValueError(
            f"mask: expected bool {list(student_x.shape[:-1])}, got {mask.dtype} {list(mask.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    _check_reduction(reduction, _KL_REDUCTIONS)
    chosen = choice.choose(student_x, backend)

    rows = student_x.reshape(-1, student_x.shape[-1])
    of_teacher = teacher_x.reshape(-1, teacher_x.shape[-1])
    kept = torch.ones_like(rows[:, 0], dtype=torch.bool) if mask is None else mask.reshape(-1)
    per_class = student_weight.shape[0] if reduction == "mean" else 1
    count = kept.sum().clamp(min=1) * per_class if reduction in ("mean", "batchmean") else None
    share = None if reduction == "none" else kept.to(torch.float32) / (1 if count is None else count)
    given = (rows, student_weight, of_teacher, teacher_weight)
    if chosen == "reference":
        with choice.no_autocast(student_x.device):
            loss = reference.linear_kl_div(*given, temperature)
        loss = loss.masked_fill(~kept, 0)
        return _reduced(loss, reduction, count, student_x[..., 0])
    loss = library.linear_loss("linear_kl_div", share, (temperature, chosen), *given)
    return loss.masked_fill(~kept, 0).reshape(student_x.shape[:-1]) if reduction == "none" else loss


class _Options(NamedTuple):
    """As the ops take them."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


def _options(ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float) -> _Options:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss: expected a number that is not negative, got {z_loss}")
    return _Options(ignore_index, label_smoothing, softcap or 0.0, z_loss)


def _as_target(target: Tensor, x: Tensor, shape: torch.Size, classes: int) -> Tensor:
    """int64."""
    if target.is_floating_point():
        raise ValueError(
            f"target: expected class indices (int64), got {target.dtype}; "
            "probabilities are for torch.nn.functional.cross_entropy"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target: expected int64 or int32, got {target.dtype}")
    if target.shape != shape:
        hint = ""
        if x.dim() > 2 and target.shape == x.shape[:1] + x.shape[2:]:
            hint = "; torch's [N, V, ...] is logits.movedim(1, -1) here"
        raise ValueError(
            f"target: expected {list(shape)} for {list(x.shape)}, got {list(target.shape)}{hint}"
        )
    if target.device != x.device:
        raise ValueError(f"target: expected it on {x.device}, got {target.device}")
    return target if target.dtype == torch.int64 else target.long()


def _as_class_weight(weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """In float32, or wider."""
    if weight is None:
        return None
    if list(weight.shape) != [logits.shape[-1]] or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating [{logits.shape[-1]}], got {weight.dtype} {list(weight.shape)}"
        )
    if weight.device != logits.device:
        raise ValueError(f"weight: expected it on {logits.device}, got {weight.device}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight: expected one that requires no gradient, got one that does: .detach() it")
    return weight.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def _check_linear(x_name: str, x: Tensor, name: str, weight: Tensor) -> None:
    _check_floating(x_name, x)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"{name}: expected [V, {x.shape[-1] if x.dim() else 'D'}] for {x_name} {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )


def _check_alike(name: str, x: Tensor, **others: Tensor | None) -> None:
    for label, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(
                f"{label}: expected {x.dtype} on {x.device}, as {name}, got {other.dtype} on {other.device}"
            )


def _check_reduction(reduction: str, known: tuple[str, ...]) -> None:
    if reduction not in known:
        raise ValueError(f"reduction: expected one of {list(known)}, got {reduction!r}")


def _count(target: Tensor, ignore_index: int, weight: Tensor | None = None) -> Tensor:
    """How many rows count, or the sum of the weights of their targets."""
    ignored = target == ignore_index
    if weight is None:
        return (~ignored).sum()
    return weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()


def _share(reduction: str, count: Tensor | None, target: Tensor) -> Tensor | None:
    """What each row's loss is multiplied by in the sum; None where there is none."""
    if reduction == "none":
        return None
    one = torch.ones((), dtype=torch.float32, device=target.device)
    return (one if count is None else one / count).expand(target.shape)


def _reduced(loss: Tensor, reduction: str, count: Tensor | None, like: Tensor) -> Tensor:
    if reduction == "none":
        return loss.reshape(like.shape)
    total = loss.sum()
    return total if count is None else total / count.to(total.dtype)


def _sizes(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))
