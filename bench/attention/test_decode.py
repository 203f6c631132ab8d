"""A step of decoding: how fast are keys and values read?

One new token for each sequence of the batch, appended and attended from, with the cache in rows or in pages,
against torch's sdpa on rows. Each implementation has a cache of its own, so that none finds what another has
just read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Problem, Race
from fastattn.gpu_check.report import Absent


@dataclass(frozen=True)
class Decode(Problem):
    """One new token for each sequence; `dtype` is the cache's, queries of an int8 or float8 one are float32.

    Attributes:
        length: keys of each sequence, the new one included.
        page_size: of the paged cache.
    """

    op = "decode"
    passes = ("forward",)
    batch: int = 8
    heads: int = 16
    kv_heads: int = 4
    length: int = 8192
    head_dim: int = 64
    page_size: int = 64

    @property
    def top(self) -> float | None:
        """The largest number of a cache that is scaled; None where it is not."""
        return {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}.get(self.dtype)

    def flops(self, which: str) -> int:
        return 4 * self.batch * self.heads * self.length * self.head_dim

    def bytes(self, which: str, race: Race, outs: Sequence[Tensor]) -> int:
        """All keys and values once, beside the new token's."""
        cache = 2 * self.batch * self.kv_heads * self.length * self.head_dim * self.dtype.itemsize
        return cache + super().bytes(which, race, outs)

    def race(self, device: torch.device) -> Race:
        g = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            return torch.randn(self.batch, heads, length, self.head_dim, generator=g, device=device)

        new = torch.float32 if self.top else self.dtype
        names = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        leaves = {name: normal(heads, 1).to(new) for name, heads in names.items()}
        keys, values = (self.quantised(normal(self.kv_heads, self.length)) for _ in range(2))
        functions = {
            "fastattn": self.ours(self.rows(keys.clone(), values.clone())),
            "fastattn paged": self.ours(self.pages(keys, values)),
            "sdpa": self.sdpa(keys.clone(), values.clone()),
        }
        return Race(leaves, functions, self.textbook(keys, values))

    def quantised(self, x: Tensor) -> Tensor:
        """As it lies in the cache."""
        if self.top is None:
            return x.to(self.dtype)
        x = (x.float() * (self.top / 6)).clamp(-self.top, self.top)
        return (x.round() if self.dtype == torch.int8 else x).to(self.dtype)

    def rows(self, keys: Tensor, values: Tensor) -> fastattn.KVCache:
        """A contiguous cache with room for just these keys, the last of them still to come."""
        scale = None if self.top is None else torch.tensor(6 / self.top, device=keys.device)
        lengths = torch.full((self.batch,), self.length - 1, dtype=torch.int32, device=keys.device)
        return fastattn.KVCache(keys, values, lengths=lengths, k_scale=scale, v_scale=scale)

    def pages(self, keys: Tensor, values: Tensor) -> fastattn.KVCache:
        """The same keys in pages of random order."""
        count = self.length // self.page_size
        g = torch.Generator().manual_seed(2)
        order = torch.randperm(self.batch * count, generator=g).to(keys.device)
        stores = []
        for x in (keys, values):
            cut = x.unflatten(2, (count, self.page_size)).transpose(1, 2).flatten(0, 1).contiguous()
            stores.append(torch.empty_like(cut))
            stores[-1].view(torch.uint8)[order] = cut.view(torch.uint8)
        table = order.view(self.batch, count).to(torch.int32)
        return replace(self.rows(keys, values), k=stores[0], v=stores[1], block_table=table)

    def ours(self, cache: fastattn.KVCache) -> Callable[..., Tensor]:
        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = fastattn.attention_with_kv_cache(q, cache, k, v)
            assert isinstance(out, Tensor)
            return out

        return step

    def sdpa(self, keys: Tensor, values: Tensor) -> Callable[..., Tensor]:
        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.top is not None:
                raise Absent(f"takes no keys of {self.dtype}")
            keys[:, :, -1:], values[:, :, -1:] = k, v
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        return step

    def textbook(self, keys: Tensor, values: Tensor) -> Callable[..., Tensor]:
        """The equation, in the queries' dtype."""

        def read(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.to(dtype) if self.top is None else x.to(dtype) * (6 / self.top)

        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[:, :, -1:], values[:, :, -1:] = self.quantised(k), self.quantised(v)
            wide = q.unflatten(1, (self.kv_heads, -1)).squeeze(3)
            scores = wide @ read(keys, q.dtype).transpose(-1, -2) * self.head_dim**-0.5
            out = torch.softmax(scores, -1) @ read(values, q.dtype)
            return out.flatten(1, 2).unsqueeze(2)

        return step


CASES = [
    Decode(heads=12, kv_heads=12),
    Decode(),
    Decode(dtype=torch.bfloat16),
    Decode(dtype=torch.float16),
    Decode(dtype=torch.int8),
    Decode(dtype=torch.float8_e4m3fn),
    Decode(page_size=16),
    Decode(batch=1, length=65536),
    Decode(batch=4, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases", False)
    metafunc.parametrize("case", CASES if everything else CASES[:3], ids=str)


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(case: Decode, compete: Callable[[Problem], None]) -> None:
    compete(case)
