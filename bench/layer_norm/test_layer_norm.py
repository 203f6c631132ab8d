"""The norms of a training step, forward and backward, against eager PyTorch.

Each run adds a row an implementation to bench/results/layer_norm.csv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.side_by_side import CLOCK, forward_and_backward, keep, leaves, time_in_turns
from fastattn.testing import assert_within_budget, operation_errors


@dataclass(frozen=True)
class Case:
    """x ``[rows, columns]``; `operation` is one of `EAGER`."""

    operation: str
    dtype: torch.dtype = torch.float32
    rows: int = 4096
    columns: int = 768
    dropout: float = 0.0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.operation}-{name}-{self.rows}x{self.columns}-p{self.dropout}"

    def inputs(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = {"x": (self.rows, self.columns), "weight": (self.columns,)}
        if self.operation != "rms_norm":
            shapes["bias"] = (self.columns,)
        if self.operation == "dropout_add_layer_norm":
            shapes["residual"] = (self.rows, self.columns)
        return {name: torch.randn(shape, generator=draw).to(self.dtype) for name, shape in shapes.items()}

    def ours(self) -> Callable[..., Tensor]:
        if self.operation == "rms_norm":
            return lambda x, weight: fastattn.rms_norm(x, self.columns, weight)
        if self.operation == "layer_norm":
            return lambda x, weight, bias: fastattn.layer_norm(x, self.columns, weight, bias)
        return self._dropout_add_layer_norm

    def _dropout_add_layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = fastattn.dropout_add_layer_norm(x, residual, weight, bias, dropout=self.dropout)
        return out

    def eager(self) -> Callable[..., Tensor]:
        if self.operation == "rms_norm":
            return lambda x, weight: F.rms_norm(x, (self.columns,), weight)
        if self.operation == "layer_norm":
            return lambda x, weight, bias: F.layer_norm(x, (self.columns,), weight, bias)

        def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return F.layer_norm(residual + F.dropout(x, self.dropout), (self.columns,), weight, bias)

        return run


CASES = [
    Case("dropout_add_layer_norm", rows=1024, dropout=0.1),
    Case("dropout_add_layer_norm", dropout=0.1),
    Case("dropout_add_layer_norm"),
    Case("dropout_add_layer_norm", torch.bfloat16, dropout=0.1),
    Case("layer_norm", rows=1024),
    Case("layer_norm"),
    Case("layer_norm", torch.bfloat16),
    Case("rms_norm"),
    Case("rms_norm", torch.bfloat16),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm(benchmark: Any, case: Case) -> None:
    inputs = case.inputs()
    if case.dropout == 0:  # the two drop different elements
        assert_within_budget(operation_errors(case.ours(), case.eager(), inputs))
    functions = {"fastattn": case.ours(), "eager": case.eager()}
    runs = {name: forward_and_backward(f, leaves(inputs.values())) for name, f in functions.items()}
    columns = {
        "operation": case.operation,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rows": case.rows,
        "columns": case.columns,
        "dropout": case.dropout,
    }
    keep("layer_norm.csv", benchmark, columns, time_in_turns(runs))
