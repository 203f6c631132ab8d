"""A head and its loss over GPT-2's vocabulary: ours without the logits against torch's with them.

Each run adds rows to bench/results/cross_entropy.csv, and to cross_entropy_memory.csv what processes grew by.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.rows import append, peak_growth, where
from bench.side_by_side import CLOCK, forward_and_backward, keep, leaves, time_in_turns

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """``linear``: x ``[rows, dim]`` and weight ``[classes, dim]``; ``logits``: ``[rows, classes]``."""

    what: str
    dtype: torch.dtype = torch.float32
    rows: int = 1024
    dim: int = 768
    classes: int = 50257

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.what}-{name}-{self.rows}x{self.dim}x{self.classes}"

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """What gradients are taken of, and the target."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.dim, generator=g)
        weight = 0.02 * torch.randn(self.classes, self.dim, generator=g)
        target = torch.randint(self.classes, (self.rows,), generator=g)
        given = [x @ weight.t()] if self.what == "logits" else [x, weight]
        return [t.to(self.dtype) for t in given], target

    def losses(self, target: Tensor) -> dict[str, Callable[..., Tensor]]:
        """By who computes it."""
        if self.what == "logits":
            return {
                "fastattn": lambda logits: fastattn.cross_entropy(logits, target),
                "torch": lambda logits: F.cross_entropy(logits, target),
            }
        return {
            "fastattn": lambda x, weight: fastattn.linear_cross_entropy(x, weight, target),
            "torch": lambda x, weight: F.cross_entropy(F.linear(x, weight), target),
        }

    def columns(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {"rows": self.rows, "width": self.dim, "vocabulary": self.classes}
        return {"what": self.what, "passes": "both", "dtype": dtype, **sizes}


CASES = [Case("linear"), Case("logits"), Case("logits", torch.bfloat16), Case("linear", rows=64)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy(benchmark: Any, case: Case) -> None:
    tensors, target = case.tensors()
    losses = case.losses(target)
    runs, grads = {}, {}
    for name, loss in losses.items():
        inputs = leaves(tensors)
        runs[name] = forward_and_backward(loss, inputs)
        runs[name]()
        grads[name] = [x.grad.clone() for x in inputs if x.grad is not None]
    for ours, theirs in zip(grads["fastattn"], grads["torch"], strict=True):
        error = (ours.double() - theirs.double()).abs().max()
        assert error <= 16 * torch.finfo(case.dtype).eps * theirs.double().abs().max()
    keep("cross_entropy.csv", benchmark, case.columns(), time_in_turns(runs, seconds=20))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_memory(benchmark: Any, case: Case) -> None:
    # What is freed goes back to the system, whatever was freed before.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in ("torch", "fastattn"):
        command = [
            sys.executable,
            "-m",
            "bench.cross_entropy.test_cross_entropy",
            str(CASES.index(case)),
            name,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peak, seconds = done.stdout.split()
        if peak == "None":
            pytest.skip("read from /proc, which is Linux's")
        row = where() | {
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "fastattn": fastattn.__version__,
            **case.columns(),
            "implementation": name,
            "peak_mb": float(peak),
        }
        append("cross_entropy_memory.csv", row)
        benchmark.extra_info[name] = row
    CLOCK.replay(benchmark, [float(seconds)])


def main() -> None:
    """Print by how many 10^6 bytes this process grows at most, beyond inputs and gradients; and seconds."""
    index, name = sys.argv[1:]
    case = CASES[int(index)]
    tensors, target = case.tensors()
    inputs = leaves(tensors)
    loss = case.losses(target)[name]
    run = forward_and_backward(loss, inputs)
    run()  # libraries, threads' stacks, what is measured once
    for x in inputs:
        x.grad = None
    begin = time.perf_counter()
    grown = peak_growth(run)
    size = sum(x.numel() * x.element_size() for x in inputs)
    peak = None if grown is None else round((grown - size) / 1e6, 1)
    print(peak, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
