"""The MLP of GPT-2 and of Llama, against torch's layers one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Function, Problem, Race, normal
from bench.peers import liger
from fastattn.ops.activations import FUNCTIONS


@dataclass(frozen=True)
class Case(Problem):
    """x ``[rows, width]``, hidden layers of ``hidden``."""

    op = "mlp"
    activation: str
    gated: bool = False
    rows: int = 1024
    width: int = 768
    hidden: int = 3072

    def race(self, device: torch.device) -> Race:
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.rows, self.width),
            "w1": (self.hidden, self.width),
            "b1": (self.hidden,),
            "w2": (self.width, self.hidden),
            "b2": (self.width,),
        }
        if self.gated:
            shapes["gate"] = (self.hidden, self.width)
        leaves = {name: x * x.shape[-1] ** -0.5 for name, x in normal(device, self.dtype, **shapes).items()}
        functions: dict[str, Function] = {"fastattn": self.ours, "torch": self.layers}
        if self.gated and self.activation == "silu":
            functions["liger"] = self.liger
        return Race(leaves, functions)

    def ours(self, x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, gate: Any = None) -> Tensor:
        return fastattn.mlp(x, w1, b1, w2, b2, self.activation, gate=gate)

    def layers(self, x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, gate: Any = None) -> Tensor:
        f, u = FUNCTIONS[self.activation], F.linear(x, w1, b1)
        return F.linear(f(u) if gate is None else f(F.linear(x, gate)) * u, w2, b2)

    def liger(self, x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, gate: Tensor) -> Tensor:
        return F.linear(liger("liger_swiglu")(F.linear(x, gate), F.linear(x, w1, b1)), w2, b2)

    def flops(self, which: str) -> int:
        products = {"forward": 1, "backward": 2, "both": 3}[which] * (3 if self.gated else 2)
        return products * 2 * self.rows * self.width * self.hidden


CASES = [Case("gelu"), Case("gelu_tanh"), Case("silu", gated=True, hidden=2048), Case("gelu", rows=16)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlp(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
