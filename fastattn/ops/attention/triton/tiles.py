"""Which tiles hold a score, where a kernel can't tell by itself: found out beforehand, by kernels too.

Blocks, tensors and unions of masks leave no interval of keys: for every tile of queries there is a list of
the tiles of keys that some of its queries see: from the front those that all of them see whole, from the back
those that need the mask. For dk and dv it is the other way round.

Where every query sees one interval of keys, as in documents, there are bounds of the queries that see a tile
of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops import gpu
from fastattn.ops.attention.triton.arguments import Band, Place, Problem
from fastattn.ops.attention.triton.tile import pair_of, seen
from fastattn.ops.attention.triton.walk import through_keys


class Tiles(NamedTuple):
    """int32 ``[B or 1, H or 1, tiles]`` and ``[B or 1, H or 1, tiles, others]``, contiguous.

    Attributes:
        whole: how many tiles from the front are seen whole.
        part: how many from the back are seen in part.
        index: which they are.
        bounds: instead of these int32 ``[B or 1, tiles, 4]``: first and end of the queries that see a tile of
            keys, and of those between them that see it whole.
        by_batch, by_head: whether each has its own.
    """

    whole: Any = None
    part: Any = None
    index: Any = None
    bounds: Any = None
    by_batch: Any = None
    by_head: Any = None


def need_list(problem: Problem) -> bool:
    """Whether what a query sees is no interval."""
    several = problem.ranges is not None and problem.pairs.value > 1
    return several or problem.blocks is not None or problem.mask is not None


def list_tiles(
    problem: Problem,
    band: Band,
    batch: int,
    heads: int,
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    of_keys: bool = False,
) -> Tiles:
    """The lists of `lengths` queries and keys in tiles of `sizes`; of each tile of keys if `of_keys`."""
    by_batch = any((problem.ranges_batch, problem.blocks_batch, problem.mask_batch))
    by_head = any((problem.blocks_head, problem.mask_head))
    lists = (batch if by_batch else 1, heads if by_head else 1)
    of_queries, others = (gpu.cdiv(length, size) for length, size in zip(lengths, sizes, strict=True))
    tiles, others = (others, of_queries) if of_keys else (of_queries, others)
    given = next(x for x in (problem.ranges, problem.blocks, problem.mask) if x is not None)
    # Each by itself, so that all are aligned.
    whole, part = (given.new_empty((*lists, tiles), dtype=torch.int32) for _ in range(2))
    index = given.new_empty((*lists, tiles, others), dtype=torch.int32)
    found = Tiles(whole, part, index, None, tl.constexpr(by_batch), tl.constexpr(by_head))
    if whole.numel() > 0:
        _list_tiles[(lists[0] * lists[1] * tiles,)](
            found,
            problem,
            lists[1],
            tiles,
            others,
            *lengths,
            *band,
            QUERIES=sizes[0],
            KEYS=sizes[1],
            OF_KEYS=of_keys,
        )
    return found


@triton.jit(do_not_specialize=["heads", "tiles", "others", "q_length", "k_length", "first", "end"])
def _list_tiles(
    found,
    problem,
    heads,
    tiles,
    others,
    q_length,
    k_length,
    first,
    end,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    list_ = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    place = Place(list_ // heads, list_ % heads, q_length, k_length, first, end, None)
    here = list_.to(tl.int64) * tiles + tile
    index = found.index + here * others
    whole = tile * 0
    part = tile * 0
    for other in range(others):
        if OF_KEYS:
            some, every = _seen_of_tile(problem, place, other * QUERIES, tile * KEYS, QUERIES, KEYS)
        else:
            some, every = _seen_of_tile(problem, place, tile * QUERIES, other * KEYS, QUERIES, KEYS)
        in_part = some & (every == 0)
        tl.store(index + whole, other, mask=every)
        tl.store(index + others - 1 - part, other, mask=in_part)
        whole += every.to(tl.int32)
        part += in_part.to(tl.int32)
    tl.store(found.whole + here, whole)
    tl.store(found.part + here, part)


@triton.jit
def _seen_of_tile(problem, place, q_at, k_at, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Whether some of the tile's queries see some of its keys, and all that are there see all."""
    i = q_at + tl.arange(0, QUERIES)
    there = i < place.q_length
    lower = tl.zeros([QUERIES], tl.int32) + k_at
    upper = tl.zeros([QUERIES], tl.int32) + tl.minimum(k_at + KEYS, place.k_length)
    if place.first is not None:
        lower = tl.maximum(lower, i + place.first)
    if place.end is not None:
        upper = tl.minimum(upper, i + place.end)
    if problem.ranges is None:
        some = lower < upper
        every = (lower <= k_at) & (upper >= k_at + KEYS)
    else:
        some = i != i
        every = i != i
        for pair in tl.static_range(problem.pairs):
            start, behind = pair_of(problem, place, pair, i)
            start = tl.maximum(start, lower)
            behind = tl.minimum(behind, upper)
            some |= start < behind
            every |= (start <= k_at) & (behind >= k_at + KEYS)
    some_ = tl.max((some & there).to(tl.int32), 0)
    every_ = tl.min((every | ~there).to(tl.int32), 0)
    # The one is decided when this is compiled, the other when it runs.
    if problem.blocks is not None or problem.mask is not None:  # noqa: SIM102
        if some_ != 0:
            j = k_at + tl.arange(0, KEYS)[None, :]
            keep = seen(problem, place, i[:, None], j)
            some_ = tl.max(tl.max(keep.to(tl.int32), 1), 0)
            every_ = tl.min(tl.min((keep | ~there[:, None]).to(tl.int32), 1), 0)
    return some_ != 0, (every_ != 0) & (some_ != 0)


# Tiles of queries that a program of `_bounds` looks at together.
_TOGETHER = 256


def bound_tiles(
    problem: Problem, band: Band, batch: int, lengths: tuple[int, int], sizes: tuple[int, int]
) -> Tiles:
    """The bounds of each tile of keys, for `lengths` queries and keys in tiles of `sizes`; linear in them."""
    batch = batch if problem.ranges_batch else 1
    of_queries, of_keys = (gpu.cdiv(length, size) for length, size in zip(lengths, sizes, strict=True))
    spans = problem.ranges.new_empty((batch, of_queries, 4))
    bounds = problem.ranges.new_empty((batch, of_keys, 4))
    if spans.numel() > 0 and bounds.numel() > 0:
        _spans[(batch * of_queries,)](
            spans, problem, Tiles(), of_queries, *lengths, *band, QUERIES=sizes[0], KEYS=sizes[1]
        )
        _bounds[(batch * of_keys,)](
            spans, bounds, of_queries, of_keys, QUERIES=sizes[0], KEYS=sizes[1], SOME=_TOGETHER
        )
    return Tiles(bounds=bounds, by_batch=tl.constexpr(batch > 1), by_head=tl.constexpr(False))


@triton.jit(do_not_specialize=["of_queries", "q_length", "k_length", "first", "end"])
def _spans(
    spans,
    problem,
    no_list,
    of_queries,
    q_length,
    k_length,
    first,
    end,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """First and end of the keys that a tile of queries sees, and of those all of it sees, in whole tiles."""
    batch = tl.program_id(0) // of_queries
    place = Place(batch, batch * 0, q_length, k_length, first, end, None)
    walk = through_keys(problem, place, no_list, 1, tl.program_id(0) % of_queries * QUERIES, QUERIES, KEYS)
    here = spans + tl.program_id(0).to(tl.int64) * 4
    tl.store(here, walk.first)
    tl.store(here + 1, walk.first + (walk.wholes + walk.parts) * KEYS)
    tl.store(here + 2, walk.whole)
    tl.store(here + 3, walk.behind)


@triton.jit(do_not_specialize=["of_queries", "of_keys"])
def _bounds(
    spans, bounds, of_queries, of_keys, QUERIES: tl.constexpr, KEYS: tl.constexpr, SOME: tl.constexpr
):
    n = tl.program_id(0) % of_keys * KEYS
    of_batch = spans + (tl.program_id(0) // of_keys).to(tl.int64) * of_queries * 4
    first, stop = of_queries + n * 0, n * 0
    whole, behind, wholes = of_queries + n * 0, n * 0, n * 0
    for at in range(0, of_queries, SOME):
        tile = at + tl.arange(0, SOME)
        span, there = of_batch + tile * 4, tile < of_queries
        sees = (tl.load(span, mask=there, other=n + 1) <= n) & (n < tl.load(span + 1, mask=there, other=0))
        every = (tl.load(span + 2, mask=there, other=n + 1) <= n) & (
            n < tl.load(span + 3, mask=there, other=0)
        )
        first = tl.minimum(first, tl.min(tl.where(sees, tile, of_queries), 0))
        stop = tl.maximum(stop, tl.max(tl.where(sees, tile + 1, 0), 0))
        whole = tl.minimum(whole, tl.min(tl.where(every, tile, of_queries), 0))
        behind = tl.maximum(behind, tl.max(tl.where(every, tile + 1, 0), 0))
        wholes += tl.sum(every.to(tl.int32), 0)
    first = tl.minimum(first, stop)
    # Those that see it whole count only where they follow one another.
    in_a_row = (wholes > 0) & (behind - whole == wholes)
    here = bounds + tl.program_id(0).to(tl.int64) * 4
    tl.store(here, first * QUERIES)
    tl.store(here + 1, stop * QUERIES)
    tl.store(here + 2, tl.where(in_a_row, whole, first) * QUERIES)
    tl.store(here + 3, tl.where(in_a_row, behind, first) * QUERIES)
