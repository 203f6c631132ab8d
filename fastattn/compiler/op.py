"""What the pass puts in the place of naive attention: one op, made of `fastattn.attention` when it is traced.

The op is composite: autograd, autocast, functorch and the FLOP counter see what it is made of, graphs and
caches see its name. Its last argument names the version of what it is made of, so that no cache outlives a
change of that.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fastattn.compiler.empty_rows import EmptyRows, EmptyRowsBias
from fastattn.ops.attention import attention, sliding_window
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.choice import no_autocast

UNIFORM, UNIFORM_WITH_GRADIENT = 1, 2

_SCHEMA: Final = (
    "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? bias, int? left, int? right, bool bottom_right, "
    "float scale, float softcap, float dropout, int empty, str version) -> Tensor"
)
torch.library.define("fastattn::rewritten_attention", _SCHEMA)


@torch.library.impl("fastattn::rewritten_attention", "CompositeImplicitAutograd")
def _rewritten_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    left: int | None,
    right: int | None,
    bottom_right: bool,
    scale: float,
    softcap: float,
    dropout: float,
    empty: int,
    version: str,
) -> Tensor:
    """Attention on ``[B, H, L, D]`` as the naive code computes it.

    Args:
        q, k, v: as in `fastattn.attention`.
        keep: bool, broadcastable to ``[B, H, L_q, L_k]``, or None.
        bias: the same, floating.
        left, right: of `fastattn.sliding_window`.
        bottom_right: its align.
        scale, softcap, dropout: as in `fastattn.attention`; a softcap of 0 is none.
        empty: what a row without keys gives: 0 (0), the mean of all values (1), which is what a softmax of
            equal low numbers gives; 2 as 1, with the gradient that the scores get where these numbers were
            added to them.
        version: not used.
    """
    mask: Mask = as_mask(keep)
    if left is not None or right is not None:
        mask = mask & sliding_window(left, right, "bottom_right" if bottom_right else "top_left")
    with no_autocast(q.device):
        out = attention(q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap or None, dropout=dropout)
        assert isinstance(out, Tensor)
        if not empty:
            return out
        seen = _rows_with_keys(mask, keep, left, right, bottom_right, q, k)
        uniform = _uniform(q, k, v, scale, softcap, empty).to(out.dtype)
        if empty == UNIFORM_WITH_GRADIENT and softcap and torch.is_grad_enabled():
            uniform = uniform + EmptyRows.apply(q, k, v, torch.logical_not(seen), scale, softcap)
        if empty == UNIFORM_WITH_GRADIENT and bias is not None and bias.requires_grad:
            uniform = uniform + EmptyRowsBias.apply(bias, v, torch.logical_not(seen), q.shape[:3])
        return torch.where(seen, out, uniform)


def _uniform(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, empty: int) -> Tensor:
    """The mean of all values, ``[B, H, 1 or L_q, D_v]``.

    With a gradient for the scores: that of P = softmax(S) where P is 1/n, which is linear in S:
    ``Σ_j P_j (S_j - mean S) v_j``, so that with S = scale · q kᵀ it is q times a covariance of keys and
    values.
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    mean = v.mean(2, keepdim=True)
    if groups > 1:
        mean = mean.repeat_interleave(groups, dim=1)
    if empty != UNIFORM_WITH_GRADIENT or softcap or not torch.is_grad_enabled():
        return mean
    covariance = (k - k.mean(2, keepdim=True)).transpose(2, 3) @ v.detach() / k.shape[2]
    if groups > 1:
        covariance = covariance.repeat_interleave(groups, dim=1)
    moved = scale * (q @ covariance)
    return mean + (moved - moved.detach())


def _rows_with_keys(
    mask: Mask,
    keep: Tensor | None,
    left: int | None,
    right: int | None,
    bottom_right: bool,
    q: Tensor,
    k: Tensor,
) -> Tensor:
    """Which rows have a key to attend to: bool, broadcastable to ``[B, H, L_q, 1]``."""
    q_length, k_length = q.shape[2], k.shape[2]
    if keep is not None and keep.shape[2] != 1:
        whole = mask.to_dense(batch=q.shape[0], q_length=q_length, k_length=k_length, device=q.device)
        assert whole is not None
        return whole.any(-1, keepdim=True)
    if keep is None:
        keep = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=q.device)
    # Keys kept before each place; a window is seen if that number grows over it.
    kept = keep.expand(-1, -1, 1, k_length)[:, :, 0].long().cumsum(-1)
    counts = torch.cat((torch.zeros_like(kept[..., :1]), kept), dim=-1)
    own = torch.arange(q_length, device=q.device) + (k_length - q_length if bottom_right else 0)
    first = torch.zeros_like(own) if left is None else (own - left).clamp(0, k_length)
    end = torch.full_like(own, k_length) if right is None else (own + right + 1).clamp(0, k_length)
    return (counts.index_select(-1, end) > counts.index_select(-1, first))[..., None]


@cache
def version() -> str:
    """A hash of the sources that the op is made of."""
    package = Path(__file__).resolve().parent.parent
    sources = [
        *sorted((package / "compiler").rglob("*.py")),
        *sorted((package / "ops").rglob("*.py")),
    ]
    whole = hashlib.sha256()
    for path in sources:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]
