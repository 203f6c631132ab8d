"""What all backward ops without a derivative of their own share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


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
