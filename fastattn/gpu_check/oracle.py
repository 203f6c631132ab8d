"""One head of a case in float64, by chunks of rows: what each implementation is held to before the race."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastattn.gpu_check.peers import Attention, Inputs
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.testing import Errors, assert_within_budget

_ROWS: Final = 1024
NAMES: Final = ("out", "dq", "dk", "dv")


def one_head(inputs: Inputs, batch: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk and dv of a head, ``[L, D]``, with every intermediate in `dtype`.

    Sums over the chunks are in float32 or wider, as within a matrix product.
    """
    q, k, v, dout = (x.detach()[batch, head].to(dtype) for x in (*inputs.leaves, inputs.dout))
    length, scale = q.shape[0], q.shape[1] ** -0.5
    mask, bias = as_mask(inputs.options.get("mask")), as_bias(inputs.options.get("bias"))
    wide = torch.promote_types(dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows in torch.arange(length, device=q.device).split(_ROWS):
        scores = q[rows] @ k.T * scale
        added = bias.to_dense(q_length=length, k_length=length, rows=rows)
        if added is not None:
            scores = scores + added[0, head].to(dtype)
        keep = mask.to_dense(batch=1, q_length=length, k_length=length, rows=rows, device=q.device)
        if keep is not None:
            scores = scores.masked_fill(~keep[0, 0], float("-inf"))
        probs = torch.softmax(scores, -1)
        out[rows] = probs @ v
        dprobs = dout[rows] @ v.T
        dscores = probs * (dprobs - (dout[rows] * out[rows]).sum(-1, keepdim=True)) * scale
        dq[rows] = dscores @ k
        dk += dscores.T @ q[rows]
        dv += probs.T @ dout[rows]
    return [out, dq, dk.to(dtype), dv.to(dtype)]


class Truth:
    """The first and the last head of a case, exactly, and as plain PyTorch in its dtype has them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
        self.heads = sorted({(0, 0), (case.batch - 1, case.heads - 1)})
        self.exact = [one_head(inputs, *where, torch.float64) for where in self.heads]
        self.plain = [one_head(inputs, *where, case.dtype) for where in self.heads]

    def check(self, found: Sequence[Tensor]) -> float:
        """Raise AssertionError where out, or a gradient behind it, is over its budget.

        Returns:
            The largest error as a share of its budget.
        """
        errors = []
        for (batch, head), exact, plain in zip(self.heads, self.exact, self.plain, strict=True):
            for name, got, want, usual in zip(NAMES, found, exact, plain, strict=False):
                ours = (got.detach()[batch, head].double() - want).abs().nan_to_num(nan=float("inf")).max()
                theirs = (usual.double() - want).abs().max()
                size = float(want.abs().max())
                errors.append(Errors(name, float(ours), float(theirs), size, got.dtype, 1.0))
        assert_within_budget(errors)
        return max(e.ours / e.budget for e in errors)


def results(attention: Attention, inputs: Inputs, training: bool) -> list[Tensor]:
    """out, and where `training` the gradients of q, k and v."""
    if not training:
        with torch.no_grad():
            return [attention(*inputs.leaves)]
    out = attention(*inputs.leaves)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.dout)]
