"""The attention probabilities themselves, for who asks for that L_q × L_k matrix; eager PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.ops.attention.masks import Mask, as_mask


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    average: bool = False,
) -> Tensor:
    """The probabilities behind an `attention` output: ``P = exp(scale · q kᵀ + bias - lse)``, 0 where masked.

    Args:
        q: ``[B, H, L_q, D]``.
        k: ``[B, H_kv, L_k, D]``; H_kv divides H.
        lse: ``[B, H, L_q]``, what `attention(..., return_lse=True)` returned for the same arguments.
        mask: as in `attention`.
        bias: as in `attention`.
        scale: as in `attention`.
        average: return the mean over the heads; then no more than one head's matrix is in memory at a time,
            neither in forward nor for backward.

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
    group = heads // k.shape[1]
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    keep = as_mask(mask).to_dense(batch=batch, q_length=q_length, k_length=k.shape[2], device=q.device)

    def one_head(head: int) -> Tensor:
        of_head = q[:, head], k[:, head // group], lse[:, head], _head(keep, head), _head(bias, head), scale
        if average and torch.is_grad_enabled():
            weights: Tensor = checkpoint(
                _probabilities, *of_head, use_reentrant=False, preserve_rng_state=False
            )
            return weights
        return _probabilities(*of_head)

    if not average:
        return torch.stack([one_head(head) for head in range(heads)], dim=1).to(q.dtype)
    total = one_head(0)
    for head in range(1, heads):
        total = total + one_head(head)
    return (total / heads).to(q.dtype)


def _head(x: Tensor | None, head: int) -> Tensor | None:
    return None if x is None else x[:, head if x.shape[1] > 1 else 0]


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """One head's ``[B, L_q, L_k]`` in float32 or wider."""
    scores = torch.matmul(q, k.transpose(-1, -2)).to(lse.dtype) * scale
    if bias is not None:
        scores = scores + bias.to(lse.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    # An empty row's scores are -inf throughout: exp(-inf - 0) is the 0 wanted there.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
