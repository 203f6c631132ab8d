"""What operations share of autograd: whether it is at work, and backward ops that have no derivative."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class Once(torch.autograd.Function):
    """An op that has no derivative: taking one raises, where it would be 0 unnoticed.

    A subclass has the op as its `forward`, and in `operation` what people call it.
    """

    operation: ClassVar[str]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Under functorch another class stands in for the subclass.
        name = getattr(getattr(ctx, "_forward_cls", None), "operation", "this operation of fastattn")
        raise RuntimeError(
            f"{name} has no second derivative on this backend; backend='reference' has every one"
        )


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for: without one, `apply` costs more than the op."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
