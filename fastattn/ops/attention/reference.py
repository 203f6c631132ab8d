"""Attention as its equation, in eager PyTorch: every feature, any device, autograd by torch.

This is the oracle the kernels are tested against, and what runs where no kernel is available. It holds
the L_q x L_k matrix of probabilities in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention.masks import Mask
from fastattn.ops.attention.philox import drop_threshold, dropout_keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + bias, over the keys the mask keeps) · v, and the softmax's log-sum-exp.

    Args:
        q: ``[B, H, L_q, D]``.
        k: ``[B, H_kv, L_k, D]``.
        v: ``[B, H_kv, L_k, D_v]``.
        mask: see `Mask`.
        bias: broadcastable to ``[B, H, L_q, L_k]``, or None.
        scale: factor on the scores.
        dropout: probability, in 65,536ths.
        seed: int64 ``[1]``; needed where dropout > 0.

    Returns:
        ``out`` ``[B, H, L_q, D_v]`` in q's dtype and ``lse`` ``[B, H, L_q]`` in float32 or wider; a row
        with nothing to attend to has out 0 and lse -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, q_length, _ = q.shape
    kv_heads, k_length = k.shape[1], k.shape[2]
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if kv_heads != heads:
        k_ = k_.repeat_interleave(heads // kv_heads, dim=1)
        v_ = v_.repeat_interleave(heads // kv_heads, dim=1)

    scores = torch.matmul(q_, k_.transpose(-1, -2)) * scale  # [B, H, L_q, L_k]
    if bias is not None:
        scores = scores + bias.to(dtype)
    keep = mask.to_dense(batch=batch, q_length=q_length, k_length=k_length, device=q.device)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))

    probs, lse = _softmax(scores)
    if dropout > 0:
        assert seed is not None
        kept = dropout_keep(seed, dropout, (batch, heads, q_length, k_length))
        probs = probs * kept * (65536 / (65536 - drop_threshold(dropout)))
    return torch.matmul(probs, v_).to(q.dtype), lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log-sum-exp; 0 and -inf, with gradients 0, for an empty row."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + total.log()).masked_fill(empty, float("-inf"))
    return weights / total, lse.squeeze(-1)
