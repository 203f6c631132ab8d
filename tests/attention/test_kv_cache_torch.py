"""Attention with a cache inside torch's subsystems, on its own terms, and with what it can't do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.kv_cache import (
    KVCache,
    Rotary,
    attention_with_kv_cache,
    explain_with_kv_cache,
)
from fastattn.testing import present_isas
from tests.attention.kv_cache_cases import new, pages, rotary_tables, rows

BACKENDS = ["reference", *(["cpu"] if present_isas() else [])]
OPS = torch.ops.fastattn


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_is_attention_to_the_whole(backend: str) -> None:
    """A prompt and then token after token, against one causal call without a cache."""
    q, k, v = new(length=19)
    rotary = rotary_tables()
    turned = [fastattn.ops.rotary.rotary(x, rotary.cos, rotary.sin) for x in (q, k)]
    want = fastattn.attention(*turned, v, mask=fastattn.causal(), backend=backend)
    cache = KVCache(
        torch.empty(2, 2, 24, 8), torch.empty(2, 2, 24, 8), lengths=torch.zeros(2, dtype=torch.int32)
    )
    found = []
    for first, end in ((0, 11), *((n, n + 1) for n in range(11, 16)), (16, 19)):
        part = [x[:, :, first:end] for x in (q, k, v)]
        found.append(
            attention_with_kv_cache(
                part[0], cache, *part[1:], rotary=rotary, mask=fastattn.causal(), backend=backend
            )
        )
        cache.lengths += end - first
    torch.testing.assert_close(torch.cat(found, 2), want)
    assert torch.equal(cache.v[:, :, :19], v)


@pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="torch.matmul, which the reference is made of, promises nothing"
)
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("make", [rows, pages])
def test_a_row_does_not_depend_on_its_batch_and_threads(make: Callable[..., KVCache], length: int) -> None:
    """Bitwise, whatever lengths the neighbours have, and alone; of a token, and of a prompt behind others."""
    room = {"capacity": 1600} if make is rows else {"size": 64, "count": 25}
    q, k, v = new(batch=3, length=length)
    threads, results = torch.get_num_threads(), []
    for other, count in ((2, 1), (1500, 2)):
        torch.manual_seed(1)
        cache = make(torch.tensor([1150, other, 0]), **room)
        torch.set_num_threads(count)
        try:
            found = attention_with_kv_cache(q, cache, k, v, mask=fastattn.causal(), backend="cpu")
        finally:
            torch.set_num_threads(threads)
        results.append(found[0])
    torch.manual_seed(1)
    cache = make(torch.tensor([1150, 2, 0]), **room)
    cache.lengths = 1150
    if cache.block_table is not None:
        cache.block_table = cache.block_table[:1]
    alone = attention_with_kv_cache(q[:1], cache, k[:1], v[:1], mask=fastattn.causal(), backend="cpu")
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_many_keys(stored: torch.dtype, backend: str) -> None:
    """More than are worked on at once, in pages of no round size; against attention to them as one tensor."""
    lengths = torch.tensor([1731, 513])
    paged, (q, k, v) = pages(lengths, size=37, count=47, left_padding=torch.tensor([600, 0])), new(length=2)
    if stored is not torch.float32:
        paged.k, paged.v = ((x * 30).clamp(-127, 127).to(stored) for x in (paged.k, paged.v))
        paged.k_scale, paged.v_scale = torch.full((2, 1), 0.03), torch.tensor([0.02, 0.04])
    mask = fastattn.sliding_window(1200, 0)
    found = attention_with_kv_cache(q, paged, k, v, mask=mask, backend=backend, return_lse=True)
    assert paged.block_table is not None
    flat = [x.float()[paged.block_table].transpose(1, 2).flatten(2, 3) for x in (paged.k, paged.v)]
    if paged.k_scale is not None and paged.v_scale is not None:
        flat = [flat[0] * paged.k_scale[..., None, None], flat[1] * paged.v_scale[:, None, None]]
    key = torch.arange(37 * 47)
    last = (lengths[:, None] + torch.arange(2))[:, None, :, None]
    seen = (key <= last) & (key >= last - 1200) & (key >= torch.tensor([600, 0]).view(2, 1, 1, 1))
    want = fastattn.attention(
        q.double(), *(x.double() for x in flat), mask=seen, backend="reference", return_lse=True
    )
    torch.testing.assert_close([x.double() for x in found], [x.double() for x in want], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_with_more_rows_than_the_batch(backend: str) -> None:
    (q, k, v), results = new(), []
    for extra in (0, 3):
        torch.manual_seed(0)
        cache = rows(torch.tensor([5, 8]))
        cache.k, cache.v = (
            torch.cat((x, torch.full((extra, *x.shape[1:]), torch.nan))) for x in (cache.k, cache.v)
        )
        results.append(attention_with_kv_cache(q, cache, k, v, backend=backend))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_rows_bitwise(backend: str) -> None:
    lengths = torch.tensor([17, 4])
    paged, (q, k, v) = pages(lengths), new()
    assert paged.block_table is not None
    flat = [x[paged.block_table].transpose(1, 2).flatten(2, 3) for x in (paged.k, paged.v)]
    want = attention_with_kv_cache(q, KVCache(*flat, lengths), k, v, backend=backend)
    assert torch.equal(attention_with_kv_cache(q, paged, k, v, backend=backend), want)


@pytest.mark.parametrize("given", [int, torch.int32, torch.int64])
def test_lengths_of_any_kind(given: Any) -> None:
    lengths = 7 if given is int else torch.full((2,), 7, dtype=given)
    (q, k, v), results = new(), []
    for n in (lengths, torch.tensor([7, 7])):
        torch.manual_seed(0)
        results.append(attention_with_kv_cache(q, rows(n), k, v))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_and_more_queries_than_keys(backend: str) -> None:
    q, _, _ = new(length=3)
    out, lse = attention_with_kv_cache(
        q, rows(torch.tensor([0, 2])), mask=fastattn.causal(), return_lse=True, backend=backend
    )
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == float("-inf")).all())
    assert bool((lse[1, :, 0] == float("-inf")).all())  # position -1
    assert bool(lse[1, :, 1:].isfinite().all())
    assert attention_with_kv_cache(q[:, :, :0], rows(4), backend=backend).shape == (2, 4, 0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_are_tensors_count_keys_by_the_capacity(backend: str) -> None:
    cache, (q, k, v) = rows(torch.tensor([9, 3])), new(length=2)
    keep = torch.rand(2, 1, 2, 24) > 0.4
    blocks = torch.rand(1, 5) > 0.3
    mask = (
        keep
        & (fastattn.block_sparse(blocks, (2, 5)) | fastattn.prefix(1))
        & fastattn.key_padding(torch.tensor([24, 4]))
    )
    found = attention_with_kv_cache(q, cache, k, v, mask=mask, backend=backend)
    there = torch.arange(24) < torch.tensor([11, 4])[:, None]
    dense = keep & (blocks.repeat_interleave(5, 1)[:, :24] | (torch.arange(24) < 1)) & there[:, None, None]
    want = fastattn.attention(q, cache.k, cache.v, mask=dense, backend=backend)
    torch.testing.assert_close(found, want)


def test_scores_are_scaled_as_asked() -> None:
    cache, (q, k, v) = rows(torch.tensor([9, 3])), new()
    found = attention_with_kv_cache(q, cache, k, v, scale=0.7)
    torch.testing.assert_close(found, attention_with_kv_cache(q * 0.7 * math.sqrt(8), cache, k, v))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_values_stay_within_the_range(dtype: torch.dtype) -> None:
    """They saturate, where a plain cast to e4m3 gives NaN; halves go to even."""
    top = 448.0 if dtype == torch.float8_e4m3fn else 127.0
    k = torch.tensor([1e4, -1e4, 0.25, 0.75, float("inf"), 0.0, 1.0, -3.0]).expand(1, 1, 1, 8).contiguous()
    store = [torch.zeros(1, 1, 4, 8, dtype=dtype) for _ in range(2)]
    cache = KVCache(*store, 0, k_scale=torch.tensor(0.5), v_scale=torch.tensor([[0.0]]))
    out = attention_with_kv_cache(torch.zeros(1, 1, 1, 8), cache, k, k)
    low = -448.0 if dtype == torch.float8_e4m3fn else -128.0
    halves = [0.5, 1.5] if dtype == torch.float8_e4m3fn else [0.0, 2.0]
    assert cache.k[0, 0, 0].float().tolist() == [top, low, *halves, top, 0.0, 2.0, -6.0]
    assert bool((out == 0).all())  # of a scale of 0


def step(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rotary: Rotary) -> tuple[Tensor, Tensor]:
    mask = fastattn.sliding_window(9, 0)
    out, lse = attention_with_kv_cache(q * 2, cache, k, v, rotary=rotary, mask=mask, return_lse=True)
    return out.transpose(1, 2).flatten(2).sin(), lse


@pytest.mark.parametrize("make", [rows, pages])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph_for_all_lengths(backend: str, make: Callable[..., KVCache]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    rotary = rotary_tables()
    for lengths in ([0, 3], [7, 23], [24, 1]):
        results = []
        for f in (step, compiled):
            torch.manual_seed(0)
            cache = make(torch.tensor(lengths), **({"capacity": 25} if make is rows else {}))
            results.append([*f(*new(), cache, rotary), cache.k, cache.v])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_one_tensor_of_keys_and_values_and_an_int(backend: str) -> None:
    """Both caches are views of one input; an int becomes a symbol when it first changes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def f(q: Tensor, k: Tensor, v: Tensor, both: Tensor, length: int) -> Tensor:
        out = attention_with_kv_cache(q, KVCache(both[0], both[1], length), k, v)
        assert isinstance(out, Tensor)
        return out + both[0, :, :1, :1]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for length in range(3, 9):
        given, both = new(), torch.randn(2, 2, 2, 24, 8)
        other = both.clone()
        torch.testing.assert_close(compiled(*given, both, length), f(*given, other, length))
        assert torch.equal(both, other)
    assert counter.frame_count <= 2


def test_export() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.zeros(2, 2, 24, 8))
            self.register_buffer("v", torch.zeros(2, 2, 24, 8))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
            return attention_with_kv_cache(q, KVCache(self.k, self.v, lengths), k, v)

    given, module = new(), Step()
    exported = torch.export.export(Step(), (*given, torch.tensor([0, 3]))).module()
    for lengths in ([0, 0], [1, 1]):
        want = module(*given, torch.tensor(lengths))
        torch.testing.assert_close(exported(*given, torch.tensor(lengths)), want)


def test_compile_with_quantised_pages_and_left_padding() -> None:
    torch._dynamo.reset()
    results = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        cache = pages(torch.tensor([7, 19]), left_padding=torch.tensor([2, 0]))
        cache.k, cache.v = cache.k.mul(40).to(torch.int8), cache.v.to(torch.float8_e4m3fn)
        cache.k_scale = torch.tensor([0.02, 0.03])
        results.append([*f(*new(), cache, rotary_tables()), cache.k.float(), cache.v.float()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(paged: bool) -> None:
    cache, (_, k, v) = (pages if paged else rows)(torch.tensor([7, 20])), new()
    where = (torch.tensor([1, 0]), cache.block_table, None if paged else torch.tensor([1, 0]))
    assert isinstance(cache.lengths, Tensor)
    torch.library.opcheck(OPS.kv_cache_append, (cache.k, cache.v, k, v, cache.lengths, *where, None, None))
    gather = (cache.k, cache.v, cache.lengths, *where, None, None, 23, torch.float32)
    torch.library.opcheck(OPS.kv_cache_gather, gather)
    if "cpu" in BACKENDS:
        ranges = torch.tensor([[0, 4], [2, 20]]).view(2, 1, 1, 2).to(torch.int32)
        problem = (None, None, ranges, *[None] * 5, -1, -1, True, 0, 0, 1, 1, 0.3, 0.0, 0.0, "cpu")
        decode = (torch.randn(2, 4, 1, 8), *gather[:-2], *problem)
        torch.library.opcheck(OPS.attention_decode, decode)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for cache in (rows(torch.tensor([7, 20])), pages(torch.tensor([7, 20]))):
        with FlopCounterMode(display=False) as counter:
            attention_with_kv_cache(*new()[:1], cache)
        counted.append(counter.get_total_flops())
    if "cpu" in BACKENDS:
        assert counted == [4 * 2 * 4 * keys * 8 for keys in (24, 25)]


@pytest.mark.parametrize("name", ["q", "k", "cache", "bias"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_an_error(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    (q, k, v), cache = new(), rows(torch.tensor([3, 8]))
    slopes = torch.ones(4)
    leaf = {"q": q, "k": k, "cache": cache.v, "bias": slopes}[name].requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, slopes: Tensor) -> Tensor:
        bias = fastattn.alibi(slopes)
        found = attention_with_kv_cache(q, cache, k, v, bias=bias, return_lse=True)
        return found[name == "k"]  # one from lse alone

    if compiled:
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    out = f(q, k, v, cache, slopes)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="attention_with_kv_cache has no gradient"):
        out.sum().backward()
    assert leaf.grad is None
    with torch.no_grad():
        assert not f(q, k, v, cache, slopes).requires_grad


def test_no_gradient_is_needed_for_what_needs_none() -> None:
    assert not attention_with_kv_cache(new()[0], rows(3)).requires_grad


def test_autocast() -> None:
    cache, (q, k, v) = rows(torch.tensor([3, 8]), dtype=torch.bfloat16), new()
    want = attention_with_kv_cache(
        *(x.bfloat16() if x is q else x for x in (q, cache)), k.bfloat16(), v.bfloat16()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_with_kv_cache(q, cache, k, v)
        assert torch.equal(found, want)
        # What a quantised cache holds is not rounded to bfloat16 on its way.
        fine = KVCache(
            cache.k.to(torch.float8_e4m3fn), cache.v.to(torch.float8_e4m3fn), 8, v_scale=torch.tensor(0.3)
        )
        inside = attention_with_kv_cache(q, fine)
    assert torch.equal(inside, attention_with_kv_cache(q.bfloat16(), fine))
    exact = attention_with_kv_cache(q.bfloat16().float(), fine)
    assert isinstance(exact, Tensor)
    assert torch.equal(inside, exact.bfloat16())


def test_explain() -> None:
    cache, (q, k, v) = rows(3), new()
    if "cpu" in BACKENDS:
        assert explain_with_kv_cache(q, cache, k, v).backend == "cpu"
    found = explain_with_kv_cache(q, cache, k, v, backend="reference")
    assert found.backend == "reference"
    q = q.double()
    assert "float64" in explain_with_kv_cache(q, cache).reasons["cpu"][0]
    with pytest.raises(NotImplementedError, match="float64"):
        attention_with_kv_cache(q, cache, backend="cpu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain_with_kv_cache(q, cache, backend="gpu")
    before = cache.k.clone()
    explain_with_kv_cache(q, cache, k.double(), v.double())
    assert torch.equal(cache.k, before)
