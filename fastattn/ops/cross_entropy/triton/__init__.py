"""Cross entropy by Triton's kernels: NVIDIA's sm_80 and newer, and AMD; CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops.cross_entropy.chunks import Chunks, Gradients
from fastattn.ops.cross_entropy.targets import check_targets
from fastattn.ops.cross_entropy.triton.products import matmul
from fastattn.ops.cross_entropy.triton.rows import cross_entropy_rows, kl_div_rows

__all__ = ["backward", "forward", "linear_cross_entropy", "linear_kl_div"]

# The logits of a chunk in float32: rows enough to fill the device with tiles of a product.
_LOGITS_BYTES: Final = 256 << 20


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *options: float
) -> tuple[Tensor, Tensor]:
    """`fastattn::cross_entropy_forward` by Triton's kernels."""
    check_targets(target, logits.shape[1], ignore_index)
    loss, lse = (logits.new_empty((logits.shape[0],), dtype=torch.float32) for _ in range(2))
    cross_entropy_rows(logits, target, weight, None, (ignore_index, *options), loss, lse, None)
    return loss, lse


def backward(
    dloss: Tensor, lse: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, *options: float
) -> Tensor:
    """`fastattn::cross_entropy_backward` by Triton's kernels."""
    dlogits = logits.new_empty(logits.shape)
    cross_entropy_rows(logits, target, weight, dloss, options, None, lse, dlogits)
    return dlogits


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """`fastattn::linear_cross_entropy`: products by torch's BLAS, passes over logits by Triton's kernels."""
    *options, wanted = rest
    check_targets(target, weight.shape[0], ignore_index)
    (rows, _), classes = x.shape, weight.shape[0]
    chunks = Chunks(rows, _LOGITS_BYTES // (4 * classes))
    buffer = x.new_empty((chunks.size, classes), dtype=torch.float32)
    of_buffer = _gradient_buffer(buffer, x, wanted)
    loss, lse = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    grads = Gradients(x, weight, chunks.count, wanted, matmul)
    for chunk in chunks:
        size = chunk.stop - chunk.start
        logits = matmul(x[chunk], weight.t(), buffer[:size], bias=bias)
        dlogits = None if of_buffer is None else of_buffer[:size]
        of_chunk = None if dloss is None else dloss[chunk]
        out = (loss[chunk], lse[chunk], dlogits)
        cross_entropy_rows(logits, target[chunk], None, of_chunk, (ignore_index, *options), *out)
        if dlogits is not None:
            grads.add(chunk, dlogits)
    return loss, *grads.all()


def linear_kl_div(
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    dloss: Tensor | None,
    temperature: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """`fastattn::linear_kl_div`, as `linear_cross_entropy`."""
    rows, classes = student_x.shape[0], student_weight.shape[0]
    chunks = Chunks(rows, _LOGITS_BYTES // (2 * 4 * classes))
    buffers = student_x.new_empty((2, chunks.size, classes), dtype=torch.float32)
    of_buffer = _gradient_buffer(buffers[0], student_x, wanted)
    loss = student_x.new_empty((rows,), dtype=torch.float32)
    grads = Gradients(student_x, student_weight, chunks.count, wanted, matmul)
    for chunk in chunks:
        size = chunk.stop - chunk.start
        student = matmul(student_x[chunk], student_weight.t(), buffers[0, :size])
        teacher = matmul(teacher_x[chunk], teacher_weight.t(), buffers[1, :size])
        dlogits = None if of_buffer is None else of_buffer[:size]
        of_chunk = None if dloss is None else dloss[chunk]
        kl_div_rows(student, teacher, of_chunk, temperature, loss[chunk], dlogits)
        if dlogits is not None:
            grads.add(chunk, dlogits)
    return loss, *grads.all()[:2]


def _gradient_buffer(logits: Tensor, x: Tensor, wanted: int) -> Tensor | None:
    """For the logits' gradients, in x's dtype, which the products then take; their own place if it can."""
    if not wanted:
        return None
    return logits if x.dtype == logits.dtype else logits.new_empty(logits.shape, dtype=x.dtype)
