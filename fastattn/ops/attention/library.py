"""Attention as torch ops: schema, fake, gradient, vmap. Speaks to torch, computes nothing.

The ops are opaque (the compiler has nothing to fuse inside attention) and carry one trailing `backend`
argument, so that one schema, one fake and one gradient serve every kernel. The autograd formula sits in
`torch.autograd.Function` outside the ops, which costs half of what `register_autograd` does per call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops import flops
from fastattn.ops.attention.flops import FORMULAS
from fastattn.ops.once import Once

# The fields of `Problem`, in its order.
_PROBLEM = (
    "Tensor? mask, Tensor? blocks, Tensor? ranges, Tensor? bias, Tensor? relative, Tensor? origin, "
    "Tensor? sinks, Tensor? seed, SymInt left, SymInt right, bool bottom_right, SymInt q_start, "
    "SymInt k_start, SymInt block_q, SymInt block_k, float scale, float softcap, float dropout, str backend"
)
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
torch.library.define(
    "fastattn::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor out, Tensor lse)",
)
# The gradients that the bits of `wanted` name, those of the problem's own tensors in float32; others empty.
torch.library.define(
    "fastattn::attention_backward",
    f"({_SAVED}, {_PROBLEM}, int wanted) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor drelative, Tensor dsinks)",
)
torch.library.define(
    "fastattn::attention_float8",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    f"{_PROBLEM}) -> (Tensor out, Tensor lse)",
)
# Where the tensors of a problem stand among an op's arguments, and the bits of `wanted`.
_BIAS, _RELATIVE, _SINKS, _TENSORS, _DROPOUT = 3, 4, 6, 8, 17
WANTED: Final = {_BIAS: 1, _RELATIVE: 2, _SINKS: 4}
WANTED_QKV: Final = 8

# Which module computes for which `backend`; imported when an op first runs on it.
_KERNELS = {"cpu": "fastattn.ops.attention.cpu", "triton": "fastattn.ops.attention.triton"}


def _kernels(backend: str) -> Any:
    return importlib.import_module(_KERNELS[backend])


@torch.library.impl("fastattn::attention_forward", ("cpu", "cuda"))
def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _kernels(args[-1]).forward(q, *args[:-1])
    return out


@torch.library.impl("fastattn::attention_backward", ("cpu", "cuda"))
def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *problem, backend, wanted = args
    grads: tuple[Tensor, ...] = _kernels(backend).backward(dout, *problem, wanted)
    return grads


def new_heads_last(
    like: Tensor, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised ``[B, H, L, D]`` that lies in memory as ``[B, L, H, D]``.

    Model code merges the heads right behind attention (``out.transpose(1, 2).reshape(B, L, H * D)``); in
    this layout that is a view. Every backend returns it, so that fakes and kernels agree on strides.
    """
    return like.new_empty((batch, length, heads, dim), dtype=dtype or like.dtype).transpose(1, 2)


@torch.library.register_fake("fastattn::attention_forward")
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return new_heads_last(q, batch, heads, length, v.shape[3]), lse


@torch.library.impl("fastattn::attention_float8", ("cpu", "cuda"))
def _float8(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _kernels(args[-1]).forward_float8(q, *args[:-1])
    return out


@torch.library.register_fake("fastattn::attention_float8")
def _fake_float8(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return new_heads_last(q, batch, heads, length, v.shape[3], torch.bfloat16), lse


@torch.library.register_fake("fastattn::attention_backward")
def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *problem: Any,
) -> tuple[Tensor, ...]:
    return new_gradients(q, k, v, lse, problem, problem[-1])


def new_gradients(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: Sequence[Any], wanted: int
) -> tuple[Tensor, ...]:
    """What the backward op returns, uninitialised."""
    qkv = (
        new_heads_last(x, x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        if wanted & WANTED_QKV
        else x.new_empty((0,))
        for x in (q, k, v)
    )
    own = (
        lse.new_empty(problem[i].shape if wanted & bit else (0,), dtype=torch.float32)
        for i, bit in WANTED.items()
    )
    return (*qkv, *own)


class Attention(torch.autograd.Function):
    """Gradient of `fastattn::attention_forward`."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        blocks: Tensor | None,
        ranges: Tensor | None,
        bias: Tensor | None,
        relative: Tensor | None,
        origin: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        left: int,
        right: int,
        bottom_right: bool,
        q_start: int,
        k_start: int,
        block_q: int,
        block_k: int,
        scale: float,
        softcap: float,
        dropout: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastattn.attention_forward(  # type: ignore[no-any-return]
            q,
            k,
            v,
            mask,
            blocks,
            ranges,
            bias,
            relative,
            origin,
            sinks,
            seed,
            left,
            right,
            bottom_right,
            q_start,
            k_start,
            block_q,
            block_k,
            scale,
            softcap,
            dropout,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = inputs[3 + _TENSORS :]
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3 : 3 + _TENSORS])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        wanted = sum(bit for i, bit in WANTED.items() if ctx.needs_input_grad[3 + i])
        if any(ctx.needs_input_grad[:3]):
            wanted += WANTED_QKV
        found = gradient(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options, wanted)
        grads: list[Tensor | None] = [None] * (3 + _TENSORS + len(ctx.options))
        if wanted & WANTED_QKV:
            grads[:3] = found[:3]
        for (i, bit), grad in zip(WANTED.items(), found[3:], strict=True):
            grads[3 + i] = grad.to(tensors[i].dtype) if wanted & bit else None
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        """Fold the mapped axis into the batch."""
        fold = _Fold(info.batch_size, inputs[0], in_dims[0], dropout=inputs[3 + _DROPOUT])
        some = 3 + _TENSORS
        folded = fold.tensors(inputs[:some], in_dims, broadcast=range(3, some))
        out, lse = Attention.apply(*folded, *inputs[some:])
        return (fold.undo(out), fold.undo(lse)), (0, 0)


def attention(*args: Any) -> Any:
    """The forward op, with its gradient where one is asked for: `Attention.apply` costs more than the op."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Attention.apply(*args)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, Tensor)):
        return Attention.apply(*args)
    return torch.ops.fastattn.attention_forward(*args)


class Gradient(Once):
    """The backward op, which has no derivative."""

    operation = "fastattn.attention"

    @staticmethod
    def forward(*problem: Any) -> Any:
        return torch.ops.fastattn.attention_backward(*problem)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *problem: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into the batch."""
        fold = _Fold(info.batch_size, problem[2], in_dims[2], dropout=problem[7 + _DROPOUT])
        some, wanted = 7 + _TENSORS, problem[-1]
        # A bias shared by the samples of a batch still has a gradient for each mapped one.
        alone = [7 + i for i, bit in WANTED.items() if wanted & bit]
        broadcast = [i for i in range(7, some) if i not in alone]
        found = Gradient.apply(*fold.tensors(problem[:some], in_dims, broadcast), *problem[some:])
        grads = [fold.undo(x) if wanted & WANTED_QKV else x.new_empty((fold.size, 0)) for x in found[:3]]
        for (i, bit), grad in zip(WANTED.items(), found[3:], strict=True):
            if not wanted & bit:
                grads.append(grad.new_empty((fold.size, 0)))
                continue
            given, dim = problem[7 + i], in_dims[7 + i]
            shared = (given if dim is None else given.select(dim, 0)).shape[0] == 1
            each = fold.undo(grad)
            grads.append(each.sum(1, keepdim=True) if shared and fold.batch > 1 else each)
        return tuple(grads), (0,) * len(grads)


def gradient(*problem: Any) -> Any:
    """The backward op's results, which refuse to be differentiated again."""
    # Compiled graphs have no second derivative, and say so.
    if torch.compiler.is_compiling():
        return torch.ops.fastattn.attention_backward(*problem)
    return Gradient.apply(*problem)


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


class _Positional(inspect.Signature):
    """What `apply` asks on every call to bind the arguments it was given; all of them are given, in order."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args) if not kwargs else super().bind(*args, **kwargs)


class _Bound:
    kwargs: dict[str, Any]

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs = args, {}

    def apply_defaults(self) -> None:
        pass


# Made anew, and bound name by name, a signature costs more than all else that a call does in Python.
Attention.forward.__signature__ = _Positional(  # type: ignore[attr-defined]
    list(inspect.signature(Attention.forward).parameters.values())
)

flops.register(FORMULAS)
