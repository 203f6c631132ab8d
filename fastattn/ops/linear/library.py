"""The linear layer as torch ops: schema, fake, gradient. Speaks to torch, computes nothing."""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import flops

torch.library.define(
    "fastattn::linear_forward", "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor"
)
# The gradients that the bits of `wanted` name; others empty.
torch.library.define(
    "fastattn::linear_backward",
    "(Tensor dout, Tensor x, Tensor weight, int wanted, str backend) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
)
WANTED_X: Final = 1
WANTED_WEIGHT: Final = 2
WANTED_BIAS: Final = 4


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fastattn.ops.linear.{backend}")


@torch.library.impl("fastattn::linear_forward", ("cpu", "cuda"))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    out: Tensor = _kernels(backend).forward(x, weight, bias)
    return out


@torch.library.impl("fastattn::linear_backward", ("cpu", "cuda"))
def _backward(dout: Tensor, x: Tensor, weight: Tensor, wanted: int, backend: str) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _kernels(backend).backward(dout, x, weight, wanted)
    return grads


@torch.library.register_fake("fastattn::linear_forward")
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("fastattn::linear_backward")
def _fake_backward(
    dout: Tensor, x: Tensor, weight: Tensor, wanted: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted & WANTED_X else (0,)),
        torch.empty_like(weight) if wanted & WANTED_WEIGHT else x.new_empty((0,)),
        x.new_empty((weight.shape[0],)) if wanted & WANTED_BIAS else x.new_empty((0,)),
    )


class Linear(torch.autograd.Function):
    """Gradient of `fastattn::linear_forward`; x is ``[M, in_features]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return torch.ops.fastattn.linear_forward(x, weight, bias, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = sum(bit for bit, need in zip((1, 2, 4), ctx.needs_input_grad, strict=False) if need)
        grads = Gradient.apply(dout, x, weight, wanted, ctx.backend)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One product of all samples where they share the weight; else torch's batched one."""
        x, weight, bias, backend = inputs
        if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
            return torch.func.vmap(F.linear, in_dims[:3])(x, weight, bias), 0
        x = x.movedim(in_dims[0], 0)
        out: Tensor = Linear.apply(x.flatten(0, 1), weight, bias, backend)
        return out.unflatten(0, x.shape[:2]), 0


class Gradient(torch.autograd.Function):
    """The backward op; its own derivative is a sum of products, taken by torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout: Tensor, x: Tensor, weight: Tensor, wanted: int, backend: str) -> Any:
        return torch.ops.fastattn.linear_backward(dout, x, weight, wanted, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dout, x, weight, ctx.wanted, _ = inputs
        ctx.save_for_backward(dout, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # dx = dout W, dW = doutᵀ x, db = 1ᵀ dout
        dout, x, weight = ctx.saved_tensors
        ddx, ddweight, ddbias = grads
        of_dout, of_x, of_weight = torch.zeros_like(dout), torch.zeros_like(x), torch.zeros_like(weight)
        if ctx.wanted & WANTED_X:
            of_dout, of_weight = of_dout + ddx @ weight.t(), of_weight + dout.t() @ ddx
        if ctx.wanted & WANTED_WEIGHT:
            of_dout, of_x = of_dout + x @ ddweight.t(), of_x + dout @ ddweight
        if ctx.wanted & WANTED_BIAS:
            of_dout = of_dout + ddbias
        return of_dout, of_x, of_weight, None, None


def _forward_flops(x: Any, weight: Any, bias: Any, backend: str, *, out_shape: Any = None, **_: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


def _backward_flops(
    dout: Any, x: Any, weight: Any, wanted: int, backend: str, *, out_shape: Any = None, **_: Any
) -> int:
    products = bool(wanted & WANTED_X) + bool(wanted & WANTED_WEIGHT)
    return int(products * 2 * x[0] * x[1] * weight[0])


flops.register({"linear_forward": _forward_flops, "linear_backward": _backward_flops})
