"""A matrix product compiled for the targets given, as JSON: `fastattn.testing.compiled` is tested with it."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops.attention.triton import tuning
from fastattn.testing.compiled import Kernel, compile_kernels


class Matrix(NamedTuple):
    data: Any
    row: Any


@triton.jit
def product(a, b, c, LENGTH: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for k in range(0, LENGTH, SIZE):
        acc = tl.dot(tl.load(a.data + i * a.row + k + j), tl.load(b.data + (k + i) * b.row + j), acc)
    tl.store(c.data + i * c.row + j, acc.to(c.data.dtype.element_ty))


def compiled(target: str, size: int, warps: int) -> list[Kernel]:
    shapes = ((size, 4 * size), (4 * size, size), (size, size))
    matrices = [
        Matrix(x, x.stride(0)) for x in (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    ]

    def call() -> None:
        assert tuning.architecture(torch.device("cpu")) == target
        for _ in range(2):  # one kernel, launched twice
            product[(1,)](*matrices, 4 * size, size, num_warps=warps, num_stages=2)
        assert not matrices[2].data.any(), "nothing may run"

    found = compile_kernels(target, call)
    assert tuning.forced_architecture is None
    assert compile_kernels(target, call, names=("another",)) == []
    return found


if __name__ == "__main__":
    print(json.dumps([compiled(target, *size) for target in sys.argv[1:] for size in ((64, 4), (128, 1))]))
