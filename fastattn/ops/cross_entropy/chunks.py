"""Losses of a linear layer's logits, a chunk of rows at a time, so that the logits are never all there.

Gradients are made while a chunk's logits are: with dS of the logits S = x Wᵀ + b, dx = dS W, dW = dSᵀ x and
db = 1ᵀ dS, which makes three products in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastattn.ops.cross_entropy.library import WANTED_BIAS, WANTED_WEIGHT, WANTED_X


class MatMul(Protocol):
    """``out = a @ b + bias``, or ``out += a @ b``, any of them in float32."""

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class Chunks:
    """Even parts of `rows`, each of at most `most` rows."""

    rows: int
    most: int

    @property
    def count(self) -> int:
        return -(-self.rows // max(1, self.most))

    @property
    def size(self) -> int:
        """Of the largest part."""
        return -(-self.rows // max(1, self.count))

    def __iter__(self) -> Iterator[slice]:
        for begin in range(0, self.rows, max(1, self.size)):
            yield slice(begin, min(begin + self.size, self.rows))


class Gradients:
    """Those of a linear layer that are wanted, summed up from the gradients of chunks of its output."""

    def __init__(self, x: Tensor, weight: Tensor, chunks: int, wanted: int, matmul: MatMul) -> None:
        # One product is rounded to weight's dtype once; a sum of them is kept in float32 till it is whole.
        dtype = weight.dtype if chunks == 1 else torch.float32
        self.x, self.weight, self.matmul = x, weight, matmul
        self.dx = x.new_empty(x.shape if wanted & WANTED_X else (0,))
        self.dweight = weight.new_empty(weight.shape if wanted & WANTED_WEIGHT else (0,), dtype=dtype)
        classes = weight.shape[0] if wanted & WANTED_BIAS else 0
        self.dbias = weight.new_zeros((classes,), dtype=torch.float32)
        self.wanted = wanted
        if chunks == 0:
            self.dweight.zero_()

    def add(self, chunk: slice, dlogits: Tensor) -> None:
        """What the rows of `chunk` give."""
        if self.wanted & WANTED_X:
            self.matmul(dlogits, self.weight, self.dx[chunk])
        if self.wanted & WANTED_WEIGHT:
            self.matmul(dlogits.t(), self.x[chunk], self.dweight, accumulate=chunk.start > 0)
        if self.wanted & WANTED_BIAS:
            self.dbias += dlogits.sum(0, dtype=torch.float32)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """``dx``, ``dweight``, ``dbias``; empty where not wanted."""
        return self.dx, self.dweight.to(self.weight.dtype), self.dbias.to(self.weight.dtype)
