"""Tokens, positions and dropout of GPT-2 in one pass: against torch's three.

Each run adds a row an implementation to bench/results/embedding.csv.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.side_by_side import CLOCK, forward_and_backward, keep, leaves, time_in_turns


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_embedding(benchmark: Any, dropout: float, passes: str) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(50257, (1, 1024), generator=g)
    tables = torch.randn(50257, 768, generator=g), torch.randn(1024, 768, generator=g)
    places = torch.arange(1024)

    def ours(weight: Tensor, position_weight: Tensor) -> Tensor:
        return fastattn.embedding(ids, weight, position_weight, dropout=dropout)

    def theirs(weight: Tensor, position_weight: Tensor) -> Tensor:
        return F.dropout(F.embedding(ids, weight) + F.embedding(places, position_weight), dropout)

    # Without dropout: theirs draws in its own way.
    exact = tables[0][ids].double() + tables[1].double()
    torch.testing.assert_close(fastattn.embedding(ids, *tables).double(), exact, atol=1e-6, rtol=1e-6)
    functions = {"fastattn": ours, "torch": theirs}
    if passes == "both":
        runs: dict[str, Any] = {
            name: forward_and_backward(f, leaves(tables)) for name, f in functions.items()
        }
    else:
        runs = {name: lambda f=f: f(*tables) for name, f in functions.items()}
    columns = {"passes": passes, "dtype": "float32", "rows": 1024, "vocab": 50257, "columns": 768}
    keep("embedding.csv", benchmark, columns | {"dropout": dropout}, time_in_turns(runs))
