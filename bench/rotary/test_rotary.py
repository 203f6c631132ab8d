"""Rotary embedding against how models write it: each case's implementations alternate in one run.

The peer is what transformers' Llama does to each of q and k (`apply_rotary_pos_emb`), with the cosines and
sines it looks up beforehand. Each run adds a row an implementation to bench/results/rotary.csv.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.rows import Clock, append, percentiles, where

CLOCK = Clock()


@dataclass(frozen=True)
class Case:
    """x ``[batch, heads, length, dim]``, and the passes that are timed: ``forward`` or ``both``."""

    passes: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 12
    length: int = 4096
    dim: int = 64

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.passes}-{name}-B{self.batch}-H{self.heads}-L{self.length}-D{self.dim}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x and the tables."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.heads, self.length, self.dim, generator=g).to(self.dtype)
        angle = torch.arange(float(self.length))[:, None] * 1e4 ** -torch.linspace(0, 1, self.dim // 2)
        return x.requires_grad_(self.passes == "both"), angle.cos(), angle.sin()


CASES = [Case(passes, dtype) for passes in ("forward", "both") for dtype in (torch.float32, torch.bfloat16)]
CASES.append(Case("forward", batch=8, length=1, heads=32))


def implementations(case: Case) -> dict[str, Callable[[], Tensor]]:
    x, cos, sin = case.tensors()
    found: dict[str, Callable[[], Tensor]] = {"fastattn": lambda: fastattn.rotary(x, cos, sin)}
    if importlib.util.find_spec("transformers") is not None:
        from transformers.models.llama.modeling_llama import rotate_half

        wide_cos, wide_sin = (torch.cat((t, t), -1).to(case.dtype)[None, None] for t in (cos, sin))
        found["transformers"] = lambda: (x * wide_cos) + (rotate_half(x) * wide_sin)
    return found


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotary(benchmark: Any, case: Case) -> None:
    runs = implementations(case)
    x, cos, sin = case.tensors()
    exact = fastattn.rotary(x.detach().double(), cos.double(), sin.double())
    tolerance = 8 * torch.finfo(case.dtype).eps
    for run in runs.values():
        torch.testing.assert_close(run().detach().double(), exact, atol=tolerance, rtol=tolerance)
    dout = torch.ones_like(x)

    def seconds(run: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        out = run()
        if case.passes == "both":
            out.backward(dout)
        return time.perf_counter() - start

    warm = [seconds(run) for run in runs.values()]
    rounds = max(5, min(200, int(1.0 / sum(warm))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(seconds(run))

    for name, taken in samples.items():
        p20, p50, p80 = (1e3 * one for one in percentiles(taken))
        row = where() | {
            "isa": torch.backends.cpu.get_cpu_capability().lower(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fastattn": fastattn.__version__,
            "passes": case.passes,
            "dtype": str(case.dtype).removeprefix("torch."),
            "batch": case.batch,
            "heads": case.heads,
            "length": case.length,
            "head_dim": case.dim,
            "implementation": name,
            "rounds": rounds,
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
        }
        append("rotary.csv", row)
        benchmark.extra_info[name] = row
    benchmark.group = str(case)
    CLOCK.replay(benchmark, samples["fastattn"])
