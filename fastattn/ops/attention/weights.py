"""The attention probabilities themselves, for who asks for that L_q × L_k matrix; eager PyTorch."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.ops import choice
from fastattn.ops.attention.biases import Bias, as_bias
from fastattn.ops.attention.masks import Mask, as_mask

# Heads whose matrices have fewer elements than this in all are averaged together.
_TOGETHER: Final = 1 << 23


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
    average: bool = False,
) -> Tensor:
    """The probabilities behind an `attention` output: ``P = exp(S - lse)`` of its scores S, 0 where masked.

    Args:
        q: ``[B, H, L_q, D]``.
        k: ``[B, H_kv, L_k, D]``; H_kv divides H.
        lse: ``[B, H, L_q]``, what `attention(..., return_lse=True)` returned for the same arguments; it has
            the sinks' part in it, where there were any.
        mask: as in `attention`.
        bias: as in `attention`.
        scale: as in `attention`.
        softcap: as in `attention`.
        q_start: as in `attention`.
        k_start: as in `attention`.
        average: return the mean over the heads; then only a few heads' matrices are in memory at a time,
            both in forward and for backward: as many as have 32 MiB, and at least one.

    Returns:
        ``[B, H, L_q, L_k]``, or ``[B, L_q, L_k]`` with `average`, in q's dtype; differentiable. A row with
        nothing to attend to is 0. Dropout has no part in it.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
        >>> out, lse = fastattn.attention(q, k, v, mask=fastattn.causal(), return_lse=True)
        >>> weights = attention_weights(q, k, lse, mask=fastattn.causal())
        >>> torch.allclose(weights @ v, out, atol=1e-6)
        True
    """
    batch, heads, q_length, head_dim = q.shape
    k_length = k.shape[2]
    mask, bias = as_mask(mask), as_bias(bias)
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    place = {"q_length": q_length, "k_length": k_length, "q_start": q_start, "k_start": k_start}
    keep = mask.to_dense(batch=batch, device=q.device, **place)  # type: ignore[arg-type]
    documents = mask.documents if bias.compact else None

    def probabilities(q: Tensor, k: Tensor, lse: Tensor, keep: Tensor | None, bias: Bias) -> Tensor:
        """``[B, some heads, L_q, L_k]`` in float32 or wider."""
        with choice.no_autocast(q.device):
            # The scores in lse's precision: rounded to half they would not add up to 1 against it.
            scores = torch.matmul(q.to(lse.dtype), k.to(lse.dtype).transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        added = bias.to_dense(**place, documents=documents)  # type: ignore[arg-type]
        if added is not None:
            scores = scores + added.to(lse.dtype)
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        # An empty row's scores are -inf throughout: exp(-inf - 0) is the 0 wanted there.
        return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))

    if not average:
        return probabilities(q, k, lse, keep, bias).to(q.dtype)
    step = max(1, _TOGETHER // max(1, batch * q_length * k_length))
    if step >= heads:
        return probabilities(q, k, lse, keep, bias).mean(1).to(q.dtype)

    def total_of(some: slice) -> Tensor:
        return probabilities(
            q[:, some], k[:, some], lse[:, some], _some(keep, some), _some_of_bias(bias, some)
        ).sum(1)

    total = q.new_zeros((batch, q_length, k_length), dtype=lse.dtype)
    for first in range(0, heads, step):
        part: Tensor = checkpoint(
            total_of, slice(first, first + step), use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return (total / heads).to(q.dtype)


def _some(x: Tensor | None, heads: slice) -> Tensor | None:
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def _some_of_bias(bias: Bias, heads: slice) -> Bias:
    # Slopes [B or 1, H] and a table [buckets, H] both have their heads second.
    compact = tuple(part.of(part.parameter[:, heads]) if part.heads > 1 else part for part in bias.compact)
    return Bias(_some(bias.dense, heads), compact)
