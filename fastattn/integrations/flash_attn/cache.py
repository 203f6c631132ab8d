"""`flash_attn_with_kvcache` by flash-attn's signature, and pages in the packed functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.integrations.flash_attn.calls import Options, check_rank
from fastattn.integrations.flash_attn.layouts import Dense, Layout, Padded, Sequences, require
from fastattn.ops.attention.kv_cache import KVCache, attention_with_kv_cache, explain_with_kv_cache
from fastattn.ops.choice import Explanation
from fastattn.ops.rotary import rotary


class Where(NamedTuple):
    """Which slots of the cache belong to which sequence, by the names of `flash_attn_with_kvcache`."""

    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None


class Turn(NamedTuple):
    """Its rotary embedding, by the names of `flash_attn_with_kvcache`."""

    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool


class CacheCall(NamedTuple):
    """A call of `fastattn.attention_with_kv_cache`.

    Attributes:
        q: ``[B, H, L_q, D]``.
        cache: with flash-attn's own memory.
        k: ``[B, H_kv, L_new, D]``, or None.
        v: ``[B, H_kv, L_new, D]``, or None.
        options: its keyword arguments.
        layout: the way back to flash-attn's.
    """

    q: Tensor
    cache: KVCache
    k: Tensor | None
    v: Tensor | None
    options: dict[str, Any]
    layout: Layout

    def run(self) -> tuple[Tensor, Tensor]:
        """out and softmax_lse, as flash-attn lays them out."""
        out, lse = attention_with_kv_cache(
            self.q, self.cache, self.k, self.v, return_lse=True, **self.options
        )
        return self.layout.from_queries(out), self.layout.from_lse(lse)

    def results(self, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As `calls.Call.results`."""
        out, lse = self.run()
        return (out, lse, self.probabilities()) if return_attn_probs else out

    def probabilities(self) -> Tensor:
        """S_dmask where there is no dropout, as here: empty."""
        return self.q.new_empty((0,))

    def explain(self) -> Explanation:
        return explain_with_kv_cache(self.q, self.cache, self.k, self.v, **self.options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash-attn's step of decoding: append to the cache, in place, and attend to all that is in it.

    Args:
        q: ``(batch_size, seqlen, nheads, headdim)``.
        k_cache: ``(batch_size_cache, seqlen_cache, nheads_k, headdim)``, or with `block_table` pages
            ``(num_blocks, page_block_size, nheads_k, headdim)`` of any size. Written to where `k` is given.
        v_cache: as k_cache.
        k: ``(batch_size, seqlen_new, nheads_k, headdim)``, appended at cache_seqlens; None for nothing.
        v: as k.
        rotary_cos: ``(seqlen_ro, rotary_dim / 2)``, any rotary_dim: k is rotated by its slot in the cache,
            which counts the left padding too. With `causal` or a window the queries are at the positions from
            cache_seqlens on; without, all of them are at cache_seqlens. Needs `k`.
        rotary_sin: as rotary_cos.
        cache_seqlens: keys in the cache before `k`: an int, or int32 ``(batch_size,)``; all of it if None. It
            is not moved on.
        cache_batch_idx: int32 ``(batch_size,)``, row of the cache of each sequence; distinct where `k` is
            given.
        cache_leftpad: int32 ``(batch_size,)``, where each sequence begins in the cache.
        block_table: int32 ``(batch_size, max_num_blocks_per_seq)``: the pages of each sequence, in order.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`: the last query is at the last key, new ones included.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        rotary_interleaved: rotate the dimensions (0, 1), (2, 3), … and not the two halves.
        alibi_slopes: as in `flash_attn_func`.
        num_splits: taken and not needed: the keys are split over the cores without a hint.
        return_softmax_lse: also return softmax_lse.

    Returns:
        ``out`` ``(batch_size, seqlen, nheads, headdim)``, or with `return_softmax_lse` ``(out,
        softmax_lse)``, the latter ``(batch_size, nheads, seqlen)``. Without gradients; taking one raises
        RuntimeError.

    Raises:
        RuntimeError: a sequence outgrows the cache, or its pages in `block_table`; nothing is written then.
        ValueError: shapes or options that do not fit.
        TypeError: dtypes that do not fit.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> k_cache, v_cache = torch.zeros(2, 64, 1, 8), torch.zeros(2, 64, 1, 8)
        >>> q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
        >>> lengths = torch.tensor([0, 5], dtype=torch.int32)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths).shape
        torch.Size([2, 1, 4, 8])
        >>> torch.equal(k_cache[1, 5], k[1, 0])
        True
    """
    options = Options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    where = Where(cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    turn = Turn(rotary_cos, rotary_sin, rotary_interleaved)
    out, lse = kvcache_call(q, k_cache, v_cache, k, v, where, turn, options).run()
    return (out, lse) if return_softmax_lse else out


def kvcache_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    where: Where,
    turn: Turn,
    options: Options,
) -> CacheCall:
    """The call behind `flash_attn_with_kvcache`."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is not None:
            check_rank(name, x, 4, "(batch or blocks, length, heads, headdim)")
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    if (turn.rotary_cos is None) != (turn.rotary_sin is None):
        raise ValueError("rotary_cos, rotary_sin: expected both or neither")
    if k is not None and where.cache_seqlens is None:
        raise ValueError("cache_seqlens: expected with k, which is appended there, got None")
    cache = KVCache(
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        0 if where.cache_seqlens is None else where.cache_seqlens,
        where.block_table,
        where.cache_batch_idx,
        where.cache_leftpad,
    )
    if where.cache_seqlens is None:
        cache.lengths = cache.capacity
    layout = Dense()
    q, k, v = layout.queries(q), None if k is None else layout.keys(k), None if v is None else layout.keys(v)
    mask = options.mask(cache.capacity)
    if turn.rotary_cos is not None and turn.rotary_sin is not None:
        if k is None:
            raise ValueError(
                "rotary_cos: expected with new keys k, got k=None; for q alone there is apply_rotary_emb"
            )
        # Positions are the slots of the cache, left padding among them.
        tables: dict[str, Any] = {"interleaved": turn.rotary_interleaved, "start": cache.lengths}
        k = rotary(k, turn.rotary_cos, turn.rotary_sin, **tables)
        # Without a mask flash-attn has all queries at one position: they take the place of heads.
        together = not any(mask.clauses)
        found = rotary(
            q.flatten(1, 2).unsqueeze(2) if together else q, turn.rotary_cos, turn.rotary_sin, **tables
        )
        q = found.view(q.shape)
    given = options.attention(q)
    del given["dropout"], given["seed"]
    return CacheCall(q, cache, k, v, given | {"mask": mask}, layout)


def decode_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sequences: Sequences,
    lengths: Tensor,
    block_table: Tensor,
    options: Options,
) -> CacheCall:
    """`flash_attn_varlen_func` with `block_table` and one query a sequence: reads pages where they are."""
    check_rank("q", q, 3, "(total_q, nheads, headdim)")
    layout = Padded(q_sequences, q_sequences, (q.shape[0], 0))
    cache = KVCache(k.transpose(1, 2), v.transpose(1, 2), lengths, block_table)
    given = options.attention(q)
    del given["dropout"], given["seed"]
    return CacheCall(layout.queries(q), cache, None, None, given | {"mask": options.mask()}, layout)


def gather(k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pages of all sequences behind one another; differentiable.

    Args:
        k: ``(num_blocks, page_block_size, nheads_k, headdim)``.
        v: as k.
        lengths: int ``(batch_size,)``.
        block_table: int ``(batch_size, max_num_blocks_per_seq)``.

    Returns:
        k and v, ``(batch_size · max_num_blocks_per_seq · page_block_size, nheads_k, headdim)``, 0 behind the
        lengths; and where each sequence begins and ends, int64 ``(batch_size + 1,)``.

    Raises:
        RuntimeError: a sequence is longer than its pages, or a page is not there.
    """
    for name, x in (("k", k), ("v", v)):
        check_rank(name, x, 4, "(num_blocks, page_block_size, nheads_k, headdim) with block_table")
    if block_table.dim() != 2 or block_table.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"block_table: expected ({lengths.shape[0]}, max_num_blocks_per_seq), "
            f"got {list(block_table.shape)}"
        )
    pages, size = k.shape[:2]
    count = block_table.shape[1]
    reach = count * size
    require(
        lengths <= reach, f"block_table: expected at most {reach} keys a sequence ({count} pages of {size})"
    )
    needed = torch.arange(0, reach, size, device=lengths.device) < lengths[:, None]
    there = (block_table >= 0) & (block_table < pages)
    require(there | ~needed, f"block_table: expected 0 to {pages - 1} for pages that hold keys")
    rows = block_table.long().clamp(0, pages - 1)
    # What was never written may be NaN.
    unused = torch.arange(reach, device=lengths.device) >= lengths[:, None]
    k, v = (x[rows].flatten(0, 2).masked_fill(unused.flatten()[:, None, None], 0) for x in (k, v))
    return k, v, torch.arange(lengths.shape[0] + 1, device=lengths.device) * reach
