"""`fastattn.attention_with_kv_cache`: checks, appends, and calls attention on the cache. Speaks to people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.attention import api
from fastattn.ops.attention.biases import Bias, as_bias
from fastattn.ops.attention.checks import _readable as readable
from fastattn.ops.attention.checks import check_inputs, check_options
from fastattn.ops.attention.constraints import Blocks, Constraint, Dense, Documents, Lengths
from fastattn.ops.attention.kv_cache import library
from fastattn.ops.attention.kv_cache.cache import Filled, KVCache, Rotary, check_cache
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.attention.problem import resolve
from fastattn.ops.rotary import rotary as rotate


def attention_with_kv_cache(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary: Rotary | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend to all that is in it: a step of decoding.

    The queries are the last L_q positions of each sequence, new keys included: query i is at position
    ``lengths[b] + L_new - L_q + i``, key j at position j. Rotary embedding, masks and compact biases go by
    these, `align` is not used; `block_sparse` and tensors go by the indices i and j.

    Args:
        q: ``[B, H, L_q, D]``.
        cache: a `KVCache`; its k and v are written to, nothing else is.
        k: ``[B, H_kv, L_new, D]``, q's dtype: keys to be appended; None for none.
        v: ``[B, H_kv, L_new, D_v]``, q's dtype.
        rotary: rotates q and k first; what is in the cache is taken to be rotated.
        mask: as in `attention` (not `documents`). None: a query sees all keys of its sequence, those behind
            its position too; with more than one query a model that is causal passes `causal()`. A bool
            tensor broadcasts to ``[B, H, L_q, capacity]``.
        bias: as in `attention`; a tensor broadcasts to ``[B, H, L_q, capacity]``.
        scale: as in `attention`.
        softcap: as in `attention`.
        sinks: as in `attention`.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: as in `attention`; `explain_with_kv_cache` tells which is taken.

    Returns:
        ``out`` ``[B, H, L_q, D_v]`` in q's dtype, with `return_lse` also ``lse`` ``[B, H, L_q]``, as
        `attention` does. They have no gradient: a backward pass that comes here raises RuntimeError.

    Raises:
        RuntimeError: a sequence has more keys than the cache has room for, a page that it needs is not in
            `block_table`, or a row not in the cache. Nothing has been written then. On a GPU these numbers
            are not read, which would stop its queue: what does not fit is an assertion that fails on the
            device, which a later call tells and the process does not get over; a torch that was built
            without these assertions does not tell.
        ValueError: shapes, devices or options that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: `backend` can't do this, with every reason.

    Source: Kwon et al., "Efficient memory management for large language model serving with PagedAttention",
    SOSP 2023 (arXiv 2309.06180).

    Example:
        >>> import torch, fastattn
        >>> rooms = torch.empty(2, 1, 64, 8), torch.empty(2, 1, 64, 8)
        >>> cache = fastattn.KVCache(*rooms, lengths=torch.tensor([0, 5]))
        >>> cache.v[1, :, :5] = cache.k[1, :, :5] = 1.0
        >>> q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
        >>> out = fastattn.attention_with_kv_cache(q, cache, k, v)
        >>> torch.allclose(out[0], v[0])  # the only key there is
        True
        >>> torch.equal(cache.k[1, :, 5], k[1, :, 0])
        True
    """
    bias_ = as_bias(bias)
    scale, softcap = _number("scale", scale), _number("softcap", softcap)
    with torch.no_grad():
        step = _prepare(q, cache, k, v, rotary, mask, bias_, softcap, sinks)
        chosen = choice.choose(step.q, backend)
        if step.k is not None:
            torch.ops.fastattn.kv_cache_append(
                cache.k, cache.v, step.k, step.v, step.lengths, *step.where, *step.scales
            )
        attend = _decode if chosen != "reference" and _can_decode(step, cache) else _attend
        out, lse = attend(step, cache, scale, softcap, sinks, chosen)
    sources = [x for x in _sources(q, cache, k, v, rotary, bias_, sinks) if x.requires_grad]
    if sources and torch.is_grad_enabled():
        out, lse = library.NoGradient.apply(out, lse, *sources)
    return (out, lse) if return_lse else out


def explain_with_kv_cache(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary: Rotary | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> choice.Explanation:
    """Which backend `attention_with_kv_cache` would run with the same arguments, and why not the others.

    Args: those of `attention_with_kv_cache`. Nothing is computed and nothing written.

    Returns:
        An `Explanation`, as `fastattn.explain` does.

    Raises:
        ValueError, TypeError: for arguments no backend takes.

    Example:
        >>> import torch
        >>> pages, table = torch.empty(9, 2, 16, 8, dtype=torch.float64), torch.arange(8).view(2, 4)
        >>> cache = KVCache(pages, pages, lengths=37, block_table=table)
        >>> explain_with_kv_cache(torch.randn(2, 4, 1, 8, dtype=torch.float64), cache).backend
        'reference'
    """
    scale, softcap = _number("scale", scale), _number("softcap", softcap)
    with torch.no_grad():
        step = _prepare(q, cache, k, v, rotary, mask, as_bias(bias), softcap, sinks)
        return api.explain(
            step.q,
            step.k_like,
            step.v_like,
            mask=step.mask,
            bias=step.bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            q_start=step.q_start,
            backend=backend,
        )


def _number(name: str, given: Any) -> Any:
    """Raise for what is none, as long as nothing has been written."""
    if given is None or isinstance(given, (int, float, torch.SymInt, torch.SymFloat)):
        return given
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number or None, got {given!r}") from error


class _Step(NamedTuple):
    """One call's arguments, checked and rotated.

    Attributes:
        q, k, v: new queries, keys and values; the latter None where there are none.
        k_like, v_like: of the shapes of all keys and values there is room for, without memory.
        lengths, totals: int64 ``[B]``, keys before the append and behind it.
        q_start: int64 ``[B]``, position of the first query.
        mask: with the constraint that a key is there.
        bias: as given.
        where: left padding, block table and batch index.
        scales: of k and v.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    k_like: Tensor
    v_like: Tensor
    lengths: Tensor
    totals: Tensor
    q_start: Tensor
    mask: Mask
    bias: Bias
    where: tuple[Tensor | None, Tensor | None, Tensor | None]
    scales: tuple[Tensor | None, Tensor | None]


def _prepare(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    rotary: Rotary | None,
    mask: Mask | Tensor | None,
    bias: Bias,
    softcap: float | None,
    sinks: Tensor | None,
) -> _Step:
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one")
    if k is None or v is None:
        choice.require_tensors(q=q)
        (q,) = choice.autocast(q)
    else:
        choice.require_tensors(q=q, k=k, v=v)
        q, k, v = choice.autocast(q, k, v)
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dimensions [batch, heads, length, head_dim], got {list(q.shape)}")
    check_cache(q, cache, k, v)
    batch, _, q_length, _ = q.shape
    kv_heads = cache.k.shape[1]
    nothing = q.new_empty(())
    k_like = nothing.expand(batch, kv_heads, cache.capacity, cache.k.shape[3])
    v_like = nothing.expand(batch, kv_heads, cache.capacity, cache.v.shape[3])

    if isinstance(cache.lengths, Tensor):
        lengths = cache.lengths.to(torch.int64)
    else:
        lengths = torch.full((batch,), cache.lengths, dtype=torch.int64, device=q.device)
    totals = lengths if k is None else lengths + k.shape[2]
    q_start = totals - q_length
    left = None if cache.left_padding is None else cache.left_padding.to(torch.int64)
    given = as_mask(mask)
    if any(isinstance(c, Documents) for clause in given.clauses for c in clause):
        raise ValueError(
            "mask: expected no documents(...) with a cache, where each sequence of the batch is a document"
        )
    seen = given & Mask(((Filled(left, totals),),))
    check_inputs(q, k_like, v_like)
    check_options(q, k_like, seen, bias, softcap, sinks, 0.0, q_start, None)
    if rotary is not None:
        cos, sin, interleaved = Rotary(*rotary)
        q = rotate(q, cos, sin, interleaved=interleaved, start=q_start)
        if k is not None:
            k = rotate(k, cos, sin, interleaved=interleaved, start=lengths)
    return _Step(
        q=q,
        k=k,
        v=v,
        k_like=k_like,
        v_like=v_like,
        lengths=lengths,
        totals=totals,
        q_start=q_start,
        mask=seen,
        bias=bias,
        where=(left, cache.block_table, cache.batch_index),
        scales=(cache.k_scale, cache.v_scale),
    )


def _can_decode(step: _Step, cache: KVCache) -> bool:
    """Whether a kernel takes the cache as it is, and it does not pay to put it together as one tensor."""
    rows = step.q.shape[1] // step.k_like.shape[1] * step.q.shape[2]  # that read the same keys
    stored = cache.k.dtype
    return rows <= 16 and stored == cache.v.dtype and stored in (step.q.dtype, *library.RANGES)


def _decode(
    step: _Step,
    cache: KVCache,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention to the cache where it lies."""
    factor = 1.0 / math.sqrt(step.q.shape[3]) if scale is None else scale
    problem = resolve(
        *(step.q, step.k_like, step.mask, step.bias, sinks, None, step.q_start, None),
        *(float(factor), float(softcap or 0.0), 0.0),
    )
    return torch.ops.fastattn.attention_decode(  # type: ignore[no-any-return]
        step.q, cache.k, cache.v, step.totals, *step.where, *step.scales, *problem, backend
    )


def _attend(
    step: _Step,
    cache: KVCache,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention to the cache put together as one tensor."""
    length, mask, bias = cache.capacity, step.mask, step.bias
    totals = readable(step.totals)
    if totals is not None:
        length = min(length, max(totals, default=0))
        mask, bias = _first_keys(mask, length), _first_keys_of_bias(bias, length)
    dtype = step.q.dtype
    if cache.k.dtype != dtype or cache.v.dtype != dtype:
        dtype = torch.promote_types(dtype, torch.float32)
    k, v = torch.ops.fastattn.kv_cache_gather(
        cache.k, cache.v, step.totals, *step.where, *step.scales, length, dtype
    )
    device = step.q.device.type
    # The dtype is the one that the cache's values need.
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        found = api.attention(
            step.q.to(dtype),
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            q_start=step.q_start,
            return_lse=True,
            backend=backend,
        )
    assert isinstance(found, tuple)
    return found[0].to(step.q.dtype), found[1]


def _first_keys(mask: Mask, length: int) -> Mask:
    """The mask of the first `length` keys. What its clauses have in common stays one object."""
    cut: dict[int, Constraint] = {}
    for constraint in (c for clause in mask.clauses for c in clause):
        own = constraint
        if isinstance(own, Dense):
            own = Dense(_cut(own.keep, length))
        elif isinstance(own, Blocks):
            own = replace(own, blocks=own.blocks[..., : -(-length // own.k_size)])
        elif isinstance(own, Lengths):
            own = Lengths(own.lengths.clamp(max=length))
        cut[id(constraint)] = own
    return Mask(tuple(tuple(cut[id(c)] for c in clause) for clause in mask.clauses))


def _first_keys_of_bias(bias: Bias, length: int) -> Bias:
    return bias if bias.dense is None else replace(bias, dense=_cut(bias.dense, length))


def _cut(x: Tensor, length: int) -> Tensor:
    return x if x.dim() == 0 or x.shape[-1] == 1 else x[..., :length]


def _sources(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    rotary: Rotary | None,
    bias: Bias,
    sinks: Tensor | None,
) -> Iterator[Tensor]:
    """What a gradient could be asked for."""
    given = [q, cache.k, cache.v, k, v, *(rotary or ())[:2], sinks, cache.k_scale, cache.v_scale, bias.dense]
    given += [part.parameter for part in bias.compact]
    return (x for x in given if isinstance(x, Tensor))
