"""Attention as its equation, in eager PyTorch: every feature, any device, autograd by torch.

This is the oracle the kernels are tested against, and what runs where no kernel is available. It holds
the L_q x L_k matrix of probabilities in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention.biases import Bias
from fastattn.ops.attention.masks import Mask
from fastattn.ops.philox import drop_threshold, dropout_keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Bias,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    q_start: int | Tensor | None,
    k_start: int | None,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale · q kᵀ) + bias) · v over the keys the mask keeps and a sink, and its log-sum-exp.

    Args:
        q: ``[B, H, L_q, D]``.
        k: ``[B, H_kv, L_k, D]``.
        v: ``[B, H_kv, L_k, D_v]``.
        mask: see `Mask`.
        bias: see `Bias`.
        sinks: ``[H]``, a further score of each row, without a value; or None.
        scale: factor on the scores.
        softcap: scores x become softcap · tanh(x / softcap); 0 for x itself.
        dropout: probability, in 65,536ths.
        seed: int64 ``[1]``; needed where dropout > 0.
        q_start: position of the first query; None for alignment by corner.
        k_start: position of the first key.

    Returns:
        ``out`` ``[B, H, L_q, D_v]`` in q's dtype and ``lse`` ``[B, H, L_q]`` in float32 or wider; a row
        with nothing to attend to has out 0 and lse -inf (its sink, where it has one).
    """
    scores, v_ = _scores(q, k, v, mask, bias, scale, softcap, q_start, k_start)
    k_length = k.shape[2]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    probs, lse = _softmax(scores)
    probs = probs[..., :k_length]
    if dropout > 0:
        probs = probs * _dropout(probs, dropout, seed, q_start, k_start)
    return torch.matmul(probs, v_).to(q.dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    bias: Bias,
    scale: float,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    q_start: int | Tensor | None,
    k_start: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v of rows whose `out` and `lse` are given: those of these keys, or of more.

    Args: as in `attention`, with dout and dlse the gradients that reach out and lse.

    Returns:
        dq, dk and dv in q's dtype.
    """
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        scores, v_ = _scores(q, k, v, mask, bias, scale, softcap, q_start, k_start)
        dtype = scores.dtype
        # P = exp(S - lse); an empty row's is exp(-inf)
        lse = lse.to(dtype)
        probs = torch.exp(scores.detach() - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        dout_ = dout.to(dtype)
        dprobs = torch.matmul(dout_, v_.detach().transpose(-1, -2))
        kept = probs
        if dropout > 0:
            factor = _dropout(probs, dropout, seed, q_start, k_start)
            dprobs, kept = dprobs * factor, probs * factor
        delta = (dout_ * out.to(dtype)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse.to(dtype)[..., None]
        dscores = probs * (dprobs - delta)
        dv_ = torch.matmul(kept.transpose(-1, -2), dout_)
        dq, dk, dv = torch.autograd.grad((scores, v_), (q, k, v), (dscores, dv_))
    return dq, dk, dv


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Bias,
    scale: float,
    softcap: float,
    q_start: int | Tensor | None,
    k_start: int | None,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, L_q, L_k]`` under bias and mask, and v for each query head, in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, q_length, _ = q.shape
    kv_heads, k_length = k.shape[1], k.shape[2]
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if kv_heads != heads:
        k_ = k_.repeat_interleave(heads // kv_heads, dim=1)
        v_ = v_.repeat_interleave(heads // kv_heads, dim=1)

    scores = torch.matmul(q_, k_.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    added = bias.to_dense(
        q_length=q_length,
        k_length=k_length,
        q_start=q_start,
        k_start=k_start,
        documents=mask.documents if bias.compact else None,
    )
    if added is not None:
        scores = scores + added.to(dtype)
    keep = mask.to_dense(
        batch=batch,
        q_length=q_length,
        k_length=k_length,
        q_start=q_start,
        k_start=k_start,
        device=q.device,
    )
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores, v_


def _dropout(
    probs: Tensor, dropout: float, seed: Tensor | None, q_start: int | Tensor | None, k_start: int | None
) -> Tensor:
    """What dropout multiplies the probabilities by: 0, or the inverse of the share that is kept."""
    assert seed is not None and not isinstance(q_start, Tensor)
    batch, heads, q_length, k_length = probs.shape
    kept = dropout_keep(seed, dropout, (batch, heads, q_length, k_length), q_start or 0, k_start or 0)
    return kept.to(probs.dtype) * (65536 / (65536 - drop_threshold(dropout)))


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
