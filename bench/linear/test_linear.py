"""Matrix products of a training step: our packed product against torch's.

Each run adds a row an implementation to bench/results/linear.csv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.side_by_side import CLOCK, forward_and_backward, keep, leaves, time_in_turns
from fastattn import _backends
from fastattn.ops.linear import cpu


@dataclass(frozen=True)
class Case:
    """x ``[rows, k]``, weight ``[n, k]``; passes ``product`` (without choosing), ``forward`` or ``both``."""

    passes: str
    dtype: torch.dtype = torch.float32
    rows: int = 1024
    n: int = 3072
    k: int = 768

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.passes}-{name}-{self.rows}x{self.k}x{self.n}"


CASES = [
    Case("product"),
    Case("product", n=768, k=3072),
    Case("product", n=768),
    Case("product", rows=8),
    Case("product", torch.bfloat16),
    Case("both"),
    Case("forward", rows=1),
    Case("both", torch.bfloat16),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(benchmark: Any, case: Case) -> None:
    x, weight = (torch.randn(size, case.k).to(case.dtype) for size in (case.rows, case.n))
    exact = x.double() @ weight.double().t()
    if case.passes == "product":
        _backends.require("cpu")
        out, theirs = torch.empty(2, case.rows, case.n, dtype=case.dtype)
        runs = {
            "fastattn": lambda: cpu.gemm(x, weight.t(), out),
            "torch": lambda: torch.mm(x, weight.t(), out=theirs),
        }
        for run in runs.values():
            check(run(), exact)
    elif case.passes == "forward":
        runs = {"fastattn": lambda: fastattn.linear(x, weight), "torch": lambda: F.linear(x, weight)}
        for run in runs.values():
            check(run(), exact)
    else:
        functions = {"fastattn": fastattn.linear, "torch": F.linear}
        for function in functions.values():
            check(function(x, weight), exact)
        runs = {name: forward_and_backward(f, leaves((x, weight))) for name, f in functions.items()}
    columns = {
        "passes": case.passes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rows": case.rows,
        "in_features": case.k,
        "out_features": case.n,
    }
    keep("linear.csv", benchmark, columns, time_in_turns(runs))


def check(found: Tensor, exact: Tensor) -> None:
    tolerance = torch.finfo(found.dtype).eps * exact.abs().max() + 1e-3
    assert (found.double() - exact).abs().max() <= tolerance
