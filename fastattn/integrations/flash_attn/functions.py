"""`flash_attn_func` and `flash_attn_varlen_func` by flash-attn's signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.integrations.flash_attn import cache, calls
from fastattn.integrations.flash_attn.calls import Options
from fastattn.integrations.flash_attn.layouts import Sequences


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash-attn's attention, on any device and in float32 as well.

    Args:
        q: ``(batch_size, seqlen, nheads, headdim)``, float32, bfloat16, float16 or float64.
        k: ``(batch_size, seqlen_k, nheads_k, headdim)``, q's dtype; nheads_k divides nheads, and query head h
            reads key head ``h // (nheads / nheads_k)``.
        v: as k; its headdim may be another.
        dropout_p: probability in [0, 1) with which a probability is zeroed; 0.0 in evaluation.
        softmax_scale: factor on q kᵀ; ``1 / sqrt(headdim)`` if None.
        causal: query i sees the keys ``j <= i + seqlen_k - seqlen_q``: the bottom right corners are aligned.
        window_size: (left, right), a pair or a tensor of two: query i sees the keys from
            ``i + seqlen_k - seqlen_q - left`` to ``i + seqlen_k - seqlen_q + right``, both included; -1 for
            all. With `causal`, right is 0.
        softcap: scores x become ``softcap · tanh(x / softcap)``; 0 or less for none. Also with dropout.
        alibi_slopes: ``(nheads,)`` or ``(batch_size, nheads)``: ``-slope · |i + seqlen_k - seqlen_q - j|`` is
            added to the scores. Gets a gradient if it requires one.
        deterministic: taken and not needed: the gradients are the same on every run.
        return_attn_probs: also return softmax_lse and S_dmask. This takes the whole matrix.

    Returns:
        ``out`` ``(batch_size, seqlen, nheads, headdim)`` in q's dtype, or ``(out, softmax_lse, S_dmask)``:
        softmax_lse ``(batch_size, nheads, seqlen)`` in float32, differentiable; S_dmask, without a gradient,
        the probabilities ``(batch_size, nheads, seqlen, seqlen_k)`` before dropout, negative where dropout
        zeroed them, and an empty tensor where dropout_p is 0. A query with nothing to attend to has out 0,
        gradients 0 and softmax_lse -inf (as in FlashAttention-3; FlashAttention-2 gives +inf, which partial
        results can't be merged with).

    Raises:
        ValueError: shapes or options that do not fit, with the expected and the given.
        TypeError: dtypes that do not fit.

    Source: the signature and meaning are those of flash-attn 2.8; Dao, "FlashAttention-2", ICLR 2024
    (arXiv 2307.08691).

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
        >>> flash_attn_func(q, k, v, causal=True, window_size=(2, 0)).shape
        torch.Size([2, 5, 4, 8])
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return calls.dense(q, k, v, options).results(return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash-attn's attention over sequences of different lengths, packed behind one another.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``, or with `block_table` pages
            ``(num_blocks, page_block_size, nheads_k, headdim)`` of any size.
        v: as k.
        cu_seqlens_q: int32 ``(batch_size + 1,)``: sequence n has the queries from ``cu_seqlens_q[n]`` to
            before ``cu_seqlens_q[n + 1]``. What is behind the last sequence has out 0.
        cu_seqlens_k: the same for the keys; with `block_table` its differences are the lengths in the cache.
        max_seqlen_q: queries of the longest sequence, an int or a tensor. Like `max_seqlen_k` it is read only
            for S_dmask, `block_table`, and alibi_slopes ``(batch_size, nheads)``.
        max_seqlen_k: keys of the longest sequence.
        dropout_p: as in `flash_attn_func`.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`, in each sequence.
        window_size: as in `flash_attn_func`, in each sequence.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`, in each sequence. Slopes ``(batch_size, nheads)`` cost a copy
            of q, k and v with every sequence as long as the longest.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.
        block_table: int32 ``(batch_size, max_num_blocks_per_seq)``: the pages of each sequence, in order.

    Returns:
        As `flash_attn_func`: ``out`` ``(total_q, nheads, headdim)``, softmax_lse ``(nheads, total_q)``,
        S_dmask ``(batch_size, nheads, max_seqlen_q, max_seqlen_k)`` with 0 beyond the end of a sequence.

    Raises:
        ValueError, TypeError: as `flash_attn_func`.
        RuntimeError: a sequence is longer than its pages in `block_table`, or than `max_seqlen_q` or
            `max_seqlen_k` where these are read.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
        >>> q, k, v = (torch.randn(8, 4, 16) for _ in range(3))
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([8, 4, 16])
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = varlen_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, block_table)
    return call.results(return_attn_probs)


def varlen_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    options: Options,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    seed: Tensor | None = None,
) -> calls.Call | cache.CacheCall:
    """The call behind `flash_attn_varlen_func` and its private forward and backward."""
    queries = Sequences(cu_seqlens_q, max_seqlen_q)
    if block_table is None:
        keys = Sequences(cu_seqlens_k, max_seqlen_k, leftpad_k, seqused_k)
        return calls.varlen(q, k, v, queries, keys, options, seed)
    if leftpad_k is not None:
        raise NotImplementedError(
            "leftpad_k: expected None with block_table; flash_attn_with_kvcache takes both (cache_leftpad)"
        )
    used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if queries.longest == 1 and options.dropout_p == 0 and not differentiable:
        return cache.decode_call(q, k, v, queries, used, block_table, options)
    k, v, bounds = cache.gather(k, v, used, block_table)
    return calls.varlen(q, k, v, queries, Sequences(bounds, max_seqlen_k, used=used), options, seed)
