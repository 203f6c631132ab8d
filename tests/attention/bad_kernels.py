"""Kernels with the mistakes that `programs.check` is to find."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def overlapping(x, length, ROWS: tl.constexpr):
    """The last rows of a tile are the first of the next."""
    i = tl.program_id(0) * (ROWS - 2) + tl.arange(0, ROWS)
    tl.store(x + i, 1.0, mask=i < length)


@triton.jit
def reading_what_another_writes(x, length, ROWS: tl.constexpr):
    """A tile takes the value in front of it."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    before = tl.load(x + i - 1, mask=(i > 0) & (i < length), other=0.0)
    tl.store(x + i, before, mask=i < length)


@triton.jit
def out_of_bounds(x, length, ROWS: tl.constexpr):
    """The mask lets four rows too many through."""
    i = (tl.program_id(0) + 1) * ROWS + tl.arange(0, ROWS)
    tl.store(x + i, 1.0, mask=i < length + 4)
