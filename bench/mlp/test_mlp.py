"""The MLP of GPT-2 and of Llama, forward and backward, against eager PyTorch.

Each run adds a row an implementation to bench/results/mlp.csv.
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
from fastattn.ops.activations import FUNCTIONS
from fastattn.testing import assert_within_budget, operation_errors


@dataclass(frozen=True)
class Case:
    """x ``[rows, width]``, hidden layers of ``hidden``."""

    activation: str
    gated: bool = False
    dtype: torch.dtype = torch.float32
    rows: int = 1024
    width: int = 768
    hidden: int = 3072

    def __str__(self) -> str:
        kind = self.activation + ("-gated" if self.gated else "")
        return f"{kind}-{str(self.dtype).removeprefix('torch.')}-{self.rows}x{self.width}x{self.hidden}"

    def inputs(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = {
            "x": (self.rows, self.width),
            "w1": (self.hidden, self.width),
            "b1": (self.hidden,),
            "w2": (self.width, self.hidden),
            "b2": (self.width,),
        }
        if self.gated:
            shapes["gate"] = (self.hidden, self.width)
        return {k: (torch.randn(s, generator=draw) * s[-1] ** -0.5).to(self.dtype) for k, s in shapes.items()}

    def eager(self) -> Callable[..., Tensor]:
        f = FUNCTIONS[self.activation]

        def run(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gate: Any = None) -> Tensor:
            u = F.linear(x, w1, b1)
            return F.linear(f(u) if gate is None else f(F.linear(x, gate)) * u, w2, b2)

        return run

    def ours(self) -> Callable[..., Tensor]:
        def run(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gate: Any = None) -> Tensor:
            return fastattn.mlp(x, w1, b1, w2, b2, self.activation, gate=gate)

        return run


CASES = [Case("gelu"), Case("gelu_tanh"), Case("silu", gated=True, hidden=2048), Case("gelu", rows=16)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlp(benchmark: Any, case: Case) -> None:
    inputs = case.inputs()
    assert_within_budget(operation_errors(case.ours(), case.eager(), inputs))
    functions = {"fastattn": case.ours(), "eager": case.eager()}
    runs = {name: forward_and_backward(f, leaves(inputs.values())) for name, f in functions.items()}
    columns = {
        "passes": "both",
        "activation": case.activation,
        "gated": case.gated,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rows": case.rows,
        "width": case.width,
        "hidden": case.hidden,
    }
    keep("mlp.csv", benchmark, columns, time_in_turns(runs, 6.0))
