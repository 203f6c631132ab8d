"""The norms as torch ops: schema, fake, gradient. Speaks to torch, computes nothing."""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops.once import Once, tracked

# x and residual are [rows, columns], weight and bias [columns]. `sum` is z = residual + dropout(x) of dtype
# `sum_dtype`, empty where z is x itself; the statistics are float32 [rows], the mean empty in an RMS norm.
torch.library.define(
    "fastattn::layer_norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float dropout, float eps, "
    "float weight_offset, bool rms, ScalarType sum_dtype, str backend) -> "
    "(Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
)
# The gradients that the bits of `wanted` name; others empty. Those of weight and bias are float32.
torch.library.define(
    "fastattn::layer_norm_backward",
    "(Tensor dout, Tensor? dsum, Tensor z, Tensor? weight, Tensor mean, Tensor rstd, Tensor? seed, "
    "float dropout, float weight_offset, bool rms, int wanted, str backend) -> "
    "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)
WANTED_X: Final = 1
WANTED_RESIDUAL: Final = 2
WANTED_WEIGHT: Final = 4
WANTED_BIAS: Final = 8


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fastattn.ops.layer_norm.{backend}")


@torch.library.impl("fastattn::layer_norm_forward", ("cpu", "cuda"))
def _forward(*args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _kernels(args[-1]).forward(*args[:-1])
    return found


@torch.library.impl("fastattn::layer_norm_backward", ("cpu", "cuda"))
def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _kernels(args[-1]).backward(*args[:-1])
    return grads


def new_outputs(
    x: Tensor, residual: Tensor | None, dropout: float, rms: bool, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward op returns, uninitialised."""
    rows, _ = x.shape
    is_x = residual is None and dropout == 0 and sum_dtype == x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty((0,) if is_x else x.shape, dtype=sum_dtype),
        x.new_empty((0,) if rms else (rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.float32),
    )


def new_gradients(dout: Tensor, z: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward op returns, uninitialised."""
    columns = z.shape[1:]
    return (
        dout.new_empty(z.shape if wanted & WANTED_X else (0,)),
        z.new_empty(z.shape if wanted & WANTED_RESIDUAL else (0,)),
        z.new_empty(columns if wanted & WANTED_WEIGHT else (0,), dtype=torch.float32),
        z.new_empty(columns if wanted & WANTED_BIAS else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("fastattn::layer_norm_forward")
def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    weight_offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_outputs(x, residual, dropout, rms, sum_dtype)


@torch.library.register_fake("fastattn::layer_norm_backward")
def _fake_backward(dout: Tensor, dsum: Tensor | None, z: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return new_gradients(dout, z, args[-2])


class LayerNorm(torch.autograd.Function):
    """Gradient of `fastattn::layer_norm_forward`: of its first two results, the others have none."""

    generate_vmap_rule = True

    # Its arguments are the op's. Were they named, torch would read their signature at every call: 100 us.
    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastattn.layer_norm_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, weight, bias, seed, ctx.dropout, _, ctx.weight_offset, ctx.rms, _, ctx.backend = inputs
        _, z, mean, rstd = output
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        sum_is_x = residual is None and ctx.dropout == 0 and z.dtype == x.dtype
        ctx.save_for_backward(x if sum_is_x else z, weight, mean, rstd, seed)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        z, weight, mean, rstd, seed = ctx.saved_tensors
        if dout is None:
            dout = z.new_zeros(z.shape, dtype=ctx.x_dtype)
        if dsum is not None and dsum.shape != z.shape:
            dsum = None  # of the empty one
        of_x, of_residual, of_weight, of_bias = ctx.needs_input_grad[:4]
        # Without dropout dx and dresidual are equal, but two leaves must not have one tensor for a gradient.
        wanted = WANTED_X * of_x + WANTED_RESIDUAL * of_residual
        wanted += WANTED_WEIGHT * of_weight + WANTED_BIAS * of_bias
        dx, dresidual, dweight, dbias = gradient(
            dout,
            dsum,
            z,
            weight,
            mean,
            rstd,
            seed,
            ctx.dropout,
            ctx.weight_offset,
            ctx.rms,
            wanted,
            ctx.backend,
        )
        return (
            dx if of_x else None,
            dresidual if of_residual else None,
            dweight.to(weight.dtype) if of_weight else None,
            dbias.to(ctx.bias_dtype) if of_bias else None,
            *[None] * 7,
        )


class Gradient(Once):
    """The backward op, which has no derivative."""

    generate_vmap_rule = True
    operation = "fastattn's layer_norm or rms_norm"

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastattn.layer_norm_backward(*args)


def gradient(*args: Any) -> Any:
    """The backward op; as a function of its own where someone may ask for its derivative."""
    functorch = torch._C._are_functorch_transforms_active()
    # Compiled graphs have no second derivative, and say so.
    if functorch or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return Gradient.apply(*args)
    return torch.ops.fastattn.layer_norm_backward(*args)


def layer_norm(*args: Any) -> Any:
    """The forward op, with its gradient where one is asked for: `LayerNorm.apply` costs more than the op."""
    return (LayerNorm.apply if tracked(*args[:4]) else torch.ops.fastattn.layer_norm_forward)(*args)
