"""`torch.nn.functional.scaled_dot_product_attention` by its own signature, on fastattn's kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import attention, causal
from fastattn.ops.attention import explain as explain_attention
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.choice import Explanation


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`, without the L × S matrix in memory.

    Masks of any kind, dropout, L ≠ S and E_v ≠ E all run in the tiled kernel, and a float mask gets its
    gradient; torch falls back to the full matrix for most of these.

    Args:
        query: ``[..., H, L, E]``, float32, bfloat16, float16 or float64 (the reference backend). Any number
            of leading dimensions, none at all included; those of the three tensors broadcast together. Or a
            nested tensor ``[B, H, ragged, E]`` with layout `torch.jagged`, as key and value then are.
        key: ``[..., H, S, E]``, query's dtype.
        value: ``[..., H, S, E_v]``, query's dtype.
        attn_mask: broadcastable to ``[..., H, L, S]``. Bool: True = may attend. Floating: added to the scaled
            scores, -inf masks; any floating dtype.
        dropout_p: probability in [0, 1) with which a probability is zeroed. As in torch it is always applied:
            pass 0.0 in evaluation.
        is_causal: query i attends to keys ``j <= i`` (top-left when L ≠ S). Together with `attn_mask` both
            hold, as on torch's fastest CPU path; torch's other paths raise.
        scale: factor on query · keyᵀ; ``1 / sqrt(E)`` if None.
        enable_gqa: the number of heads of key and value may divide query's; query head h reads key head
            ``h // (H / H_kv)``.

    Returns:
        ``[..., H, L, E_v]`` in query's dtype. A row with nothing to attend to is 0, as are its gradients.

    Raises:
        ValueError: shapes that do not fit, with the expected and the given; a dropout outside [0, 1).
        TypeError: dtypes that do not fit.
        NotImplementedError: `attn_mask` with nested tensors.

    Source: the signature and meaning are PyTorch 2.13's.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 7, 8), torch.randn(2, 3, 4, 7, 6)
        >>> fastattn.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 3, 4, 5, 6])
    """
    if query.is_nested or key.is_nested or value.is_nested:
        if attn_mask is not None:
            raise NotImplementedError("attn_mask: expected None with nested tensors, got a tensor")
        heads = [x.size(1) for x in (query, key, value)]
        if not enable_gqa and heads[1:] != heads[:1] * 2:
            raise ValueError(f"query, key, value: expected the same heads without enable_gqa, got {heads}")
        mask = causal("top_left") if is_causal else None
        out = attention(query, key, value, mask=mask, scale=scale, dropout=dropout_p)
        assert isinstance(out, Tensor)
        return out
    lead, (q, k, v), options = arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    out = attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[2:])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """Which backend `scaled_dot_product_attention` would run with the same arguments, and why not the others.

    Args: those of `scaled_dot_product_attention`. Nothing is computed.

    Returns:
        see `fastattn.explain`.

    Raises: as `scaled_dot_product_attention` does, and NotImplementedError for nested tensors.

    Example:
        >>> import torch
        >>> query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
        >>> explain(query, query, query, dropout_p=0.1).backend
        'reference'
    """
    _, (q, k, v), options = arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return explain_attention(q, k, v, **options)


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The output's dimensions before the last two, and what to call `fastattn.attention` with.

    Args: those of `scaled_dot_product_attention`.

    Raises: as `scaled_dot_product_attention` does, and NotImplementedError for nested tensors.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError("scaled_dot_product_attention: expected dense tensors, got a nested tensor")
    lead, tensors = _fold(query, key, value, enable_gqa)
    mask: Mask | Tensor | None = causal("top_left") if is_causal else None
    bias = None
    if attn_mask is not None:
        folded = _fold_mask(attn_mask, lead)
        if attn_mask.dtype == torch.bool:
            mask = folded if mask is None else mask & as_mask(folded)
        elif attn_mask.is_floating_point():
            bias = folded
        else:
            raise TypeError(f"attn_mask: expected a bool or floating tensor, got {attn_mask.dtype}")
    return lead, tensors, {"mask": mask, "bias": bias, "scale": scale, "dropout": dropout_p}


def _fold(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """The output's dimensions before the last two, and q, k, v as ``[batch, heads, length, dim]``."""
    shapes = query.shape, key.shape, value.shape
    heads_fit = enable_gqa or query.shape[-3:-2] == key.shape[-3:-2] == value.shape[-3:-2]
    if heads_fit and all(len(s) == 4 and s[0] == query.shape[0] for s in shapes):
        return tuple(query.shape[:2]), (query, key, value)

    given = [list(s) for s in shapes]
    if min(map(len, shapes)) < 2:
        raise ValueError(f"query, key, value: expected at least 2 dimensions, got {given}")
    leads = [(1,) * (3 - len(s)) + tuple(s[:-2]) for s in shapes]
    heads = [lead[-1] for lead in leads]
    try:
        batch = _broadcast(*(lead[:-1] for lead in leads))
        if not enable_gqa:
            heads[0] = _broadcast(*((h,) for h in heads))[0]
            # One key head for all query heads is what the kernels read anyway: no need to expand it.
            heads[1:] = [1, 1] if heads[1] == heads[2] == 1 else [heads[0], heads[0]]
    except RuntimeError:
        expected = "expected leading dimensions that broadcast together"
        hint = "" if enable_gqa else "; enable_gqa=True lets the heads of key and value divide query's"
        raise ValueError(f"query, key, value: {expected}, got {given}{hint}") from None
    rank = max(map(len, shapes)) - 2
    size = math.prod(batch)
    q, k, v = (
        x.expand(*batch, h, *x.shape[-2:]).reshape(size, h, *x.shape[-2:])
        for x, h in zip((query, key, value), heads, strict=True)
    )
    return (*batch, heads[0])[len(batch) + 1 - rank :], (q, k, v)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))


def _fold_mask(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """`attn_mask` as ``[batch or 1, heads or 1, L or 1, S or 1]``; copied only where it varies over some
    but not all of several batch dimensions."""
    rank = len(lead) + 2
    if not 2 <= attn_mask.dim() <= rank:
        raise ValueError(f"attn_mask: expected 2 to {rank} dimensions, got {list(attn_mask.shape)}")
    mask = attn_mask[(None,) * (max(rank, 4) - attn_mask.dim())]
    if mask.dim() == 4:
        return mask
    batch, rest = mask.shape[:-3], mask.shape[-3:]
    if all(size == 1 for size in batch):
        return mask.reshape(1, *rest)
    if any(have != 1 and have != want for have, want in zip(batch, lead, strict=False)):
        expected = f"expected leading dimensions broadcastable to {list(lead)}"
        raise ValueError(f"attn_mask: {expected}, got {list(attn_mask.shape)}")
    return mask.expand(*lead[:-1], *rest).reshape(math.prod(lead[:-1]), *rest)
