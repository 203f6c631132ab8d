"""Which tiles a program goes through: those seen whole, which need no mask, and then those seen in part.

Without a list (see `tiles.py`) what a tile sees is an interval, and what is seen whole is an interval in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention.triton.tile import pair_of


class Walk(NamedTuple):
    """A way through tiles of one size.

    Attributes:
        wholes, parts: how many tiles are seen whole and in part.
        first: of an interval, where it begins, whole or not.
        whole, behind: where what is seen whole begins, and what is behind it.
        before: how many tiles are seen in part before that.
        index, last: of a list, pointers to the first that is seen whole and in part.
        low, high: under ranges, first and end of all that is seen, to the element.

    What an interval or a list does not have is 0.
    """

    wholes: Any
    parts: Any
    first: Any
    whole: Any
    behind: Any
    before: Any
    index: Any
    last: Any
    low: Any
    high: Any


@triton.jit
def nth_whole(tiles, walk, t, SIZE: tl.constexpr):
    """Where tile t of those seen whole begins."""
    if tiles.index is None:
        at = walk.whole + t * SIZE
    else:
        at = tl.load(walk.index + t) * SIZE
    return at


@triton.jit
def nth_part(tiles, walk, t, SIZE: tl.constexpr):
    """Where tile t of those seen in part begins."""
    if tiles.index is None:
        at = tl.where(t < walk.before, walk.first + t * SIZE, walk.behind + (t - walk.before) * SIZE)
    else:
        at = tl.load(walk.last - t) * SIZE
    return at


@triton.jit
def of_interest(walk, at, SIZE: tl.constexpr):
    """Which of SIZE from `at` are not outside of all that is seen."""
    index = at + tl.arange(0, SIZE)
    return (index >= walk.low) & (index < walk.high)


@triton.jit
def through_keys(problem, place, tiles, heads, at, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The tiles of keys that QUERIES queries from `at` see."""
    low, high = at * 0, at * 0 + place.k_length
    all_, all_stop = low, high
    if problem.ranges is not None:
        i = at + tl.arange(0, QUERIES)
        there = i < place.q_length
        low, high = high, low
        for pair in tl.static_range(problem.pairs):
            start, behind = pair_of(problem, place, pair, i)
            sees = start < behind
            low = tl.minimum(low, tl.min(tl.where(sees, start, place.k_length), 0))
            high = tl.maximum(high, tl.max(tl.where(sees, behind, 0), 0))
            # Of one pair; with several there is a list.
            all_ = tl.max(tl.where(there, start, 0), 0)
            all_stop = tl.min(tl.where(there, behind, place.k_length), 0)
    if tiles.index is None:
        some, stop = low, high
        last = tl.minimum(at + QUERIES, place.q_length) - 1
        if place.first is not None:
            some = tl.maximum(some, at + place.first)
            all_ = tl.maximum(all_, last + place.first)
        if place.end is not None:
            stop = tl.minimum(stop, last + place.end)
            all_stop = tl.minimum(all_stop, at + place.end)
        walk = _interval(some, stop, all_, all_stop, low, high, KEYS)
    else:
        count = tl.cdiv(place.q_length, QUERIES)
        walk = _list(tiles, place, heads, at // QUERIES, count, tl.cdiv(place.k_length, KEYS), low, high)
    return walk


@triton.jit
def through_queries(place, tiles, heads, at, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The tiles of queries that see KEYS keys from `at`. Queries behind the last count as seeing all."""
    if tiles.bounds is not None:
        row = at // KEYS
        if tiles.by_batch:
            row += place.batch * tl.cdiv(place.k_length, KEYS)
        bounds = tiles.bounds + row.to(tl.int64) * 4
        some, stop, all_, all_stop = (
            tl.load(bounds),
            tl.load(bounds + 1),
            tl.load(bounds + 2),
            tl.load(bounds + 3),
        )
        walk = _interval(some, stop, all_, all_stop, 0, 0, QUERIES)
    elif tiles.index is None:
        some, stop = at * 0, at * 0 + place.q_length
        all_, all_stop = some, tl.cdiv(stop, QUERIES) * QUERIES
        last = tl.minimum(at + KEYS, place.k_length) - 1
        if place.end is not None:
            some = tl.maximum(some, at - place.end + 1)
            all_ = tl.maximum(all_, last - place.end + 1)
        if place.first is not None:
            stop = tl.minimum(stop, last - place.first + 1)
            all_stop = tl.minimum(all_stop, at - place.first + 1)
        walk = _interval(some, stop, all_, all_stop, 0, 0, QUERIES)
    else:
        count = tl.cdiv(place.k_length, KEYS)
        walk = _list(tiles, place, heads, at // KEYS, count, tl.cdiv(place.q_length, QUERIES), 0, 0)
    return walk


@triton.jit
def _interval(some, stop, all_, all_stop, low, high, SIZE: tl.constexpr):
    """From what some and what all see, in tiles of SIZE."""
    some = some // SIZE * SIZE
    stop = tl.maximum(tl.cdiv(stop, SIZE) * SIZE, some)
    all_ = tl.cdiv(all_, SIZE) * SIZE
    all_stop = tl.maximum(all_stop, 0) // SIZE * SIZE
    none = all_stop <= all_
    whole = tl.where(none, some, all_)
    behind = tl.where(none, some, all_stop)
    before = (whole - some) // SIZE
    parts = before + (stop - behind) // SIZE
    return Walk((behind - whole) // SIZE, parts, some, whole, behind, before, 0, 0, low, high)


@triton.jit
def _list(tiles, place, heads, tile, count, others, low, high):
    """List `tile` of `count`, of at most `others` tiles."""
    row = tile * 0
    if tiles.by_batch:
        row = place.batch
    if tiles.by_head:
        row = row * heads + place.head
    here = row.to(tl.int64) * count + tile
    index = tiles.index + here * others
    wholes, parts = tl.load(tiles.whole + here), tl.load(tiles.part + here)
    return Walk(wholes, parts, 0, 0, 0, 0, index, index + others - 1, low, high)
