"""Linear layers of a training step, against torch's.

``fastattn`` takes the product that is faster, its own or that of torch's BLAS; ``fastattn packed``, of a CPU
and forward alone, is its own whatever is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Function, Problem, Race, normal
from fastattn import _backends
from fastattn.ops.linear import cpu


@dataclass(frozen=True)
class Case(Problem):
    """x ``[rows, in_features]``, weight ``[out_features, in_features]``."""

    op = "linear"
    rows: int = 1024
    in_features: int = 768
    out_features: int = 3072

    def race(self, device: torch.device) -> Race:
        shapes = {"x": (self.rows, self.in_features), "weight": (self.out_features, self.in_features)}
        functions: dict[str, Function] = {"fastattn": fastattn.linear, "torch": F.linear}
        if device.type == "cpu" and not _backends.unavailable("cpu"):
            functions["fastattn packed"] = self.packed
        return Race(normal(device, self.dtype, **shapes), functions, forward_only=("fastattn packed",))

    def packed(self, x: Tensor, weight: Tensor) -> Tensor:
        return cpu.gemm(x, weight.t(), x.new_empty(self.rows, self.out_features))

    def flops(self, which: str) -> int:
        products = {"forward": 1, "backward": 2, "both": 3}[which]
        return products * 2 * self.rows * self.in_features * self.out_features


CASES = [
    Case(),
    Case(in_features=3072, out_features=768),
    Case(out_features=768),
    Case(rows=8),
    Case(rows=1),
    Case(dtype=torch.bfloat16),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
