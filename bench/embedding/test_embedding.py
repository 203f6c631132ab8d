"""Tokens, positions and dropout of GPT-2 in one pass: against torch's three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Problem, Race, normal


@dataclass(frozen=True)
class Case(Problem):
    """``rows`` tokens of a vocabulary of ``vocab``, the first positions, and vectors of ``columns``."""

    op = "embedding"
    dropout: float = 0.1
    rows: int = 1024
    vocab: int = 50257
    columns: int = 768

    def race(self, device: torch.device) -> Race:
        shapes = {"weight": (self.vocab, self.columns), "position_weight": (self.rows, self.columns)}
        g = torch.Generator(device).manual_seed(1)
        ids = torch.randint(self.vocab, (1, self.rows), generator=g, device=device)
        places = torch.arange(self.rows, device=device)

        def ours(weight: Tensor, position_weight: Tensor) -> Tensor:
            return fastattn.embedding(ids, weight, position_weight, dropout=self.dropout)

        def theirs(weight: Tensor, position_weight: Tensor) -> Tensor:
            return F.dropout(F.embedding(ids, weight) + F.embedding(places, position_weight), self.dropout)

        return Race(normal(device, self.dtype, **shapes), {"fastattn": ours, "torch": theirs})

    def bytes(self, which: str, race: Race, outs: Sequence[Tensor]) -> int:
        """Forward two rows read and one written; backward one read, and the tables' gradients written."""
        row = sum(out.nbytes for out in outs)
        backward = row + sum(x.nbytes for x in race.tensors)
        return {"forward": 3 * row, "backward": backward, "both": 3 * row + backward}[which]


CASES = [Case(), Case(dropout=0.0)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
