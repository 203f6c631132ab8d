"""Loss and gradient of rows of logits: a program for each, one pass for statistics, one for the gradient.

Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import gpu
from fastattn.ops.attention.triton.tile import INF, LN2, LOG2E, tanh

_BLOCK: Final = 4096
_WARPS: Final = 8


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    options: Sequence[float],
    loss: Tensor | None,
    lse: Tensor,
    dlogits: Tensor | None,
) -> None:
    """`loss` and `lse` of each row, or with no `loss` given, `lse` is read; and `dlogits` if there is one.

    Args:
        logits: ``[N, V]``.
        target: int64 ``[N]``.
        weight: of the classes, float32 ``[V]``.
        dloss: float32 ``[N]``.
        options: ignore_index, label_smoothing, softcap, z_loss.
        loss, lse: float32 ``[N]``.
        dlogits: ``[N, V]``, may be logits.
    """
    rows, classes = logits.shape
    if rows == 0:
        return
    ignore_index, label_smoothing, softcap, z_loss = options
    with gpu.on(logits.device):
        _cross_entropy[(rows,)](
            _unit_last(logits),
            target.contiguous(),
            weight,
            None if weight is None else weight.sum(),
            dloss if dlogits is not None else None,
            loss,
            lse,
            dlogits,
            _unit_last(logits).stride(0),
            0 if dlogits is None else dlogits.stride(0),
            0 if dloss is None else dloss.stride(0),
            classes,
            ignore_index,
            label_smoothing,
            softcap,
            z_loss,
            SMOOTHED=label_smoothing != 0,
            CAPPED=softcap != 0,
            BLOCK=_block(classes),
            num_warps=_WARPS,
        )


@triton.jit(do_not_specialize=["classes", "ignore_index"])
def _cross_entropy(
    logits,
    target,
    weight,
    weight_sum,
    dloss,
    loss,
    lse,
    dlogits,
    stride,
    dlogits_stride,
    dloss_stride,
    classes,
    ignore_index,
    label_smoothing,
    softcap,
    z_loss,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    y = tl.load(target + row)
    counts = y != ignore_index
    y = tl.where(counts, y, 0)
    s_y = _score(tl.load(logits + y).to(tl.float32), softcap, CAPPED)
    w_y = 1.0
    total = classes.to(tl.float32)
    if weight is not None:
        w_y = tl.load(weight + y)
        total = tl.load(weight_sum)
    flat = label_smoothing / classes

    if loss is not None:
        # log Σ exp S, and Σ w · S
        peak = -INF
        sum_ = 0.0
        weighted = 0.0
        for begin in range(0, classes, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            there = j < classes
            s = _score(tl.load(logits + j, mask=there, other=0.0).to(tl.float32), softcap, CAPPED)
            if SMOOTHED:
                weighted += tl.sum(tl.where(there, s * _class_weight(weight, j, there), 0.0), 0)
            sum_, peak = _add_exp(sum_, peak, tl.where(there, s, -INF), LOG2E)
        lse_ = _log(sum_, peak, 1.0)
        loss_ = (1.0 - label_smoothing) * w_y * (lse_ - s_y) + z_loss * w_y * lse_ * lse_
        if SMOOTHED:
            loss_ += flat * (total * lse_ - weighted)
        tl.store(loss + row, tl.where(counts, loss_, 0.0))
        tl.store(lse + row, lse_)
    else:
        lse_ = tl.load(lse + row)

    if dlogits is not None:
        # dS_j = dloss · (a · exp(S_j - lse) - e / V · w_j - [j = y] · (1 - e) · w_y)
        g = tl.load(dloss + row * dloss_stride)
        a = (1.0 - label_smoothing) * w_y + flat * total + 2.0 * z_loss * w_y * lse_
        dlogits += row * dlogits_stride
        for begin in range(0, classes, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            there = j < classes
            s = _score(tl.load(logits + j, mask=there, other=0.0).to(tl.float32), softcap, CAPPED)
            ds = a * tl.exp2((s - lse_) * LOG2E) - tl.where(j == y, (1.0 - label_smoothing) * w_y, 0.0)
            if SMOOTHED:
                ds -= flat * _class_weight(weight, j, there)
            if CAPPED:
                ds *= 1.0 - s * s / (softcap * softcap)
            ds = tl.where(counts, g * ds, 0.0)
            tl.store(dlogits + j, ds.to(dlogits.dtype.element_ty), mask=there)


@triton.jit
def _score(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        x = softcap * tanh(x / softcap, True)
    return x


@triton.jit
def _class_weight(weight, j, there):
    if weight is None:
        w = tl.full(j.shape, 1.0, tl.float32)
    else:
        w = tl.load(weight + j, mask=there, other=0.0)
    return w


@triton.jit
def _add_exp(sum_, peak, s, factor):
    """Σ 2^(factor · (S - peak)) and the peak of S, with a block more."""
    new = tl.maximum(peak, tl.max(s, 0))
    # A row of -inf alone must not come to exp2(-inf + inf).
    base = tl.where(new == -INF, 0.0, new)
    return sum_ * tl.exp2((peak - base) * factor) + tl.sum(tl.exp2((s - base) * factor), 0), new


@triton.jit
def _log(sum_, peak, over_t):
    """The natural logarithm of what `_add_exp` summed up."""
    return tl.where(peak == -INF, 0.0, peak) * over_t + tl.log2(sum_) * LN2


def kl_div_rows(
    student: Tensor,
    teacher: Tensor,
    dloss: Tensor | None,
    temperature: float,
    loss: Tensor,
    dlogits: Tensor | None,
) -> None:
    """``T² · KL(softmax(t / T) || softmax(s / T))`` of each row, and ``dloss · T · (q - p)`` if wanted.

    Args:
        student, teacher: float32 ``[N, V]``.
        dloss: float32 ``[N]``.
        temperature: T.
        loss: float32 ``[N]``.
        dlogits: ``[N, V]``, may be student.
    """
    rows, classes = student.shape
    if rows == 0:
        return
    with gpu.on(student.device):
        _kl_div[(rows,)](
            student,
            teacher,
            dloss if dlogits is not None else None,
            loss,
            dlogits,
            student.stride(0),
            teacher.stride(0),
            0 if dlogits is None else dlogits.stride(0),
            0 if dloss is None else dloss.stride(0),
            classes,
            temperature,
            BLOCK=_block(classes) // 2,
            num_warps=_WARPS,
        )


@triton.jit(do_not_specialize=["classes"])
def _kl_div(
    student,
    teacher,
    dloss,
    loss,
    dlogits,
    student_stride,
    teacher_stride,
    dlogits_stride,
    dloss_stride,
    classes,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    over_t = 1.0 / temperature
    factor = over_t * LOG2E
    s_peak = -INF
    t_peak = -INF
    s_sum = 0.0
    t_sum = 0.0
    cross = 0.0  # Σ p · (t - s), as t_sum
    for begin in range(0, classes, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        there = j < classes
        s = tl.load(student + j, mask=there, other=0.0)
        t = tl.load(teacher + j, mask=there, other=0.0)
        s_sum, s_peak = _add_exp(s_sum, s_peak, tl.where(there, s, -INF), factor)
        before = tl.where(t_peak == -INF, 0.0, t_peak)
        t_sum, t_peak = _add_exp(t_sum, t_peak, tl.where(there, t, -INF), factor)
        base = tl.where(t_peak == -INF, 0.0, t_peak)
        p = tl.where(there, tl.exp2((t - base) * factor), 0.0)
        cross = cross * tl.exp2((before - base) * factor) + tl.sum(tl.where(p == 0.0, 0.0, p * (t - s)), 0)
    s_lse = _log(s_sum, s_peak, over_t)
    t_lse = _log(t_sum, t_peak, over_t)
    tl.store(loss + row, temperature * temperature * (cross / t_sum * over_t - t_lse + s_lse))

    if dlogits is not None:
        g = tl.load(dloss + row * dloss_stride) * temperature
        dlogits += row * dlogits_stride
        for begin in range(0, classes, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            there = j < classes
            s = tl.load(student + j, mask=there, other=0.0)
            t = tl.load(teacher + j, mask=there, other=0.0)
            ds = g * (tl.exp2((s * over_t - s_lse) * LOG2E) - tl.exp2((t * over_t - t_lse) * LOG2E))
            # A row that does not count may hold anything.
            ds = tl.where(g == 0.0, 0.0, ds)
            tl.store(dlogits + j, ds.to(dlogits.dtype.element_ty), mask=there)


def _block(classes: int) -> int:
    return max(16, min(_BLOCK, gpu.power_of_two(classes)))


def _unit_last(x: Tensor) -> Tensor:
    """A matrix whose rows have a unit stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
