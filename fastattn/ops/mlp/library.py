"""The MLP as torch ops: schema, fake, gradient. Speaks to torch, computes nothing."""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops import flops
from fastattn.ops.once import Once

_LAYERS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? gate_bias"
_OPTIONS = "Tensor? seed, float dropout, str activation"
# u is x w1ᵀ + b1 and g is x gateᵀ + gate_bias, where `keep`; else they are empty, as g is without a gate.
torch.library.define(
    "fastattn::mlp_forward",
    f"({_LAYERS}, Tensor? residual, {_OPTIONS}, bool keep, str backend) -> (Tensor out, Tensor u, Tensor g)",
)
# The gradients of `LAYERS` that the bits of `wanted` name; others empty.
torch.library.define(
    "fastattn::mlp_backward",
    f"(Tensor dout, {_LAYERS}, Tensor u, Tensor g, {_OPTIONS}, int wanted, str backend) -> "
    "(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgate, Tensor dgate_bias)",
)
# Bit i of `wanted` is that of layer i.
LAYERS: Final = ("x", "w1", "b1", "w2", "b2", "gate", "gate_bias")


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fastattn.ops.mlp.{backend}")


@torch.library.impl("fastattn::mlp_forward", ("cpu", "cuda"))
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _kernels(args[-1]).forward(x, *args[:-1])
    return found


@torch.library.impl("fastattn::mlp_backward", ("cpu", "cuda"))
def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _kernels(args[-1]).backward(dout, *args[:-1])
    return grads


@torch.library.register_fake("fastattn::mlp_forward")
def _fake_forward(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, gate: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keep = x.shape[0], args[-2]
    u = x.new_empty((rows, w1.shape[0]) if keep else (0,))
    g = x.new_empty((rows, w1.shape[0]) if keep and gate is not None else (0,))
    return x.new_empty((rows, w2.shape[0])), u, g


@torch.library.register_fake("fastattn::mlp_backward")
def _fake_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return new_gradients(args[: len(LAYERS)], args[-2])


def new_gradients(layers: tuple[Tensor | None, ...], wanted: int) -> tuple[Tensor, ...]:
    """What the backward op returns, uninitialised: weights' as the weights lie in memory."""
    like = layers[0]
    assert like is not None
    grads = []
    for i, layer in enumerate(layers):
        if not wanted >> i & 1:
            grads.append(like.new_empty((0,)))
            continue
        assert layer is not None
        grads.append(torch.empty_like(layer) if layer.dim() == 2 and i > 0 else layer.new_empty(layer.shape))
    return tuple(grads)


class MLP(torch.autograd.Function):
    """Gradient of `fastattn::mlp_forward`; x is ``[rows, in_features]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        activation: str,
        recompute: bool,
        backend: str,
    ) -> Any:
        layers = (x, w1, b1, w2, b2, gate, gate_bias)
        return torch.ops.fastattn.mlp_forward(
            *layers, residual, seed, dropout, activation, not recompute, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        layers, seed = inputs[: len(LAYERS)], inputs[8]
        ctx.dropout, ctx.activation, _, ctx.backend = inputs[9:]
        _, u, g = output
        ctx.mark_non_differentiable(u, g)
        ctx.save_for_backward(*layers, u, g, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, du: Any, dg: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * 13
        if dout is None:
            return none
        needed = ctx.needs_input_grad
        wanted = sum(1 << i for i in range(len(LAYERS)) if needed[i])
        grads: list[Tensor | None] = [None] * len(LAYERS)
        if wanted:
            found = gradient(dout, *ctx.saved_tensors, ctx.dropout, ctx.activation, wanted, ctx.backend)
            grads = [g if needed[i] else None for i, g in enumerate(found)]
        return (*grads, dout if needed[7] else None, *none[8:])


class Gradient(Once):
    """The backward op, which has no derivative."""

    operation = "fastattn.mlp"

    generate_vmap_rule = True

    @staticmethod
    def forward(*problem: Any) -> Any:
        return torch.ops.fastattn.mlp_backward(*problem)


def gradient(*problem: Any) -> Any:
    """The backward op's results, which refuse to be differentiated again."""
    # Compiled graphs have no second derivative, and say so.
    if torch.compiler.is_compiling():
        return torch.ops.fastattn.mlp_backward(*problem)
    return Gradient.apply(*problem)


def _products(x: Any, w1: Any, w2: Any, gate: Any) -> int:
    return int(2 * x[0] * (w1[0] * w1[1] * (1 if gate is None else 2) + w2[0] * w2[1]))


def _forward_flops(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gate: Any, *args: Any, out_shape: Any = None, **_: Any
) -> int:
    return _products(x, w1, w2, gate)


def _backward_flops(
    dout: Any,
    x: Any,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    gate: Any,
    gate_bias: Any,
    u: Any,
    *args: Any,
    **_: Any,
) -> int:
    wanted, layer = args[-2], 2 * x[0] * w1[0] * w1[1]
    found = 2 * x[0] * w2[0] * w2[1] * (1 + (wanted >> 3 & 1))
    found += layer * ((wanted & 1) + (wanted >> 1 & 1)) + (layer if len(u) == 1 else 0)
    if gate is not None:
        found += layer * ((wanted & 1) + (wanted >> 5 & 1)) + (layer if len(u) == 1 else 0)
    return int(found)


flops.register({"mlp_forward": _forward_flops, "mlp_backward": _backward_flops})
