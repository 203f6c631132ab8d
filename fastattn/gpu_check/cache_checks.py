"""A step of decoding against float64: rows and pages, each dtype a cache can have, short and long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Generator, Tensor

import fastattn
from fastattn.gpu_check.checks import DTYPES
from fastattn.gpu_check.device_checks import NEEDS_A_GPU, without_waiting
from fastattn.gpu_check.report import Report

NAN: Final = float("nan")
_TOP: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Step:
    """One call of `attention_with_kv_cache`.

    Attributes:
        dtype: of queries; of the cache too where `cache_dtype` is None.
        lengths: keys in the cache before the call, of each sequence.
        new: tokens a sequence.
        page: keys a page; None for rows.
        options: of the call.
    """

    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    lengths: tuple[int, ...] = (301, 0, 777)
    new: int = 1
    page: int | None = None
    capacity: int = 1024
    window: int | None = None
    sinks: bool = False

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    @property
    def mask(self) -> fastattn.Mask:
        return fastattn.causal() if self.window is None else fastattn.sliding_window(self.window, 0)


STEPS: Final = {
    "rows": Step(),
    "float32": Step(dtype=torch.float32),
    "float16": Step(dtype=torch.float16),
    "pages of 16": Step(page=16),
    "pages of 64": Step(page=64),
    "pages of 7": Step(page=7, capacity=1001),
    "int8": Step(cache_dtype=torch.int8),
    "int8, pages of 32": Step(cache_dtype=torch.int8, page=32),
    "float8": Step(cache_dtype=torch.float8_e4m3fn),
    "float8, pages of 64": Step(cache_dtype=torch.float8_e4m3fn, page=64),
    "heads 8:8, D 128": Step(kv_heads=8, dim=128),
    "heads 16:1, D 256": Step(heads=16, kv_heads=1, dim=256),
    "4 new tokens": Step(new=4),
    "window of 100, sinks": Step(window=99, sinks=True, page=16),
    "30,000 keys, batch of one": Step(lengths=(30_000,), capacity=2**15),
    "a prompt": Step(new=150, page=64),
}
TINY: Final = {
    "rows": Step(lengths=(13, 0), capacity=32, heads=4, dim=16),
    "int8, pages of 8": Step(
        lengths=(13, 20), capacity=32, heads=4, dim=16, page=8, cache_dtype=torch.int8, dtype=torch.float32
    ),
}


class Cached:
    """A step's tensors on a device; slots without a key are NaN, or the largest there is."""

    def __init__(self, step: Step, device: torch.device, seed: int = 0) -> None:
        g = Generator(device).manual_seed(seed)
        batch = len(step.lengths)
        self.step = step
        self.q, self.k, self.v = (
            torch.randn(batch, heads, step.new, step.dim, generator=g, device=device).to(step.dtype)
            for heads in (step.heads, step.kv_heads, step.kv_heads)
        )
        lengths = torch.tensor(step.lengths, dtype=torch.int32, device=device)
        empty = (torch.arange(step.capacity, device=device)[None] >= lengths[:, None])[:, None, :, None]
        shape = (batch, step.kv_heads, step.capacity, step.dim)
        top = _TOP.get(step.stored)
        scales: dict[str, Tensor] = {}
        stores = []
        for name in ("k", "v"):
            x = torch.randn(shape, generator=g, device=device)
            if top is not None:
                scale = (torch.rand(batch, step.kv_heads, generator=g, device=device) * 2 + 4) / top
                scales[f"{name}_scale"] = scale
                x = (x / scale[..., None, None]).clamp(-top, top)
            stores.append(x.masked_fill(empty, 127 if step.stored == torch.int8 else NAN).to(step.stored))
        self.rows = tuple(stores)
        table = None
        if step.page is not None:
            count = step.capacity // step.page
            order = torch.randperm(batch * count, generator=g, device=device)
            stores = [_in_pages(x, step.page, order) for x in stores]
            table = order.view(batch, count).to(torch.int32)
        self.sinks = torch.randn(step.heads, generator=g, device=device) if step.sinks else None
        k, v = stores
        self.cache = fastattn.KVCache(k, v, lengths=lengths, block_table=table, **scales)

    def run(self, backend: str) -> Tensor:
        """The step."""
        out = fastattn.attention_with_kv_cache(
            self.q, self.cache, self.k, self.v, mask=self.step.mask, sinks=self.sinks, backend=backend
        )
        assert isinstance(out, Tensor)
        return out

    def wanted(self, sequences: int | None = None) -> Tensor:
        """What the first sequences' out should be: float64, from what the cache stores."""
        outs = []
        for b, length in enumerate(self.step.lengths[:sequences]):
            both = []
            for i, (new, scale) in enumerate(((self.k, self.cache.k_scale), (self.v, self.cache.v_scale))):
                old, fresh = self.rows[i][b, :, :length].double(), new[b].double()
                if scale is not None:
                    factor = scale[b].double()[:, None, None]
                    old, fresh = old * factor, _stored(fresh, self.step.stored, factor)
                both.append(torch.cat((old, fresh), 1)[None])
            sinks = None if self.sinks is None else self.sinks.double()
            q = self.q[b : b + 1].double()
            out = fastattn.attention(q, *both, mask=self.step.mask, sinks=sinks, backend="reference")
            assert isinstance(out, Tensor)
            outs.append(out)
        return torch.cat(outs)


def _in_pages(x: Tensor, page: int, order: Tensor) -> Tensor:
    count = x.shape[2] // page
    cut = x.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1).contiguous()
    found = torch.empty_like(cut)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    found.view(bits)[order] = cut.view(bits)
    return found


def _stored(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """What is read again of x after it was stored."""
    top = _TOP[dtype]
    x = (x / scale).clamp(-top, top)
    x = x.round() if dtype == torch.int8 else x.float().to(dtype).double()
    return x * scale


def decode(report: Report) -> None:
    """Every kind of cache; then in a CUDA graph with lengths that grow, and without waiting."""
    device = report.machine.device
    for name, step in (TINY if report.machine.dry_run else STEPS).items():

        def run(step: Step = step) -> float:
            problem = Cached(step, device)
            want = problem.wanted()
            found = problem.run(report.backend)
            eps = max(4 * torch.finfo(step.dtype).eps, 64 * torch.finfo(torch.float32).eps)
            budget = eps * max(1.0, float(want.abs().max()))
            if step.stored in _TOP:
                # A new value on the edge between two codes may be stored as either.
                budget += 0.01 * float(want.abs().max())
            error = float((found.double() - want).abs().nan_to_num(nan=math.inf).max())
            assert error <= budget, f"expected an error of at most {budget:.3g}, got {error:.3g}"
            return error / budget

        columns: dict[str, Any] = {
            "dtype": _name(step.stored),
            "batch": len(step.lengths),
            "heads": step.heads,
            "kv_heads": step.kv_heads,
            "length": max(step.lengths) + step.new,
            "head_dim": step.dim,
        }
        report.check(f"cache, {name}", run, passes="forward", **columns)
    for name in ("rows", "pages of 16"):
        cases = {f"cache in a graph, {name}": _graph, f"cache without waits, {name}": _waits}
        for case, function in cases.items():
            if report.machine.dry_run:
                report.not_run(case, NEEDS_A_GPU)
                continue

            def on_gpu(function: Any = function, step: Step = STEPS[name]) -> None:
                function(Cached(step, device), report.backend)

            report.check(case, on_gpu, passes="forward", dtype="bfloat16")


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _waits(problem: Cached, backend: str) -> None:
    without_waiting(lambda: problem.run(backend))


def _graph(problem: Cached, backend: str) -> None:
    """Five tokens by replaying one graph, against five calls."""
    by_call = Cached(problem.step, problem.q.device)
    warm = Cached(problem.step, problem.q.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm.run(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = problem.run(backend)
    for token in range(5):
        fresh = Cached(replace(problem.step, lengths=(1,) * len(problem.step.lengths)), out.device, token + 1)
        for one in (problem, by_call):
            one.q.copy_(fresh.q)
            one.k.copy_(fresh.k)
            one.v.copy_(fresh.v)
        graph.replay()
        want = by_call.run(backend)
        torch.cuda.synchronize()
        assert torch.equal(out, want), f"token {token}: expected what a call gives, got something else"
        for one in (problem, by_call):
            assert isinstance(one.cache.lengths, Tensor)
            one.cache.lengths += 1
