"""What the kernels are given: pointers and strides by name. A field that is None is None at compile time.

Sizes and bounds are arguments of their own, because Triton compiles anew for a tuple's integers that are 1 or
multiples of 16, which for strides is meant and for lengths is not. A dense mask or bias has strides that are
lengths: it is compiled for lengths that are multiples of 16, and for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastattn.ops.philox import drop_threshold

# Keys and queries are fewer, so that a bound further away than this bounds nothing.
_FAR = 2**30


class Rows(NamedTuple):
    """``[B, H, L, D]`` with a unit last stride; strides in elements. `data` may be a TMA descriptor."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Sinks(NamedTuple):
    """float32 ``[B, H]``, one more score of each row."""

    data: Any = None
    batch: Any = None
    head: Any = None


class Scales(NamedTuple):
    """Factors on float8 q, k and v: float32 ``[B, H]``, ``[B, H_kv]`` and ``[B, H_kv]``."""

    q: Any = None
    k: Any = None
    v: Any = None


class Pages(NamedTuple):
    """Pages of `size` keys: which are a sequence's, int32 ``[B, columns]``; page b is sequence b if None."""

    table: Any
    columns: Any
    size: Any


class Problem(NamedTuple):
    """What changes scores beyond the band, as in `problem.Problem`; None for what is not given.

    Strides are those of tensors that broadcast to ``[B, H, L_q, L_k]``, 0 where they do. It is one tuple, not
    one of tuples, whose constants Triton 3.6 loses in a loop.

    Attributes:
        ranges: int32 ``[B, pairs, L_q, 2]``.
        blocks: a byte for each block of `block_q` queries and `block_k` keys.
        mask: a byte for each score.
        relative: float32 ``[B, H, R]``.
        origin: int32 ``[B, L_q]``.
        threshold: a key is dropped where its 16 random bits are below it.
        factor: on what is not dropped.
        aligned: whether key 0 begins a group of 128.
    """

    ranges: Any = None
    ranges_batch: Any = None
    ranges_pair: Any = None
    ranges_row: Any = None
    pairs: Any = None
    blocks: Any = None
    blocks_batch: Any = None
    blocks_head: Any = None
    blocks_row: Any = None
    blocks_column: Any = None
    block_q: Any = None
    block_k: Any = None
    mask: Any = None
    mask_batch: Any = None
    mask_head: Any = None
    mask_row: Any = None
    mask_column: Any = None
    softcap: Any = None
    bias: Any = None
    bias_batch: Any = None
    bias_head: Any = None
    bias_row: Any = None
    bias_column: Any = None
    relative: Any = None
    relative_batch: Any = None
    relative_head: Any = None
    origin: Any = None
    origin_batch: Any = None
    seed: Any = None
    threshold: Any = None
    factor: Any = None
    q_start: Any = None
    k_start: Any = None
    aligned: Any = None

    @property
    def rich(self) -> bool:
        """Whether scores are changed, or masked one by one."""
        given = (self.blocks, self.mask, self.softcap, self.bias, self.relative, self.seed)
        return any(x is not None for x in given)


class Band(NamedTuple):
    """Query i sees the keys from i + first to before i + end; None for no bound."""

    first: int | None
    end: int | None


class Place(NamedTuple):
    """Which scores a tile is part of: one batch and query head, or in decoding a head for each row."""

    batch: Any
    head: Any
    q_length: Any
    k_length: Any
    first: Any
    end: Any
    scale: Any


class Shape(NamedTuple):
    """What is known when a kernel is compiled.

    Attributes:
        dim, v_dim: D and D_v.
        width, v_width: these padded to powers of two.
        queries, keys: of a tile.
        tma: whether the tensor memory accelerator fetches what is streamed.
        plain: whether scores are q kᵀ times a positive number.
        exact: whether rounding to float32 is all that may be lost.
        precision: of float32 products, as `tl.dot` names it.
        float8: ``"no"``, ``"native"`` where the chip multiplies it, or ``"bytes"``.
    """

    dim: Any
    width: Any
    v_dim: Any
    v_width: Any
    queries: Any
    keys: Any
    tma: Any
    plain: Any
    exact: Any
    precision: Any
    float8: Any


class Saved(NamedTuple):
    """What gradients are made of: tensors, float32 ``[B, H, L_q]`` lse in base 2 and delta, the problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log2_sum: Tensor
    delta: Tensor
    options: Problem
    bounds: Band
    scale: float


def rows(x: Tensor) -> Rows:
    """Strides of ``[B, H, L, D]``."""
    return Rows(x, x.stride(0), x.stride(1), x.stride(2))


def unit_last(x: Tensor) -> Tensor:
    """`x`, copied where its last stride is not 1, or a tile's rows are further apart than 32 bits tell."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(2) < 2**23 else x.contiguous()


def strides(x: Tensor) -> tuple[int, ...]:
    """0 where x broadcasts."""
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))


def sinks(x: Tensor | None) -> Sinks:
    return Sinks() if x is None else Sinks(x, *strides(x))


def band(q_length: int, k_length: int, problem: Sequence[Any]) -> Band:
    """Of the options of `problem.Problem`, from `left` on."""
    left, right, bottom_right, q_start, k_start = problem[8:13]
    diagonal = k_length - q_length if bottom_right else q_start - k_start
    near = lambda x: max(-_FAR, min(_FAR, x))  # noqa: E731
    return Band(
        None if left < 0 else near(diagonal - left), None if right < 0 else near(diagonal + right + 1)
    )


def as_arguments(problem: Sequence[Any]) -> Problem:
    """A `problem.Problem` for kernels."""
    mask, blocks, ranges, bias, relative, origin, _sinks, seed = problem[:8]
    q_start, k_start, block_q, block_k, _scale, softcap, dropout = problem[11:18]
    given: dict[str, Any] = {}
    if ranges is not None:
        ranges = ranges.contiguous()
        given |= _with_strides("ranges", ranges, ("batch", "pair", "row"))
        given["pairs"] = tl.constexpr(ranges.shape[1])
    if blocks is not None:
        given |= _with_strides("blocks", blocks.view(torch.uint8), _SCORES)
        given |= {"block_q": block_q, "block_k": block_k}
    if mask is not None:
        given |= _with_strides("mask", mask.view(torch.uint8), _SCORES)
    if softcap > 0:
        given["softcap"] = softcap
    if bias is not None:
        bias = bias.to(torch.float32) if bias.dtype == torch.float64 else bias
        given |= _with_strides("bias", bias, _SCORES)
    if relative is not None:
        given |= _with_strides("relative", relative.contiguous(), ("batch", "head"))
    if origin is not None:
        given |= _with_strides("origin", origin.contiguous(), ("batch",))
    if dropout > 0:
        threshold = drop_threshold(dropout)
        given |= {"seed": seed, "threshold": threshold, "factor": 65536 / (65536 - threshold)}
        given |= {"q_start": q_start, "k_start": k_start, "aligned": tl.constexpr(k_start % 128 == 0)}
    return Problem(**given)


_SCORES = ("batch", "head", "row", "column")


def _with_strides(name: str, x: Tensor, axes: Sequence[str]) -> dict[str, Any]:
    """`x` as the field `name`, and the strides of its first axes."""
    steps = zip(axes, strides(x), strict=False)
    return {name: x, **{f"{name}_{axis}": step for axis, step in steps}}
