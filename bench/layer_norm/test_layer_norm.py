"""The norms of a training step, against torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Function, Problem, Race, normal
from bench.peers import liger

EPS = 1e-5


@dataclass(frozen=True)
class Case(Problem):
    """x ``[rows, columns]``; ``layer_norm``, ``rms_norm`` or ``dropout_add_layer_norm``."""

    op = "layer_norm"
    operation: str
    rows: int = 4096
    columns: int = 768
    dropout: float = 0.0

    def race(self, device: torch.device) -> Race:
        shapes: dict[str, tuple[int, ...]] = {"x": (self.rows, self.columns), "weight": (self.columns,)}
        if self.operation != "rms_norm":
            shapes["bias"] = (self.columns,)
        if self.operation == "dropout_add_layer_norm":
            shapes["residual"] = (self.rows, self.columns)
        return Race(normal(device, self.dtype, **shapes), self.functions())

    def functions(self) -> dict[str, Function]:
        size = (self.columns,)
        if self.operation == "rms_norm":
            return {
                "fastattn": lambda x, w: fastattn.rms_norm(x, size, w, EPS),
                "torch": lambda x, w: F.rms_norm(x, size, w, EPS),
                "liger": lambda x, w: liger("liger_rms_norm")(x, w, EPS, in_place=False),
            }
        if self.operation == "layer_norm":
            return {
                "fastattn": lambda x, w, b: fastattn.layer_norm(x, size, w, b, EPS),
                "torch": lambda x, w, b: F.layer_norm(x, size, w, b, EPS),
                "liger": lambda x, w, b: liger("liger_layer_norm")(x, w, b, EPS),
            }
        return {"fastattn": self.fused, "torch": self.three}

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = fastattn.dropout_add_layer_norm(
            x, residual, weight, bias, dropout=self.dropout, eps=EPS
        )
        return out

    def three(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x, self.dropout), (self.columns,), weight, bias, EPS)


CASES = [
    Case("dropout_add_layer_norm", rows=1024, dropout=0.1),
    Case("dropout_add_layer_norm", dropout=0.1),
    Case("dropout_add_layer_norm"),
    Case("dropout_add_layer_norm", dropout=0.1, dtype=torch.bfloat16),
    Case("layer_norm", rows=1024),
    Case("layer_norm"),
    Case("layer_norm", dtype=torch.bfloat16),
    Case("rms_norm"),
    Case("rms_norm", dtype=torch.bfloat16),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
