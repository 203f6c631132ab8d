"""A step of AdamW over GPT-2's parameters, with clipping and without: ours against torch's fused one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Problem, Race, normal


@dataclass(frozen=True)
class Case(Problem):
    """The parameters of a GPT-2; gradients clipped to ``max_norm``, or not."""

    op = "adamw"
    passes = ("step",)
    max_norm: float | None = 1.0
    layers: int = 12
    width: int = 768
    vocabulary: int = 50257

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        n = self.width
        attention = [(n,), (n,), (n, 3 * n), (3 * n,), (n, n), (n,)]
        mlp = [(n,), (n,), (n, 4 * n), (4 * n,), (4 * n, n), (n,)]
        return [(self.vocabulary, n), (1024, n), *self.layers * (attention + mlp), (n,), (n,)]

    @property
    def checked(self) -> Problem:
        return replace(self, layers=1, vocabulary=64)

    def race(self, device: torch.device) -> Race:
        timed = {name: Step(self, name, device) for name in ("fastattn", "torch")}
        if self != self.checked:  # too large to be held to float64
            return Race({}, {name: partial(steps, self, name) for name in timed}, timed=timed)
        named = {f"{kind}{i}": shape for kind in "pg" for i, shape in enumerate(self.shapes)}
        functions = {name: partial(steps, self, name) for name in timed}
        return Race(normal(device, self.dtype, **named), functions, partial(steps, self, "plain"), timed)

    def bytes(self, which: str, race: Race, outs: Sequence[Tensor]) -> int:
        """Parameters, gradients and two moments read, all but gradients written; a norm reads them before."""
        passes = 7 if self.max_norm is None else 8
        return passes * self.dtype.itemsize * sum(torch.Size(shape).numel() for shape in self.shapes)


def stepper(case: Case, name: str, parameters: list[Tensor], lr: float = 1e-3) -> Callable[[], object]:
    """A step of an optimizer over parameters that have gradients."""
    if name == "fastattn":
        return fastattn.optim.AdamW(parameters, lr, max_norm=case.max_norm).step
    fused = name == "torch"
    optimizer = torch.optim.AdamW(parameters, lr, fused=fused, foreach=False if fused is False else None)

    def step() -> None:
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, case.max_norm, foreach=True if fused else None)
        optimizer.step()

    return step


def steps(case: Case, name: str, *leaves: Tensor) -> list[Tensor]:
    """Three steps from parameters and gradients, the first and the second half of `leaves`.

    The learning rate is large, so that an error in the direction shows beside the parameters' own size.
    """
    half = len(leaves) // 2
    parameters = [x.detach().clone().requires_grad_() for x in leaves[:half]]
    for p, g in zip(parameters, leaves[half:], strict=True):
        p.grad = g.detach().clone()
    step = stepper(case, name, parameters, lr=0.1)
    for _ in range(3):
        step()
    return [p.detach() for p in parameters]


class Step:
    """Steps over parameters of its own, which the first call makes."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        self.given: tuple[Any, ...] = (case, name, device)
        self.step: Callable[[], object] | None = None

    def __call__(self) -> None:
        if self.step is None:
            case, name, device = self.given
            parameters = [torch.ones(shape, dtype=case.dtype, device=device) for shape in case.shapes]
            for p in parameters:
                p.requires_grad_().grad = torch.full_like(p, 0.1)
            self.step = stepper(case, name, parameters)
        self.step()


CASES = [Case(), Case(max_norm=None)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
