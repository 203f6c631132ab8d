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


@register_flop_formula(torch.ops.fastattn.attention_bias_backward)
def _bias_backward_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _attention_flops(2, q, k, v)


class Attention(torch.autograd.Function):
    """Gradient of `fastattn::attention_forward`."""

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
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, lengths, bias, seed = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        problem = (dout, dlse, q, k, v, out, lse, mask, lengths, bias, seed, *ctx.options)
        dq = dk = dv = dbias = None
        if any(ctx.needs_input_grad[:3]):
            dq, dk, dv = _gradient(torch.ops.fastattn.attention_backward, problem)
        if ctx.needs_input_grad[5]:
            dbias = _gradient(torch.ops.fastattn.attention_bias_backward, problem)
        return dq, dk, dv, None, None, dbias, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        """Fold the mapped axis into the batch."""
        fold = _Fold(info.batch_size, inputs[0], in_dims[0], dropout=inputs[9])
        folded = fold.tensors(inputs[:7], in_dims, broadcast=(3, 5))
        out, lse = Attention.apply(*folded, *inputs[7:])
        return (fold.undo(out), fold.undo(lse)), (0, 0)


class Gradient(torch.autograd.Function):
    """A backward op, which has no derivative: taking one raises, where it would be 0 unnoticed."""

    @staticmethod
    def forward(op: Any, *problem: Any) -> Any:
        return op(*problem)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fastattn.attention has no second derivative on this backend; backend='reference' has every one"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Any, *problem: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into the batch."""
        fold = _Fold(info.batch_size, problem[2], in_dims[3], dropout=problem[13])
        wants_bias = op is torch.ops.fastattn.attention_bias_backward
        # A bias shared by the samples of a batch still has a gradient for each mapped one.
        broadcast = (7,) if wants_bias else (7, 9)
        found = Gradient.apply(op, *fold.tensors(problem[:11], in_dims[1:], broadcast), *problem[11:])
        if not wants_bias:
            return tuple(fold.undo(x) for x in found), (0, 0, 0)
        dbias = fold.undo(found)
        bias, dim = problem[9], in_dims[10]
        shared = (bias if dim is None else bias.select(dim, 0)).shape[0] == 1
        return (dbias.sum(1, keepdim=True) if shared and fold.batch > 1 else dbias), 0


def _gradient(op: Any, problem: tuple[Any, ...]) -> Any:
    # Compiled graphs have no second derivative, and say so.
    return op(*problem) if torch.compiler.is_compiling() else Gradient.apply(op, *problem)


class _Fold:
    """Puts vmap's mapped axis into the batch of every tensor of a problem, and takes it out again."""

    def __init__(self, size: int, q: Tensor, q_dim: int | None, dropout: float) -> None:
        if dropout > 0:
            raise NotImplementedError(
                "fastattn.attention: vmap expects dropout 0 (dropout is keyed by the position in the batch), "
                f"got {dropout}; fold the mapped axis into the batch yourself"
            )
        self.size = size
        self.batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]

    def tensors(
        self, inputs: Sequence[Tensor | None], dims: Sequence[int | None], broadcast: Sequence[int]
    ) -> list[Tensor | None]:
        """All folded; those at the places `broadcast` may keep a batch of 1 that no mapped axis touches."""
        return [
            None if x is None else self._one(x, dim, i in broadcast)
            for i, (x, dim) in enumerate(zip(inputs, dims, strict=False))
        ]

    def _one(self, x: Tensor, dim: int | None, may_broadcast: bool) -> Tensor:
        if dim is None:
            if may_broadcast and x.shape[0] == 1:
                return x
            x = x.expand(self.size, *x.shape)
        else:
            x = x.movedim(dim, 0)
        return x.expand(self.size, self.batch, *x.shape[2:]).flatten(0, 1)

    def undo(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, self.batch, *x.shape[1:])


# `apply` asks for this signature on every call; kept here it is not made anew each time (40 µs of 60).
Attention.forward.__signature__ = inspect.signature(Attention.forward)  # type: ignore[attr-defined]
