"""The cache as torch ops: checked, appended to in place, read as one tensor. Speaks to torch.

What lies in a slot that holds no key is never looked at: it may be NaN.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops import flops
from fastattn.ops.attention.flops import DECODE
from fastattn.ops.attention.library import _PROBLEM as PROBLEM
from fastattn.ops.attention.library import _kernels as kernels
from fastattn.ops.attention.library import new_heads_last

_SCALES: Final = "Tensor? k_scale, Tensor? v_scale"
_WHERE: Final = "Tensor? left_padding, Tensor? block_table, Tensor? batch_index"
torch.library.define(
    "fastattn::kv_cache_append",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "
    f"{_WHERE}, {_SCALES}) -> ()",
)
# Of sequences of `totals` keys the first `length`, in `dtype`, with 0 in the places that hold no key.
torch.library.define(
    "fastattn::kv_cache_gather",
    f"(Tensor k_cache, Tensor v_cache, Tensor totals, {_WHERE}, {_SCALES}, SymInt length, ScalarType dtype) "
    "-> (Tensor k, Tensor v)",
)
# Attention of few queries, by kernels that read the cache where it lies.
torch.library.define(
    "fastattn::attention_decode",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor totals, {_WHERE}, {_SCALES}, {PROBLEM}) "
    "-> (Tensor out, Tensor lse)",
)
torch.library.define("fastattn::kv_cache_gradient", "(Tensor dout, Tensor dlse, Tensor x) -> Tensor")

# What the quantised dtypes hold.
RANGES: Final = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}


@torch.library.impl("fastattn::kv_cache_append", "default")
def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    left_padding: Tensor | None,
    block_table: Tensor | None,
    batch_index: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check(k_cache, lengths, lengths + k.shape[2], left_padding, block_table, batch_index)
    if k.numel() > 0:
        _check_apart(k_cache, v_cache, k, v, batch_index)
    position = lengths[:, None] + torch.arange(k.shape[2], device=k.device)  # [B, L_new]
    if block_table is not None:
        page_size = k_cache.shape[2]
        row = block_table.to(torch.int64).gather(1, position // page_size)
        slot = position % page_size
    else:
        row, slot = _rows(batch_index, lengths)[:, None], position
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        _bits(cache)[row, :, slot] = _bits(quantised(x, cache.dtype, scale)).transpose(1, 2)


@torch.library.impl("fastattn::kv_cache_gather", "default")
def _gather(
    k_cache: Tensor,
    v_cache: Tensor,
    totals: Tensor,
    left_padding: Tensor | None,
    block_table: Tensor | None,
    batch_index: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    length: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check(k_cache, totals, totals, left_padding, block_table, batch_index)
    key = torch.arange(length, device=totals.device)
    seen = key < totals[:, None]
    if left_padding is not None:
        seen = seen & (key >= left_padding[:, None])
    found = []
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        x = _sequences(_bits(cache), block_table, batch_index, totals, length).view(cache.dtype)
        x = dequantised(x, scale).to(dtype)
        found.append(x.masked_fill(~seen[:, None, :, None], 0))
    return found[0], found[1]


@torch.library.impl("fastattn::attention_decode", ("cpu", "cuda"))
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    totals: Tensor,
    left_padding: Tensor | None,
    block_table: Tensor | None,
    batch_index: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *problem: Any,
) -> tuple[Tensor, Tensor]:
    check(k_cache, totals, totals, left_padding, block_table, batch_index)
    if batch_index is not None:
        block_table = batch_index[:, None]  # a row is a page
    if block_table is None:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    else:
        block_table = block_table.to(torch.int32)
    full = (q.shape[0], k_cache.shape[1])
    scales = (
        None if scale is None else scale.to(torch.float32).expand(full).contiguous()
        for scale in (k_scale, v_scale)
    )
    *rest, backend = problem
    found: tuple[Tensor, Tensor] = kernels(backend).decode(q, k_cache, v_cache, block_table, *scales, *rest)
    return found


@torch.library.register_fake("fastattn::attention_decode")
def _fake_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return new_heads_last(q, batch, heads, length, v_cache.shape[3]), lse


@torch.library.register_fake("fastattn::kv_cache_append")
def _fake_append(*args: Any) -> None:
    pass


@torch.library.register_fake("fastattn::kv_cache_gather")
def _fake_gather(k_cache: Tensor, v_cache: Tensor, totals: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    length, dtype = args[-2:]
    k, v = (
        cache.new_empty((totals.shape[0], cache.shape[1], length, cache.shape[3]), dtype=dtype)
        for cache in (k_cache, v_cache)
    )
    return k, v


def _sequences(
    cache: Tensor, block_table: Tensor | None, batch_index: Tensor | None, totals: Tensor, length: int
) -> Tensor:
    """The first `length` slots of each sequence, ``[B, H_kv, length, D]``."""
    if block_table is None:
        return cache[:, :, :length].index_select(0, _rows(batch_index, totals))
    pages, heads, page_size, dim = cache.shape
    count = -(-length // page_size)
    # Entries that no key needs may be anything.
    row = block_table[:, :count].to(torch.int64).clamp(0, pages - 1)
    found = cache.index_select(0, row.flatten()).view(*row.shape, heads, page_size, dim)
    return found.transpose(1, 2).reshape(row.shape[0], heads, count * page_size, dim)[:, :, :length]


def _rows(batch_index: Tensor | None, lengths: Tensor) -> Tensor:
    if batch_index is None:
        return torch.arange(lengths.shape[0], device=lengths.device)
    return batch_index.to(torch.int64)


def _bits(x: Tensor) -> Tensor:
    """Its memory as a dtype that can be indexed."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def quantised(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """x / scale in `dtype`, rounded to the nearest and kept within what it holds; scale fits ``[B, H]``."""
    if dtype not in RANGES:
        return x.to(dtype)
    x = x.to(torch.float32)
    if scale is not None:
        # All values of a head with scale 0 are read as 0.
        x = x / torch.where(scale == 0, 1, scale)[..., None, None]
    x = x.clamp(*RANGES[dtype])
    return (x if dtype.is_floating_point else x.round()).to(dtype)


def dequantised(x: Tensor, scale: Tensor | None) -> Tensor:
    """What `quantised` stored, in float32; of another dtype x itself."""
    if x.dtype not in RANGES:
        return x
    x = x.to(torch.float32)
    return x if scale is None else x * scale[..., None, None]


def check(
    cache: Tensor,
    lengths: Tensor,
    totals: Tensor,
    left_padding: Tensor | None,
    block_table: Tensor | None,
    batch_index: Tensor | None,
) -> None:
    """Raise RuntimeError unless there is a slot for each of the keys that are there and that are to come.

    Reads what is in the tensors. On a GPU that would stop the queue: there what does not fit is an
    assertion that fails on the device.
    """
    rows, page_size = cache.shape[0], cache.shape[2]
    _require(lengths >= 0, "lengths: expected 0 or more", lengths)
    if block_table is None:
        _require(totals <= page_size, f"capacity: expected at most {page_size} keys in each sequence", totals)
        if batch_index is not None:
            fits = (batch_index >= 0) & (batch_index < rows)
            _require(fits, f"batch_index: expected 0 to {rows - 1} (rows of the cache)", batch_index)
        return
    reach = block_table.shape[1] * page_size
    given = f"{block_table.shape[1]} pages of {page_size}"
    _require(
        totals <= reach, f"block_table: expected at most {reach} keys in each sequence ({given})", totals
    )
    start = torch.arange(0, reach, page_size, device=totals.device)
    needed = start < totals[:, None]
    if left_padding is not None:
        needed &= start + page_size > torch.minimum(left_padding, lengths)[:, None]
    fits = (block_table >= 0) & (block_table < rows) | ~needed
    _require(fits, f"block_table: expected 0 to {rows - 1} for pages that hold keys", block_table)


def _check_apart(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, batch_index: Tensor | None) -> None:
    """Raise RuntimeError where what is written would overwrite what is written."""
    # Values that are a part of the keys, in the cache and anew, are the same in both.
    if k_cache.shape == v_cache.shape and k_cache.data_ptr() == v_cache.data_ptr():
        _require(k == v, "cache.k, cache.v: expected memory of their own, got the same")
    if batch_index is not None:
        rows = batch_index.sort().values
        apart = rows[1:] != rows[:-1]
        _require(apart, "batch_index: expected each row once where keys are appended", batch_index)


def _require(fits: Tensor, message: str, given: Tensor | None = None) -> None:
    message = f"fastattn.attention_with_kv_cache: {message}"
    if fits.is_cuda:
        torch._assert_async(fits.all(), message)
    elif not bool(fits.all()):
        raise RuntimeError(message if given is None else f"{message}, got {given.tolist()}")


class NoGradient(torch.autograd.Function):
    """Results that have no gradient, tied to what they are made of: taking one raises."""

    @staticmethod
    def forward(out: Tensor, lse: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        op = torch.ops.fastattn.kv_cache_gradient
        return None, None, *(op(dout, dlse, x) for x in ctx.saved_tensors)


# An op of what reaches the backward, so that a compiled graph raises when that runs: not when it is traced,
# and not ahead of time.
@torch.library.impl("fastattn::kv_cache_gradient", "default")
def _gradient(dout: Tensor, dlse: Tensor, x: Tensor) -> Tensor:
    raise RuntimeError(
        "fastattn.attention_with_kv_cache has no gradient: expected a call under torch.no_grad(), or nothing "
        "that requires one; fastattn.attention has every gradient"
    )


@torch.library.register_fake("fastattn::kv_cache_gradient")
def _fake_gradient(dout: Tensor, dlse: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


flops.register(DECODE)
