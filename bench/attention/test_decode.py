"""A step of decoding against the machine's own copy: how fast are keys and values read?

One new token for each sequence of the batch, appended and attended from, with the cache in rows or in pages;
beside it torch's sdpa on the same rows, and a plain copy of as many bytes as the cache has. They alternate in
one run, after the results agree. A copy reads and writes, a step reads: bytes per second are those moved
either way. Each run adds a row an implementation to bench/results/decode.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.rows import Clock, append, percentiles, where
from fastattn import _backends

CLOCK = Clock()
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Decode:
    """One new token for each sequence.

    Attributes:
        length: keys of each sequence, the new one included.
        page_size: of the paged cache.
        short: part of the short run.
    """

    dtype: torch.dtype = torch.float32
    batch: int = 8
    heads: int = 16
    kv_heads: int = 4
    length: int = 8192
    dim: int = 64
    page_size: int = 64
    short: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"decode-{name}-B{self.batch}-H{self.heads}:{self.kv_heads}-L{self.length}-P{self.page_size}"

    @property
    def bytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.batch * self.kv_heads * self.length * self.dim * self.dtype.itemsize

    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the new tokens."""
        g = torch.Generator().manual_seed(0)
        dtype = torch.float32 if self.quantised else self.dtype
        q, k, v = (
            torch.randn(self.batch, heads, 1, self.dim, generator=g).to(dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q, k, v

    @property
    def quantised(self) -> bool:
        return self.dtype in (torch.int8, torch.float8_e4m3fn)

    def rows(self) -> fastattn.KVCache:
        """A contiguous cache with room for just these keys."""
        g = torch.Generator().manual_seed(1)
        shape = (self.batch, self.kv_heads, self.length, self.dim)
        x = [torch.randn(shape, generator=g) for _ in range(2)]
        scales = {}
        if self.quantised:
            top = 127.0 if self.dtype == torch.int8 else 448.0
            x = [one.mul(top / 6).clamp(-top, top) for one in x]
            scales = {"k_scale": torch.tensor(6 / top), "v_scale": torch.tensor(6 / top)}
        return fastattn.KVCache(
            *(one.to(self.dtype) for one in x),
            lengths=torch.full((self.batch,), self.length - 1, dtype=torch.int32),
            **scales,
        )

    def pages(self, rows: fastattn.KVCache) -> fastattn.KVCache:
        """The same keys in pages of random order."""
        count = self.length // self.page_size
        order = torch.randperm(self.batch * count, generator=torch.Generator().manual_seed(2))
        stores = []
        for x in (rows.k, rows.v):
            cut = x.unflatten(2, (count, self.page_size)).transpose(1, 2).flatten(0, 1)
            stores.append(torch.empty_like(cut.contiguous()))
            stores[-1].view(torch.uint8)[order] = cut.contiguous().view(torch.uint8)
        table = order.view(self.batch, count).to(torch.int32)
        return replace(rows, k=stores[0], v=stores[1], block_table=table)

    def steps(self) -> dict[str, Step]:
        """By name: ``fastattn``, ``fastattn paged``, ``sdpa`` where it takes the dtype, and ``copy``."""
        q, k, v = self.new()
        rows = self.rows()
        pages = self.pages(rows)
        stores = [rows.k, rows.v]
        copies = [torch.empty_like(x) for x in stores]

        def ours(cache: fastattn.KVCache) -> Tensor:
            out = fastattn.attention_with_kv_cache(q, cache, k, v)
            assert isinstance(out, Tensor)
            return out

        def sdpa() -> Tensor:
            for store, new in zip(stores, (k, v), strict=True):
                store[:, :, -1:] = new
            return F.scaled_dot_product_attention(q, stores[0], stores[1], enable_gqa=True)

        def copy() -> Tensor:
            for to, store in zip(copies, stores, strict=True):
                to.copy_(store)
            return copies[0]

        steps: dict[str, Step] = {
            "fastattn": lambda: ours(rows),
            "fastattn paged": lambda: ours(pages),
            "copy": copy,
        }
        return steps if self.quantised else steps | {"sdpa": sdpa}


CASES = [
    Decode(heads=12, kv_heads=12, short=True),
    Decode(short=True),
    Decode(torch.bfloat16, short=True),
    Decode(torch.float16),
    Decode(torch.int8),
    Decode(torch.float8_e4m3fn),
    Decode(page_size=16),
    Decode(batch=1, length=65536),
    Decode(torch.bfloat16, heads=32, kv_heads=8, dim=128, batch=4),
]


def check(case: Decode) -> None:
    """Refuse to time a wrong result: on fewer keys, in rows and in pages, against attention in float64."""
    small = replace(case, batch=2, length=4 * case.page_size)
    (q, k, v), rows = small.new(), small.rows()
    pages = small.pages(rows)
    for cache in (rows, pages):
        found = fastattn.attention_with_kv_cache(q, cache, k, v)
        keys, values = rows.k.double(), rows.v.double()  # the first step has written to these
        if rows.k_scale is not None and rows.v_scale is not None:
            keys, values = keys * rows.k_scale, values * rows.v_scale
        exact = fastattn.attention(q.double(), keys, values, backend="reference")
        torch.testing.assert_close(found.double(), exact, atol=4 * torch.finfo(q.dtype).eps, rtol=0.01)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases", False)
    metafunc.parametrize("case", [case for case in CASES if everything or case.short], ids=str)


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(benchmark: Any, case: Decode, request: pytest.FixtureRequest) -> None:
    check(case)
    steps = case.steps()

    def seconds(step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    warm = [seconds(step) for step in steps.values()]
    rounds = max(5, min(200, int(request.config.getoption("--seconds", 4.0) / sum(warm))))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(seconds(step))

    medians = {name: percentiles(x)[1] for name, x in samples.items()}
    moved = {name: case.bytes * (2 if name == "copy" else 1) for name in steps}
    rate = {name: moved[name] / medians[name] / 1e9 for name in steps}
    torch_isa = torch.backends.cpu.get_cpu_capability().lower()
    for name, x in samples.items():
        p20, p50, p80 = (1e3 * one for one in percentiles(x))
        row = where() | {
            "isa": _backends.cpu_isa() if name.startswith("fastattn") else torch_isa,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fastattn": fastattn.__version__,
            "dtype": str(case.dtype).removeprefix("torch."),
            "batch": case.batch,
            "heads": case.heads,
            "kv_heads": case.kv_heads,
            "length": case.length,
            "head_dim": case.dim,
            "page_size": case.page_size if name == "fastattn paged" else "",
            "implementation": name,
            "rounds": rounds,
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
            "gb_per_s": round(rate[name], 2),
            "share_of_copy": round(rate[name] / rate["copy"], 3),
        }
        append("decode.csv", row)
        benchmark.extra_info[name] = row
    benchmark.extra_info["paged over rows"] = round(medians["fastattn paged"] / medians["fastattn"], 3)
    benchmark.group = str(case)
    CLOCK.replay(benchmark, samples["fastattn"])
