"""The gradient of scores in rows that have nothing but low finite numbers added to them.

There the naive code's softmax is uniform, whatever the scores are, and still has a derivative. Under a
softcap it is
computed row by row for the rows there are: mostly none, or those of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TENSORS = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor empty"
torch.library.define(
    "fastattn::empty_rows_backward", f"({_TENSORS}, float scale, float softcap) -> (Tensor dq, Tensor dk)"
)


@torch.library.impl("fastattn::empty_rows_backward", ("cpu", "cuda"))
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, empty: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """dS = (dP - mean dP) / L_k · (1 - tanh²) in the rows that `empty` names; dq and dk of these."""
    dq, dk = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    every = empty.expand(batch, heads, length, 1)[..., 0]
    for b, h in every.any(-1).nonzero().tolist():
        rows = every[b, h].nonzero()[:, 0]
        q_, k_, v_ = q[b, h, rows].float(), k[b, h // groups].float(), v[b, h // groups].float()
        dscores = dout[b, h, rows].float() @ v_.mT
        dscores = (dscores - dscores.mean(-1, keepdim=True)) / k_.shape[0]
        dscores = dscores * (1 - torch.tanh(q_ @ k_.mT * (scale / softcap)).square()) * scale
        dq[b, h, rows] = dscores @ k_
        dk[b, h // groups] += dscores.mT @ q_
    return dq.to(q.dtype), dk.to(k.dtype)


@torch.library.register_fake("fastattn::empty_rows_backward")
def _fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, empty: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


class EmptyRows(torch.autograd.Function):
    """0, with the derivative of the result for the scores of empty rows."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, empty: Tensor, scale: float, softcap: float) -> Tensor:
        return q.new_zeros((1, 1, 1, 1)).expand(*q.shape[:3], v.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = torch.ops.fastattn.empty_rows_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.softcap)
        return dq, dk, None, None, None, None


torch.library.define(
    "fastattn::empty_rows_bias_backward", "(Tensor dout, Tensor v, Tensor bias, Tensor empty) -> Tensor"
)


@torch.library.impl("fastattn::empty_rows_bias_backward", ("cpu", "cuda"))
def _bias_backward(dout: Tensor, v: Tensor, bias: Tensor, empty: Tensor) -> Tensor:
    """dS of `_backward` before a softcap, summed over what the bias is broadcast over."""
    batch, heads, length, _ = dout.shape
    groups, keys = heads // v.shape[1], v.shape[2]
    dbias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    every = empty.expand(batch, heads, length, 1)[..., 0]
    for b, h in every.any(-1).nonzero().tolist():
        rows = every[b, h].nonzero()[:, 0]
        dscores = dout[b, h, rows].float() @ v[b, h // groups].float().mT
        dscores = (dscores - dscores.mean(-1, keepdim=True)) / keys
        own = dbias[min(b, bias.shape[0] - 1), min(h, bias.shape[1] - 1)]
        if bias.shape[3] == 1:
            dscores = dscores.sum(-1, keepdim=True)
        own.index_add_(0, rows if bias.shape[2] > 1 else torch.zeros_like(rows), dscores)
    return dbias.to(bias.dtype)


@torch.library.register_fake("fastattn::empty_rows_bias_backward")
def _bias_fake(dout: Tensor, v: Tensor, bias: Tensor, empty: Tensor) -> Tensor:
    return bias.new_empty(bias.shape)


class EmptyRowsBias(torch.autograd.Function):
    """0, with the derivative of the result for the bias of empty rows."""

    @staticmethod
    def forward(bias: Tensor, v: Tensor, empty: Tensor, shape: tuple[int, ...]) -> Tensor:
        return v.new_zeros((1, 1, 1, 1)).expand(*shape, v.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        bias, v, empty = ctx.saved_tensors
        return torch.ops.fastattn.empty_rows_bias_backward(dout, v, bias, empty), None, None, None
