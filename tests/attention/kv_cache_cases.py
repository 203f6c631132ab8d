"""Small caches of two key heads of 8, in rows and in pages, and new tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import KVCache, Rotary


def rows(
    lengths: Tensor | int, capacity: int = 24, dtype: torch.dtype = torch.float32, **fields: Any
) -> KVCache:
    batch = lengths.shape[0] if isinstance(lengths, Tensor) else 2
    k, v = (torch.randn(batch, 2, capacity, 8).to(dtype) for _ in range(2))
    return KVCache(k, v, lengths, **fields)


def pages(lengths: Tensor, size: int = 5, count: int = 5, **fields: Any) -> KVCache:
    total = lengths.shape[0] * count
    k, v = (torch.randn(total, 2, size, 8) for _ in range(2))
    table = torch.randperm(total).view(lengths.shape[0], count).to(torch.int32)
    return KVCache(k, v, lengths, block_table=table, **fields)


def new(batch: int = 2, length: int = 1, heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, h, length, 8).to(dtype) for h in (heads, 2, 2)]


def rotary_tables(positions: int = 64, half: int = 4) -> Rotary:
    angle = torch.arange(float(positions))[:, None] * 7.0 ** -torch.arange(half)
    return Rotary(angle.cos(), angle.sin())
