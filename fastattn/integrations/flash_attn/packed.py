"""flash-attn's functions that take q, k and v, or k and v, in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.integrations.flash_attn.functions import flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with q, k and v in one tensor.

    Args:
        qkv: ``(batch_size, seqlen, 3, nheads, headdim)``. The rest as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: `qkv` of another shape; as `flash_attn_func`.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 4, 8), causal=True).shape
        torch.Size([2, 5, 4, 8])
    """
    _check("qkv", qkv, 5, 3, "(batch_size, seqlen, 3, nheads, headdim)")
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with k and v in one tensor.

    Args:
        q: ``(batch_size, seqlen, nheads, headdim)``.
        kv: ``(batch_size, seqlen_k, 2, nheads_k, headdim)``. The rest as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: `kv` of another shape; as `flash_attn_func`.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> flash_attn_kvpacked_func(torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 1, 8)).shape
        torch.Size([2, 5, 4, 8])
    """
    _check("kv", kv, 5, 2, "(batch_size, seqlen_k, 2, nheads_k, headdim)")
    k, v = kv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with q, k and v in one tensor.

    Args:
        qkv: ``(total, 3, nheads, headdim)``.
        cu_seqlens: int32 ``(batch_size + 1,)``, of queries and keys.
        max_seqlen: places of the longest sequence. The rest as in `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        ValueError: `qkv` of another shape; as `flash_attn_varlen_func`.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(8, 3, 4, 16), cu_seqlens, 5).shape
        torch.Size([8, 4, 16])
    """
    _check("qkv", qkv, 4, 3, "(total, 3, nheads, headdim)")
    q, k, v = qkv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with k and v in one tensor.

    Args:
        q: ``(total_q, nheads, headdim)``.
        kv: ``(total_k, 2, nheads_k, headdim)``. The rest as in `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        ValueError: `kv` of another shape; as `flash_attn_varlen_func`.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 8], [0, 7, 9]))
        >>> q, kv = torch.randn(8, 4, 16), torch.randn(9, 2, 2, 16)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 5, 7).shape
        torch.Size([8, 4, 16])
    """
    _check("kv", kv, 4, 2, "(total_k, 2, nheads_k, headdim)")
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _check(name: str, x: Tensor, rank: int, count: int, layout: str) -> None:
    if x.dim() != rank or x.shape[-3] != count:
        raise ValueError(f"{name}: expected {layout}, got {list(x.shape)}")
