"""The embedding as torch ops: schema, fake, gradient. Speaks to torch, computes nothing."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

# ids int64 [N]; positions int64 [M], M a divisor of N, those of the first M rows, and so on.
torch.library.define(
    "fastattn::embedding",
    "(Tensor ids, Tensor weight, Tensor? position_weight, Tensor? positions, Tensor? seed, float dropout, "
    "str backend) -> Tensor",
)
# Of a table of `rows` rows: sums of dout [N, D] over those that looked one up; 0 for the row `skip`.
torch.library.define(
    "fastattn::embedding_gradient",
    "(Tensor dout, Tensor ids, SymInt rows, Tensor? seed, float dropout, SymInt skip, str backend) -> Tensor",
)


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fastattn.ops.embedding.{backend}")


@torch.library.impl("fastattn::embedding", ("cpu", "cuda"))
def _embedding(ids: Tensor, *args: Any) -> Tensor:
    out: Tensor = _kernels(args[-1]).embedding(ids, *args[:-1])
    return out


@torch.library.impl("fastattn::embedding_gradient", ("cpu", "cuda"))
def _gradient(dout: Tensor, *args: Any) -> Tensor:
    grad: Tensor = _kernels(args[-1]).gradient(dout, *args[:-1])
    return grad


@torch.library.register_fake("fastattn::embedding")
def _fake(ids: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.register_fake("fastattn::embedding_gradient")
def _fake_gradient(dout: Tensor, ids: Tensor, rows: int, *args: Any) -> Tensor:
    return dout.new_empty((rows, dout.shape[1]))


class Embedding(torch.autograd.Function):
    """Gradient of `fastattn::embedding` in both tables."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        ids: Tensor,
        weight: Tensor,
        position_weight: Tensor | None,
        positions: Tensor | None,
        seed: Tensor | None,
        skip: int,
        dropout: float,
        backend: str,
    ) -> Tensor:
        return torch.ops.fastattn.embedding(  # type: ignore[no-any-return]
            ids, weight, position_weight, positions, seed, dropout, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight, position_weight, positions, seed, *ctx.options = inputs
        ctx.rows = weight.shape[0], 0 if position_weight is None else position_weight.shape[0]
        ctx.save_for_backward(ids, positions, seed)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        ids, positions, seed = ctx.saved_tensors
        skip, dropout, backend = ctx.options
        dweight = dposition = None
        if ctx.needs_input_grad[1]:
            dweight = Gradient.apply(dout, ids, ctx.rows[0], seed, dropout, skip, backend)
        if ctx.needs_input_grad[2]:
            places = positions.repeat(ids.shape[0] // max(1, positions.shape[0]))
            dposition = Gradient.apply(dout, places, ctx.rows[1], seed, dropout, -1, backend)
        return None, dweight, dposition, None, None, None, None, None


class Gradient(torch.autograd.Function):
    """The sums of a table's rows; linear in dout, whose gradient looks the rows up again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout: Tensor, ids: Tensor, rows: int, seed: Tensor | None, dropout: float, skip: int, backend: str
    ) -> Tensor:
        return torch.ops.fastattn.embedding_gradient(  # type: ignore[no-any-return]
            dout, ids, rows, seed, dropout, skip, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ids, _, seed, ctx.dropout, ctx.skip, ctx.backend = inputs
        ctx.save_for_backward(ids, seed)

    @staticmethod
    def backward(ctx: Any, ddtable: Tensor) -> tuple[Tensor | None, ...]:
        ids, seed = ctx.saved_tensors
        if ctx.skip >= 0:
            index = torch.full((1,), ctx.skip, device=ids.device)
            ddtable = ddtable.index_fill(0, index, 0)
        ddout = Embedding.apply(ids, ddtable, None, None, seed, -1, ctx.dropout, ctx.backend)
        return ddout, None, None, None, None, None, None
