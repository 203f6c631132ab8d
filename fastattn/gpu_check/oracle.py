"""A head of a case in float64, by chunks of rows: what each implementation is held to before the race."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastattn.gpu_check.peers import Attention, Case, Inputs
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.testing import Errors, assert_within_budget

_ROWS: Final = 1024
NAMES: Final = ("out", "dq", "dk", "dv")


def one_head(inputs: Inputs, batch: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    """Of a head of keys and the G heads of queries that share it, with every intermediate in `dtype`.

    Sums over the chunks are in float32 or wider, as within a matrix product.

    Returns:
        out ``[G, L, Dv]``, dq ``[G, L, D]``, dk ``[L, D]`` and dv ``[L, Dv]``.
    """
    case, heads = inputs.case, _sharing(inputs.case, head)
    q, dout = (x.detach()[batch, heads].to(dtype) for x in (inputs.q, inputs.dout))
    k, v = (x.detach()[batch, head].to(dtype) for x in (inputs.k, inputs.v))
    length, scale, options = case.length, case.dim**-0.5, inputs.options
    mask, bias = as_mask(options.get("mask")), as_bias(options.get("bias"))
    wide = torch.promote_types(dtype, torch.float32)
    out, dq = torch.empty_like(dout), torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows in torch.arange(length, device=q.device).split(_ROWS):
        scores = q[:, rows] @ k.T * scale
        added = bias.to_dense(q_length=length, k_length=length, rows=rows)
        if added is not None:
            scores = scores + added[0, heads].to(dtype)
        keep = mask.to_dense(batch=1, q_length=length, k_length=length, rows=rows, device=q.device)
        if keep is not None:
            scores = scores.masked_fill(~keep[0, 0], float("-inf"))
        probs = torch.softmax(scores, -1)
        out[:, rows] = probs @ v
        dprobs = dout[:, rows] @ v.T
        dscores = probs * (dprobs - (dout[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
        dq[:, rows] = dscores @ k
        dk += dscores.flatten(0, 1).T @ q[:, rows].flatten(0, 1)
        dv += probs.flatten(0, 1).T @ dout[:, rows].flatten(0, 1)
    return [out, dq, dk.to(dtype), dv.to(dtype)]


def _sharing(case: Case, head: int) -> slice:
    """The heads of queries that share a head of keys."""
    group = case.heads // case.kv_heads
    return slice(head * group, (head + 1) * group)


class Truth:
    """The first and the last head of keys of a case, exactly, and as plain PyTorch in its dtype has them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
        self.heads = sorted({(0, 0), (case.batch - 1, case.kv_heads - 1)})
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
                mine = got.detach()[batch, _sharing(self.inputs.case, head) if want.dim() == 3 else head]
                assert mine.shape == want.shape, f"{name}: expected {want.shape}, got {mine.shape}"
                ours = (mine.double() - want).abs().nan_to_num(nan=float("inf")).max()
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
