"""The rotation as a torch op: schema, fake, gradient, vmap. Speaks to torch, computes nothing."""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
from torch import Tensor

# x [B, H, L, D]; positions int64 [B or 1, L], or those from `start` on; `inverse` turns back.
torch.library.define(
    "fastattn::rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt start, bool interleaved, bool inverse, "
    "str backend) -> Tensor",
)
# A position that turns nothing. As in csrc/rotary/problem.h.
UNTURNED: Final = -(2**63)

# Which module computes for which `backend`; imported when the op first runs on it.
_KERNELS: Final = {"cpu": "fastattn.ops.rotary.cpu", "triton": "fastattn.ops.rotary.triton"}


@torch.library.impl("fastattn::rotary", ("cpu", "cuda"))
def _rotary(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = importlib.import_module(_KERNELS[args[-1]]).rotary(x, *args[:-1])
    return out


@torch.library.register_fake("fastattn::rotary")
def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


class Rotary(torch.autograd.Function):
    """Gradient of `fastattn::rotary` in x: the inverse rotation, which is differentiable as well."""

    @staticmethod
    def forward(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        start: int,
        interleaved: bool,
        inverse: bool,
        backend: str,
    ) -> Tensor:
        return torch.ops.fastattn.rotary(  # type: ignore[no-any-return]
            x, cos, sin, positions, start, interleaved, inverse, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, positions, *ctx.options = inputs
        ctx.save_for_backward(cos, sin, positions)
        ctx.save_for_forward(cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        start, interleaved, inverse, backend = ctx.options
        dx = rotary(dout, *ctx.saved_tensors, start, interleaved, not inverse, backend)
        return dx, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *others: Any) -> Tensor:
        """The rotation is linear in x."""
        return rotary(dx, *ctx.saved_tensors, *ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *args: Any) -> tuple[Tensor, int]:
        """Fold the mapped axis into the batch."""
        cos, sin, positions, *options = args
        size = info.batch_size
        x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if positions is not None:
            mapped = in_dims[3] is not None
            positions = positions.movedim(in_dims[3], 0) if mapped else positions[None]
            if mapped or positions.shape[1] > 1:
                positions = positions.expand(size, x.shape[1], x.shape[3]).flatten(0, 1)
            else:
                positions = positions[0]
        out = rotary(x.flatten(0, 1), cos, sin, positions, *options)
        return out.unflatten(0, (size, x.shape[1])), 0


def rotary(*args: Any) -> Tensor:
    """The op, with its gradient where one is asked for: that costs more than the op."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return Rotary.apply(*args)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and args[0].requires_grad:
        # `apply` without binding arguments by name, which takes most of its time.
        return super(torch.autograd.Function, Rotary).apply(*args)  # type: ignore[no-any-return]
    return torch.ops.fastattn.rotary(*args)  # type: ignore[no-any-return]
