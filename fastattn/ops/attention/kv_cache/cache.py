"""What a cache of keys and values is, and what has to hold of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.constraints import Constraint, Interval, Positions
from fastattn.ops.attention.kv_cache.library import RANGES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *RANGES)


class Rotary(NamedTuple):
    """The rotary embedding of new queries and keys; see `fastattn.rotary`.

    Attributes:
        cos: ``[P, R / 2]``, for positions 0 to P - 1.
        sin: the same.
        interleaved: the pairs are the dimensions (0, 1), (2, 3), …; else (0, R/2), (1, R/2 + 1), …
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


@dataclass(eq=False)
class KVCache:
    """Keys and values of sequences of their own lengths, in one tensor each or in pages.

    Attributes:
        k: ``[B_cache, H_kv, capacity, D]``, or with `block_table` pages ``[pages, H_kv, page_size, D]`` of
            any size; float32, bfloat16, float16, int8, float8_e4m3fn (float64 in the reference backend), of
            any strides.
        v: ``[B_cache, H_kv, capacity, D_v]`` or ``[pages, H_kv, page_size, D_v]``, of one of these dtypes.
        lengths: how many keys each sequence has, before new ones are appended; an integer tensor ``[B]``, or
            an int for all. Moving it on is up to the caller: ``cache.lengths += k.shape[2]``.
        block_table: integer tensor ``[B, n]``: key j of sequence b is in page
            ``block_table[b, j // page_size]``. Entries for pages without keys may be anything.
        batch_index: integer tensor ``[B]``: sequence b is row ``batch_index[b]`` of k and v; row b if None.
            Where keys are appended no row may occur twice.
        left_padding: integer tensor ``[B]``: keys before it are padding and are not seen. Positions are not
            moved by it: they count from the first slot.
        k_scale: float tensor that broadcasts to ``[B, H_kv]``: a key is what is stored times it. Needed for
            int8; 1 for float8_e4m3fn if None; None for other dtypes.
        v_scale: the same of the values.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor | int
    block_table: Tensor | None = None
    batch_index: Tensor | None = None
    left_padding: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def capacity(self) -> int:
        """How many keys a sequence can have."""
        slots = self.k.shape[2]
        return slots if self.block_table is None else self.block_table.shape[1] * slots


@dataclass(frozen=True, eq=False)
class Filled(Constraint):
    """Key index from `first` on, int64 ``[B]`` or None, and below `end`, int64 ``[B]``."""

    first: Tensor | None
    end: Tensor

    def interval(self, positions: Positions) -> Interval | None:
        return None if self.first is None else self.first[:, None], self.end[:, None]


def check_cache(q: Tensor, cache: KVCache, k: Tensor | None, v: Tensor | None) -> None:
    """Everything that shapes, dtypes and devices tell, against q ``[B, H, L_q, D]``."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a fastattn.KVCache, got {type(cache).__name__}")
    batch = q.shape[0]
    for name, x in (("cache.k", cache.k), ("cache.v", cache.v)):
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a tensor of one of {[str(t) for t in _DTYPES]}, got {got}")
        if x.dtype == torch.float64 and q.dtype != torch.float64:
            raise TypeError(f"{name}: expected float64 only with a q of float64, got it with {q.dtype}")
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch or pages, heads, slots, head_dim], got {list(x.shape)}"
            )
        _check_device(name, x, q)
    if cache.k.shape[:3] != cache.v.shape[:3]:
        raise ValueError(
            f"cache.v: expected cache.k's pages, heads and slots {list(cache.k.shape[:3])}, "
            f"got {list(cache.v.shape[:3])}"
        )
    rows, kv_heads = cache.k.shape[:2]
    if cache.block_table is not None and cache.batch_index is not None:
        raise ValueError("block_table, batch_index: expected at most one of them, got both")
    if cache.block_table is None and cache.batch_index is None and rows < batch:
        raise ValueError(f"cache.k: expected at least q's batch of {batch} rows, got {rows}")
    if isinstance(cache.lengths, Tensor):
        _check_index("lengths", cache.lengths, (batch,), q)
    elif isinstance(cache.lengths, bool) or not isinstance(cache.lengths, (int, torch.SymInt)):
        raise TypeError(f"lengths: expected an int or an integer tensor, got {type(cache.lengths).__name__}")
    for name, index in (("batch_index", cache.batch_index), ("left_padding", cache.left_padding)):
        if index is not None:
            _check_index(name, index, (batch,), q)
    if cache.block_table is not None:
        _check_index("block_table", cache.block_table, (batch, -1), q)
    _check_scale("k_scale", cache.k_scale, cache.k, q)
    _check_scale("v_scale", cache.v_scale, cache.v, q)
    if k is None or v is None:
        return
    for name, x, stored in (("k", k, cache.k), ("v", v, cache.v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        wanted = (batch, kv_heads, k.shape[2] if k.dim() == 4 else -1, stored.shape[3])
        if x.shape != wanted:
            raise ValueError(f"{name}: expected {_shape(wanted)}, got {list(x.shape)}")
        _check_device(name, x, q)
        if any(size > 1 and step == 0 for size, step in zip(stored.shape, stored.stride(), strict=True)):
            raise ValueError(
                f"cache.{name}: expected memory for each slot, to be written to, got an expanded tensor of "
                f"strides {list(stored.stride())}"
            )


def _check_index(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    if x.dim() != len(shape) or any(
        have != want for have, want in zip(x.shape, shape, strict=True) if want >= 0
    ):
        raise ValueError(f"{name}: expected {_shape(shape)}, got {list(x.shape)}")
    _check_device(name, x, q)


def _check_scale(name: str, scale: Tensor | None, stored: Tensor, q: Tensor) -> None:
    if scale is None:
        if stored.dtype == torch.int8:
            raise ValueError(f"{name}: expected a float tensor with a cache of int8, got None")
        return
    if stored.dtype not in RANGES:
        raise ValueError(f"{name}: expected None with a cache of {stored.dtype}, got a tensor")
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name}: expected a float tensor, got {got}")
    full = (q.shape[0], stored.shape[1])
    padded = (1,) * (2 - scale.dim()) + tuple(scale.shape)
    if scale.dim() > 2 or any(have not in (1, want) for have, want in zip(padded, full, strict=True)):
        raise ValueError(
            f"{name}: expected a shape broadcastable to {list(full)} (batch, heads), got {list(scale.shape)}"
        )
    _check_device(name, scale, q)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def _shape(wanted: tuple[int, ...]) -> str:
    return f"[{', '.join('any' if n < 0 else str(n) for n in wanted)}]"
