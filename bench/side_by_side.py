"""Implementations of one operation, timed in turns and kept as rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastattn
from bench.rows import Clock, append, percentiles, where

CLOCK = Clock()


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that gradients are accumulated in."""
    return [x.detach().clone().requires_grad_() for x in tensors]


def forward_and_backward(run: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """Calls `run` with the inputs, and its backward pass with a gradient of ones; the gradients are fresh."""
    dout = torch.ones_like(run(*inputs))

    def both() -> None:
        for x in inputs:
            x.grad = None
        run(*inputs).backward(dout)

    return both


def time_in_turns(runs: Mapping[str, Callable[[], object]], seconds: float = 2.0) -> dict[str, list[float]]:
    """Seconds of each call, at least five rounds and about `seconds` in all, after one to warm up."""

    def once(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    for run in runs.values():
        once(run)
    warm = sum(once(run) for run in runs.values())
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(5, min(200, int(seconds / warm)))):
        for name, run in runs.items():
            samples[name].append(once(run))
    return samples


def keep(file_name: str, benchmark: Any, case: Mapping[str, Any], samples: Mapping[str, list[float]]) -> None:
    """A row for each implementation in bench/results/`file_name`; pytest-benchmark shows fastattn's."""
    for name, taken in samples.items():
        p20, p50, p80 = (1e3 * one for one in percentiles(taken))
        row = where() | {
            "isa": isa(name),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "fastattn": fastattn.__version__,
            **case,
            "implementation": name,
            "rounds": len(taken),
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
        }
        append(file_name, row)
        benchmark.extra_info[name] = row
    benchmark.group = "-".join(str(value) for value in case.values())
    CLOCK.replay(benchmark, samples["fastattn"])


def isa(implementation: str) -> str:
    """What fastattn's rows ran on; others': what torch may use."""
    from fastattn import _backends

    if implementation.startswith("fastattn") and not _backends.unavailable("cpu"):
        return _backends.cpu_isa()
    return torch.backends.cpu.get_cpu_capability().lower()
