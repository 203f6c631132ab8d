"""A head and its loss over GPT-2's vocabulary: ours without the logits against torch's with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Function, Problem, Race, normal
from bench.peers import liger
from fastattn.gpu_check.report import Absent


@dataclass(frozen=True)
class Case(Problem):
    """``linear``: x ``[rows, width]`` and weight ``[vocabulary, width]``; ``logits``: ``[rows, vocabulary]``.

    The loss is the rows' sum, so that gradients are of a size that the error budget sees.
    """

    op = "cross_entropy"
    # Not backward alone: fused losses make their gradients in forward, where those are wanted.
    passes = ("forward", "both")
    what: str
    rows: int = 1024
    width: int = 768
    vocabulary: int = 50257

    def race(self, device: torch.device) -> Race:
        leaves = normal(device, self.dtype, x=(self.rows, self.width), weight=(self.vocabulary, self.width))
        leaves["weight"] *= 0.02
        g = torch.Generator(device).manual_seed(1)
        target = torch.randint(self.vocabulary, (self.rows,), generator=g, device=device)
        loss: Any = {"target": target, "reduction": "sum"}
        functions: dict[str, Function] = {
            "fastattn": partial(fastattn.linear_cross_entropy, **loss),
            "torch": lambda x, weight: F.cross_entropy(F.linear(x, weight), **loss),
            "liger": lambda x, weight: liger("liger_fused_linear_cross_entropy")(x, weight, **loss),
        }
        if self.what == "logits":
            leaves = {"logits": F.linear(*leaves.values())}
            functions = {
                "fastattn": partial(fastattn.cross_entropy, **loss),
                "torch": partial(F.cross_entropy, **loss),
                "liger": overwrites,
            }
        return Race(leaves, functions)

    @property
    def checked(self) -> Problem:
        return replace(self, rows=min(self.rows, 128))

    def flops(self, which: str) -> int:
        products = {"forward": 1, "backward": 2, "both": 3}[which] if self.what == "linear" else 0
        return products * 2 * self.rows * self.width * self.vocabulary


def overwrites(logits: Tensor) -> Tensor:
    raise Absent("it writes the gradient over the logits, so that they can be given to it once")


CASES = [Case("linear"), Case("logits"), Case("logits", dtype=torch.bfloat16), Case("linear", rows=64)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
