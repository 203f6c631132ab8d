"""Cross entropy by the C++ kernels: products by ours or torch's, passes over rows of logits by ours."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.cross_entropy.chunks import Chunks, Gradients, MatMul
from fastattn.ops.cross_entropy.targets import check_targets
from fastattn.ops.linear import measured
from fastattn.ops.linear.cpu import gemm, matmul

# The logits of a chunk in float32: enough rows that packing the weight anew for each is of no account.
_LOGITS_BYTES: Final = 64 << 20
_PRODUCT_ROWS: Final = 8192


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *options: float
) -> tuple[Tensor, Tensor]:
    """`fastattn::cross_entropy_forward` on CPU."""
    _backends.require("cpu")
    check_targets(target, logits.shape[1], ignore_index)
    loss, lse = (logits.new_empty((logits.shape[0],), dtype=torch.float32) for _ in range(2))
    _rows(_unit_last(logits), target, weight, None, (ignore_index, *options), loss, lse, None)
    return loss, lse


def backward(
    dloss: Tensor, lse: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, *options: float
) -> Tensor:
    """`fastattn::cross_entropy_backward` on CPU."""
    _backends.require("cpu")
    dlogits = logits.new_empty(logits.shape)
    _rows(_unit_last(logits), target, weight, dloss, options, None, lse, dlogits)
    return dlogits


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    options: tuple[float, ...],
    loss: Tensor | None,
    lse: Tensor,
    dlogits: Tensor | None,
) -> None:
    isa = _backends.cpu_isa_id()
    torch.ops.fastattn_cpu.cross_entropy(
        logits, target.contiguous(), weight, dloss, *options, isa, loss, lse, dlogits
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """`fastattn::linear_cross_entropy` on CPU: rows that are ignored are left out beforehand."""
    _backends.require("cpu")
    check_targets(target, weight.shape[0], ignore_index)
    ignored = target == ignore_index
    if not bool(ignored.any()):
        return _linear_cross_entropy(x, weight, target, bias, dloss, ignore_index, *options)
    kept = ignored.logical_not_().nonzero().flatten()
    of_kept = None if dloss is None else dloss[kept]
    loss, dx, *grads = _linear_cross_entropy(
        x[kept], weight, target[kept], bias, of_kept, ignore_index, *options
    )
    if dx.dim() == 2:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(0, kept, dx)
    return loss.new_zeros(target.shape).index_copy_(0, kept, loss), dx, *grads


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, dloss: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, wanted = rest
    (rows, _), classes = x.shape, weight.shape[0]
    x, weight = _unit(x), _unit(weight)
    product, dtype = _product(x, weight)
    chunks = Chunks(rows, _LOGITS_BYTES // (dtype.itemsize * classes))
    buffer = x.new_empty((chunks.size, classes), dtype=dtype)
    loss, lse = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    grads = Gradients(x, weight, chunks.count, wanted, product)
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        product(x[chunk], weight.t(), logits, bias=bias)
        of_chunk = dloss[chunk] if wanted and dloss is not None else None
        dlogits = logits if wanted else None
        _rows(logits, target[chunk], None, of_chunk, tuple(options), loss[chunk], lse[chunk], dlogits)
        if wanted:
            grads.add(chunk, logits)
    return loss, *grads.all()


def _product(x: Tensor, weight: Tensor) -> tuple[MatMul, torch.dtype]:
    """What multiplies, and the logits' dtype: float32, or x's where torch's product of it is faster."""
    if x.dtype == torch.float32 or measured.choice(x, weight.t(), x, gemm).ours:
        return matmul, torch.float32
    return _torchs_product, x.dtype


def _torchs_product(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """As `matmul`; of 16 bits into float32 some rows at a time, for torch has that into 16 bits alone."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    if not accumulate:
        out.zero_()
    for rows, of_a in zip(out.split(_PRODUCT_ROWS), a.split(_PRODUCT_ROWS), strict=True):
        rows.add_(of_a @ b)
    return out


def linear_kl_div(
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    dloss: Tensor | None,
    temperature: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """`fastattn::linear_kl_div` on CPU."""
    _backends.require("cpu")
    isa = _backends.cpu_isa_id()
    rows, classes = student_x.shape[0], student_weight.shape[0]
    student_x, student_weight = _unit(student_x), _unit(student_weight)
    teacher_x, teacher_weight = _unit(teacher_x), _unit(teacher_weight)
    chunks = Chunks(rows, _LOGITS_BYTES // (2 * 4 * classes))
    buffers = student_x.new_empty((2, chunks.size, classes), dtype=torch.float32)
    loss = student_x.new_empty((rows,), dtype=torch.float32)
    grads = Gradients(student_x, student_weight, chunks.count, wanted, matmul)
    for chunk in chunks:
        student, teacher = buffers[:, : chunk.stop - chunk.start]
        matmul(student_x[chunk], student_weight.t(), student)
        matmul(teacher_x[chunk], teacher_weight.t(), teacher)
        of_chunk = dloss[chunk] if wanted and dloss is not None else None
        torch.ops.fastattn_cpu.kl_div(student, teacher, of_chunk, temperature, isa, loss[chunk])
        if wanted:
            grads.add(chunk, student)
    return loss, *grads.all()[:2]


def _unit_last(x: Tensor) -> Tensor:
    """A matrix whose rows have a unit stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _unit(x: Tensor) -> Tensor:
    """A matrix one of whose strides is 1."""
    return x if 1 in x.stride() else x.contiguous()
