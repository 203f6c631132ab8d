"""What a cache can't take is an error that says so, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention.kv_cache import (
    KVCache,
    attention_with_kv_cache,
    explain_with_kv_cache,
)
from tests.attention.kv_cache_cases import new, pages, rotary_tables, rows


def a_page_missing(cache: KVCache) -> KVCache:
    assert cache.block_table is not None
    cache.block_table[1, 3] = -1
    return cache


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda: rows(torch.tensor([3, 24])), r"capacity: expected at most 24 keys .* got \[4, 25\]"),
        (lambda: rows(24), "capacity: expected at most 24 keys"),
        (lambda: rows(torch.tensor([3, -1])), r"lengths: expected 0 or more, got \[3, -1\]"),
        (lambda: pages(torch.tensor([25, 3])), r"block_table: expected at most 25 keys .* \(5 pages of 5\)"),
        (lambda: a_page_missing(pages(torch.tensor([3, 16]))), "block_table: expected 0 to 9 for pages"),
        (lambda: a_page_missing(pages(torch.tensor([3, 15]))), "block_table: expected 0 to 9 for pages"),
        (
            lambda: rows(torch.tensor([3, 3]), batch_index=torch.tensor([0, 2])),
            r"batch_index: expected 0 to 1 \(rows of the cache\), got \[0, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_and_not_written(
    cache: Callable[[], KVCache], message: str, reading: bool
) -> None:
    given, (q, k, v) = cache(), new()
    if reading:  # the same sequences, without new keys
        given.lengths = given.lengths + (0 if "lengths" in message else 1)
        k = v = None
        message = message.replace("15", "16")
    before = given.k.clone(), given.v.clone()
    with pytest.raises(RuntimeError, match=message):
        attention_with_kv_cache(q, given, k, v)
    assert torch.equal(given.k, before[0])
    assert torch.equal(given.v, before[1])


def test_new_keys_that_overwrite_one_another_are_not_written() -> None:
    q, k, v = new()
    twice = rows(torch.tensor([3, 3]), batch_index=torch.tensor([1, 1]))
    store = torch.randn(2, 2, 24, 8)
    shared = KVCache(store, store.view(2, 2, 24, 8), torch.tensor([3, 3]))
    for cache, message in (
        (twice, r"batch_index: expected each row once .* \[1, 1\]"),
        (shared, "got the same"),
    ):
        before = cache.k.clone(), cache.v.clone()
        with pytest.raises(RuntimeError, match=message):
            attention_with_kv_cache(q, cache, k, v)
        assert torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])
        attention_with_kv_cache(q, cache)  # reading is another matter
    attention_with_kv_cache(q, shared, k, k)
    assert torch.equal(store[:, :, 3], k[:, :, 0])
    # Two halves of one buffer are apart.
    halves = torch.zeros(2, 2, 24, 16)
    attention_with_kv_cache(q, KVCache(halves[..., :8], halves[..., 8:], 3), k, v)
    assert torch.equal(halves[:, :, 3], torch.cat((k, v), -1)[:, :, 0])


def test_an_expanded_cache_can_be_read_and_not_written() -> None:
    (q, k, v), store = new(), torch.randn(1, 2, 24, 8)
    cache = KVCache(store.expand(2, -1, -1, -1), store.clone().expand(2, -1, -1, -1), 3)
    before = store.clone()
    attention_with_kv_cache(q, cache)
    with pytest.raises(ValueError, match=r"cache\.k: expected memory for each slot"):
        attention_with_kv_cache(q, cache, k, v)
    assert torch.equal(store, before)


@pytest.mark.parametrize("option", ["scale", "softcap"])
@pytest.mark.parametrize("given", ["a lot", torch.ones(2), [1.0]], ids=str)
def test_what_is_no_number_is_an_error_before_anything_is_written(option: str, given: Any) -> None:
    (q, k, v), cache = new(), rows(torch.tensor([3, 4]))
    before = cache.k.clone()
    for function in (attention_with_kv_cache, explain_with_kv_cache):
        with pytest.raises(TypeError, match=f"{option}: expected a number or None"):
            function(q, cache, k, v, **{option: given})
    assert torch.equal(cache.k, before)
    for number in (torch.tensor(0.5), 1):
        attention_with_kv_cache(q, cache, k, v, **{option: number})


def test_a_page_that_no_key_needs_may_be_missing() -> None:
    (q, k, v), results = new(), []
    for spoil in (a_page_missing, lambda cache: cache):
        torch.manual_seed(0)
        cache = spoil(pages(torch.tensor([3, 14])))
        results.append(attention_with_kv_cache(q, cache, k, v))
        cache = pages(torch.tensor([3, 14]), left_padding=torch.tensor([0, 6]))
        assert cache.block_table is not None
        cache.block_table[1, 0] = -7 if spoil is a_page_missing else 3
        results.append(attention_with_kv_cache(q, cache, k, v))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_positions_that_rotary_has_no_angle_for() -> None:
    (q, k, v), cache = new(), rows(torch.tensor([3, 16]))
    before = cache.k.clone()
    with pytest.raises(ValueError, match=r"expected positions from 0 to 15 .* got 3 to 16"):
        attention_with_kv_cache(q, cache, k, v, rotary=rotary_tables(16))
    assert torch.equal(cache.k, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": None}, TypeError, "expected a fastattn.KVCache, got NoneType"),
        ({"v": None}, ValueError, "k, v: expected both or neither"),
        ({"q": torch.zeros(4, 1, 8)}, ValueError, "q: expected 4 dimensions"),
        ({"k": torch.zeros(2, 1, 1, 8)}, ValueError, r"k: expected \[2, 2, 1, 8\], got \[2, 1, 1, 8\]"),
        ({"v": torch.zeros(2, 2, 3, 8)}, ValueError, r"v: expected \[2, 2, 1, 8\], got \[2, 2, 3, 8\]"),
        ({"k": torch.zeros(2, 2, 1, 8).half()}, TypeError, "k: expected q's dtype torch.float32"),
        ({"q": torch.zeros(2, 3, 1, 8)}, ValueError, "heads: expected k's 2 to divide q's 3"),
        ({"q": torch.zeros(2, 4, 1, 9)}, ValueError, "k: expected q's head_dim 9, got 8"),
        ({"mask": fastattn.documents(torch.tensor([0, 1]))}, ValueError, "no documents"),
        ({"mask": torch.ones(1, 1, 1, 3, dtype=torch.bool)}, ValueError, r"\[2, 4, 1, 24\]"),
        ({"bias": torch.ones(1, 1, 1, 3)}, ValueError, r"\[2, 4, 1, 24\]"),
        ({"sinks": torch.ones(3)}, ValueError, "sinks"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: expected an integer tensor"),
        ({"lengths": None}, TypeError, "lengths: expected an int or an integer tensor, got NoneType"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected \[2\], got \[1\]"),
        ({"block_table": torch.zeros(3, 2).int()}, ValueError, r"block_table: expected \[2, any\]"),
        ({"left_padding": torch.zeros(3).int()}, ValueError, r"left_padding: expected \[2\], got \[3\]"),
        (
            {"block_table": torch.zeros(2, 2).int(), "batch_index": torch.arange(2)},
            ValueError,
            "at most one of them",
        ),
        ({"k_scale": torch.ones(2)}, ValueError, "k_scale: expected None with a cache of torch.float32"),
        ({"store": torch.zeros(2, 2, 24, 8).to(torch.int8)}, ValueError, "k_scale: expected a float tensor"),
        ({"store": torch.zeros(2, 2, 24, 8).to(torch.int32)}, TypeError, "cache.k: expected a tensor of one"),
        ({"store": torch.zeros(2, 2, 24, 8).double()}, TypeError, "float64 only with a q of float64"),
        ({"store": torch.zeros(1, 2, 24, 8)}, ValueError, "expected at least q's batch of 2 rows, got 1"),
        ({"store": torch.zeros(2, 24, 8)}, ValueError, "cache.k: expected 4 dimensions"),
        (
            {
                "store": torch.zeros(2, 2, 24, 8).to(torch.int8),
                "k_scale": torch.ones(3),
                "v_scale": torch.ones(2),
            },
            ValueError,
            r"k_scale: expected a shape broadcastable to \[2, 2\] \(batch, heads\), got \[3\]",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = new()
    cache = rows(torch.tensor([3, 4]))
    given: dict[str, Any] = {"q": q, "cache": cache, "k": k, "v": v}
    for name, value in change.items():
        if name == "store":
            cache.k, cache.v = value, value.clone()
        elif hasattr(cache, name) and name not in ("k", "v"):
            setattr(cache, name, value)
        else:
            given[name] = value
    with pytest.raises(error, match=message):
        attention_with_kv_cache(**given)
    with pytest.raises(error, match=message):
        explain_with_kv_cache(**given)
