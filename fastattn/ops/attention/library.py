"""Attention as torch ops: schema, fake, gradient, FLOPs, vmap. Speaks to torch, computes nothing.

The ops are opaque (the compiler has nothing to fuse inside attention) and carry one trailing `backend`
argument, so that one schema, one fake and one gradient serve every kernel. The autograd formula sits in
`torch.autograd.Function` outside the ops, which costs half of what `register_autograd` does per call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

_PROBLEM = (
    "Tensor? mask, Tensor? lengths, Tensor? bias, Tensor? seed, "
    "int diagonal, float scale, float dropout, str backend"
)
torch.library.define(
    "fastattn::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "fastattn::attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PROBLEM}) -> (Tensor dq, Tensor dk, Tensor dv)",
)
torch.library.define(
    "fastattn::attention_bias_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PROBLEM}) -> Tensor dbias",
)

# Which module computes for which `backend`; imported when an op first runs on it.
_KERNELS = {"cpu": "fastattn.ops.attention.cpu"}


def _kernels(backend: str) -> Any:
    return importlib.import_module(_KERNELS[backend])


@torch.library.impl("fastattn::attention_forward", ("cpu", "cuda"))
def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _kernels(args[-1]).forward(q, *args[:-1])
    return out


@torch.library.impl("fastattn::attention_backward", ("cpu", "cuda"))
def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _kernels(args[-1]).backward(dout, *args[:-1])
    return grads


@torch.library.impl("fastattn::attention_bias_backward", ("cpu", "cuda"))
def _bias_backward(dout: Tensor, *args: Any) -> Tensor:
    dbias: Tensor = _kernels(args[-1]).bias_backward(dout, *args[:-1])
    return dbias


def new_heads_last(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """An uninitialised ``[B, H, L, D]`` that lies in memory as ``[B, L, H, D]``.

    Model code merges the heads right behind attention (``out.transpose(1, 2).reshape(B, L, H * D)``); in
    this layout that is a view. Every backend returns it, so that fakes and kernels agree on strides.
    """
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


@torch.library.register_fake("fastattn::attention_forward")
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return new_heads_last(q, batch, heads, length, v.shape[3]), lse


@torch.library.register_fake("fastattn::attention_backward")
def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(new_heads_last(x, x.shape[0], x.shape[1], x.shape[2], x.shape[3]) for x in (q, k, v))


@torch.library.register_fake("fastattn::attention_bias_backward")
def _fake_bias_backward(*args: Any) -> Tensor:
    bias: Tensor = args[9]
    return bias.new_empty(bias.shape)


def _attention_flops(
    passes: int, q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int]
) -> int:
    # The convention of torch's own formulas: the full L_q x L_k rectangle, whatever the mask.
    batch, heads, q_length, qk_dim = q_shape
    return passes * 2 * batch * heads * q_length * k_shape[2] * (qk_dim + v_shape[3]) // 2


@register_flop_formula(torch.ops.fastattn.attention_forward)
def _forward_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _attention_flops(2, q, k, v)


@register_flop_formula(torch.ops.fastattn.attention_backward)
def _backward_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _attention_flops(5, q, k, v)


class Attention(torch.autograd.Function):
    """Gradient of `fastattn::attention_forward`; once differentiable, a second derivative raises."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        diagonal: int,
        scale: float,
        dropout: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastattn.attention_forward(  # type: ignore[no-any-return]
            q, k, v, mask, lengths, bias, seed, diagonal, scale, dropout, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, lengths, bias, seed = inputs[:7]
        ctx.options = inputs[7:]
        ctx.save_for_backward(q, k, v, *output, mask, lengths, bias, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, lengths, bias, seed = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        problem = (dout, dlse, q, k, v, out, lse, mask, lengths, bias, seed, *ctx.options)
        dq = dk = dv = dbias = None
        if any(ctx.needs_input_grad[:3]):
            dq, dk, dv = torch.ops.fastattn.attention_backward(*problem)
        if ctx.needs_input_grad[5]:
            dbias = torch.ops.fastattn.attention_bias_backward(*problem)
        return dq, dk, dv, None, None, dbias, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Fold the mapped axis into the batch."""
        size = info.batch_size
        q, k, v, mask, lengths, bias, seed = inputs[:7]
        if in_dims[6] is not None:
            raise NotImplementedError("fastattn.attention: vmap over the dropout seed is not supported")
        inner = q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1]

        def fold(x: Tensor | None, dim: int | None, whole: bool) -> Tensor | None:
            if x is None:
                return None
            if dim is None:
                if not whole and x.shape[0] == 1:
                    return x  # broadcasts over the folded batch as it did over the batch
                x = x.expand(size, *x.shape)
            else:
                x = x.movedim(dim, 0)
                if not whole and x.shape[1] == 1:
                    x = x.expand(size, inner, *x.shape[2:])
            return x.flatten(0, 1)

        folded = (
            fold(q, in_dims[0], True),
            fold(k, in_dims[1], True),
            fold(v, in_dims[2], True),
            fold(mask, in_dims[3], False),
            fold(lengths, in_dims[4], True),
            fold(bias, in_dims[5], False),
            seed,
        )
        out, lse = Attention.apply(*folded, *inputs[7:])
        return (out.unflatten(0, (size, inner)), lse.unflatten(0, (size, inner))), (0, 0)


# `apply` asks for this signature on every call; kept here it is not made anew each time (40 µs of 60).
Attention.forward.__signature__ = inspect.signature(Attention.forward)  # type: ignore[attr-defined]
