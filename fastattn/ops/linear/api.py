"""`fastattn.linear`: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.linear import library, reference

# Floating-point operations: for fewer, calling an operation that is written in Python takes longer than there
# is to be won.
_FEW: Final = 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``x @ weightᵀ + bias``, as `torch.nn.functional.linear` does, by the faster of two matrix products.

    On CPU a shape that is met for the first time is measured: our packed, register-tiled product against that
    of torch's BLAS, and the faster is kept for the process (FASTATTN_GEMM=ours or torch settles it without).
    `explain(linear, x, weight)` tells which it was, and by how much.

    Args:
        x: ``[..., in_features]``; float32, bfloat16, float16, or float64 for the reference.
        weight: ``[out_features, in_features]``, of x's dtype; any strides, so that the transpose of an
            ``[in, out]`` weight costs no copy. Its gradient is laid out as it is.
        bias: ``[out_features]`` of x's dtype, or None.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"`` (torch's own); the best that can if None.

    Returns:
        ``[..., out_features]`` in x's dtype; accumulated in float32.

    Raises:
        TypeError: not tensors.
        ValueError: shapes, dtypes or devices that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.

    Example:
        >>> import torch, fastattn
        >>> fastattn.linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4))
        tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]])
    """
    choice.require_tensors(x=x, weight=weight)
    choice.check_tensors(bias=bias)
    x, weight, bias = choice.autocast(x, weight, bias)
    check_linear(x, weight, bias)
    chosen = choice.choose(x, backend, _against(x, weight), lambda: _notes(x, weight))
    if chosen == "reference":
        with choice.no_autocast(x.device):
            return reference.linear(x, weight, bias)
    out: Tensor = library.Linear.apply(as_rows(x), weight, bias, chosen)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
    """Raise unless x, a weight called `name` and its bias fit together."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected [out_features, {x.shape[-1] if x.dim() else 'in_features'}] "
            f"for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias of {name}: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for label, other in ((name, weight), (f"bias of {name}", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(
                f"{label}: expected {x.dtype} on {x.device}, as x, got {other.dtype} on {other.device}"
            )
    if not x.is_floating_point():
        raise ValueError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def as_rows(x: Tensor) -> Tensor:
    """``[rows, x.shape[-1]]``. The rows are counted: nothing can be inferred where there are no columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _against(x: Tensor, weight: Tensor) -> list[choice.Against]:
    if not x.is_cpu:
        reason = "torch's own product is at least as fast here, unless this is asked for"
        return [choice.Against("triton", reason, for_all=False)]
    # Not while compiling: a graph would be for one side of the limit. Of 16 bits torch's may be far slower.
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return []
    if 2 * x.numel() * weight.shape[0] < _FEW:
        reason = f"torch's own is as fast for fewer than {_FEW} operations, unless this is asked for"
        return [choice.Against("cpu", reason, for_all=False)]
    return []


def _notes(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return ()
    from fastattn.ops.linear import measured  # noqa: PLC0415

    rows = as_rows(x)
    return (measured.known(rows, weight.t(), rows[:0]),)
