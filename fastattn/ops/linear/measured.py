"""Which matrix product is faster here, ours or that of torch's BLAS: measured when a shape is first met."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastattn import _backends

# What is measured is a corner of the product of at most this many rows, columns and terms.
_ROWS: Final = 256
_SIDE: Final = 2048
_ROUNDS: Final = 5
_NAMES: Final = ("ours", "torch")


class Key(NamedTuple):
    """What products are taken to be of one speed."""

    rows: int  # rounded up to a power of two, at most _ROWS
    columns: int
    terms: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    out_dtype: torch.dtype
    a_by_rows: bool
    b_by_rows: bool
    threads: int


class Choice(NamedTuple):
    """What was found.

    Attributes:
        ours: whether ours is taken.
        ratio: torch's time over ours; None where it was not measured.
        why: in words.
    """

    ours: bool
    ratio: float | None
    why: str

    def __str__(self) -> str:
        taken = "fastattn's" if self.ours else "torch's"
        return f"matrix products by {taken}: {self.why}"


_known: dict[Key, Choice] = {}


def choice(a: Tensor, b: Tensor, out: Tensor, ours: Callable[[Tensor, Tensor, Tensor], object]) -> Choice:
    """Whether `ours`, called as ``ours(a, b, out)``, is to make ``a @ b``, or torch.

    Raises:
        ValueError: the environment's FASTATTN_GEMM is neither ours nor torch.
    """
    settled = without_measuring(a, b, out)
    if settled is not None:
        return settled
    key = _key(a, b, out)
    found = _known.get(key)
    if found is None:
        if a.numel() == 0 or b.numel() == 0:
            return Choice(True, None, "nothing to multiply")
        found = _known[key] = _measure(a, b, out, ours)
    return found


def without_measuring(a: Tensor, b: Tensor, out: Tensor) -> Choice | None:
    """The choice where nothing has to be measured for it."""
    asked = os.environ.get("FASTATTN_GEMM")
    if asked and asked not in _NAMES:
        raise ValueError(f"FASTATTN_GEMM: expected one of {list(_NAMES)}, got {asked!r}")
    if asked == "ours":
        return Choice(True, None, "FASTATTN_GEMM=ours")
    if not a.dtype == b.dtype == out.dtype:
        return Choice(True, None, "dtypes differ")
    if asked == "torch":
        return Choice(False, None, "FASTATTN_GEMM=torch")
    if _backends.isa_override or os.environ.get("FASTATTN_ISA"):
        return Choice(True, None, "an instruction set was asked for")
    return None


def known(a: Tensor, b: Tensor, out: Tensor) -> str:
    """What `choice` would say, or that it will be measured."""
    found = without_measuring(a, b, out) or _known.get(_key(a, b, out))
    return str(found) if found else "matrix products by whichever is measured to be faster at the first use"


def _key(a: Tensor, b: Tensor, out: Tensor) -> Key:
    rows = 1 << max(0, min(a.shape[0], _ROWS) - 1).bit_length()
    by_rows = (a.stride(1) == 1, b.stride(1) == 1)
    return Key(rows, b.shape[1], a.shape[1], a.dtype, b.dtype, out.dtype, *by_rows, torch.get_num_threads())


def _measure(a: Tensor, b: Tensor, out: Tensor, ours: Callable[[Tensor, Tensor, Tensor], object]) -> Choice:
    cut = a.shape[0] > _ROWS or max(*b.shape) > _SIDE
    a, b = a[:_ROWS, :_SIDE], b[:_SIDE, :_SIDE]
    scratch = out.new_empty((a.shape[0], b.shape[1]))
    _seconds(ours, a, b, scratch)
    best = _seconds(ours, a, b, scratch)
    # Some products of torch's take thousands of times as long: a few rows tell.
    few = min(8, a.shape[0])
    if few < a.shape[0]:
        _seconds(_torch, a[:few], b, scratch[:few])
        if _seconds(_torch, a[:few], b, scratch[:few]) > 4 * best:
            return Choice(True, None, f"torch's took over four times as long for {few} of {a.shape[0]} rows")
    _seconds(_torch, a, b, scratch)
    theirs = _seconds(_torch, a, b, scratch)
    for _ in range(_ROUNDS):
        best = min(best, _seconds(ours, a, b, scratch))
        theirs = min(theirs, _seconds(_torch, a, b, scratch))
    ratio = theirs / best
    shape = f"[{a.shape[0]}, {a.shape[1]}] @ [{b.shape[0]}, {b.shape[1]}], {a.dtype}"
    where = f"a corner of the first such product, {shape}" if cut else shape
    return Choice(ratio >= 1, ratio, f"measured {ratio:.2f} x torch's speed for {where}")


def _torch(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def _seconds(run: Callable[[Tensor, Tensor, Tensor], object], a: Tensor, b: Tensor, out: Tensor) -> float:
    begin = time.perf_counter()
    run(a, b, out)
    return time.perf_counter() - begin
