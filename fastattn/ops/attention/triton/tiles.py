"""Lists of the tiles that hold a score, for masks that leave no interval of keys: blocks, tensors, unions.

For every tile of queries the tiles of keys that some of its queries see, in order: from the front those that
all of them see whole, from the back those that need the mask. For dk and dv the other way round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops.attention.triton import launch
from fastattn.ops.attention.triton.arguments import Band, Place, Problem
from fastattn.ops.attention.triton.tile import pair_of, seen


class Tiles(NamedTuple):
    """int32 ``[B or 1, H or 1, tiles]`` and ``[B or 1, H or 1, tiles, others]``, contiguous.

    Attributes:
        whole: how many tiles from the front are seen whole.
        part: how many from the back are seen in part.
        index: which they are.
        by_batch, by_head: whether each has its own.
    """

    whole: Any = None
    part: Any = None
    index: Any = None
    by_batch: Any = None
    by_head: Any = None


def need_tiles(problem: Problem, of_keys: bool = False) -> bool:
    """Whether what is seen is no interval that a kernel can tell by itself."""
    several = problem.ranges is not None and (of_keys or problem.pairs.value > 1)
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
    of_queries, others = (launch.cdiv(length, size) for length, size in zip(lengths, sizes, strict=True))
    tiles, others = (others, of_queries) if of_keys else (of_queries, others)
    given = next(x for x in (problem.ranges, problem.blocks, problem.mask) if x is not None)
    whole, part = given.new_empty((2, *lists, tiles), dtype=torch.int32).unbind()
    index = given.new_empty((*lists, tiles, others), dtype=torch.int32)
    found = Tiles(whole, part, index, tl.constexpr(by_batch), tl.constexpr(by_head))
    if whole.numel() > 0:
        _list_tiles[(lists[0] * lists[1], tiles)](
            found,
            problem,
            lists[1],
            others,
            *lengths,
            *band,
            QUERIES=sizes[0],
            KEYS=sizes[1],
            OF_KEYS=of_keys,
        )
    return found


@triton.jit(do_not_specialize=["heads", "others", "q_length", "k_length", "first", "end"])
def _list_tiles(
    found,
    problem,
    heads,
    others,
    q_length,
    k_length,
    first,
    end,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    list_ = tl.program_id(0)
    tile = tl.program_id(1)
    place = Place(list_ // heads, list_ % heads, q_length, k_length, first, end, None)
    here = list_.to(tl.int64) * tl.num_programs(1) + tile
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
