"""Rows as the benchmarks write them, by their own writers, of times that a test makes up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import rows
from bench.attention import test_peers as suite
from bench.gpt2 import test_step as steps
from bench.tidy import Run, isa_of
from fastattn.gpt2.config import config_of
from fastattn.gpu_check.rows import Rows
from fastattn.gpu_check.timing import columns_of
from fastattn.machine import Machine


def begin(folder: Path, name: str = "attention", **common: Any) -> Run:
    """A run whose rows go to `folder`; what they have in common can be made up too."""
    run = Run()
    run.begin(name, "cpu", folder)
    run.file = rows.start_run(name, "cpu", folder)
    run.file.common |= common
    return run


def ceilings(run: Run, fma: float = 200.0, copy: float = 40.0) -> None:
    """What the machine can do, as the fixture of bench/conftest.py writes it."""
    run.ceilings = {"fma": fma, "copy": copy}
    for name, dtype, rate in (("fma", "float32", {"gflops": fma}), ("copy", "uint8", {"gb_per_s": copy})):
        problem = {"op": "ceiling", "status": "ok", "isa": isa_of("fastattn"), "pass": "forward"}
        run.add(problem | {"implementation": name, "dtype": dtype} | columns_of([1.0]) | rate)


def attention(
    run: Run,
    times: Mapping[str, float],
    *,
    length: int,
    mask: str = "causal",
    dim: int = 64,
    passes: str = "both",
    dtype: torch.dtype = torch.float32,
    peak_mb: float | None = None,
    isa: Mapping[str, str] | None = None,
    **more: int,
) -> None:
    """A race of `bench/attention/test_peers.py`: milliseconds by implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "RUN", run)
        if isa is not None:
            patch.setattr(suite, "isa_of", lambda name, device: isa[name])
        case = suite.case_of(mask, dtype, length, dim, **more)
        machine = Machine(dry_run=False, device="cpu")
        kept = suite.Kept(case.name, machine, "cpu", 1.0, problem=case, memory=False)
        for name, ms in times.items():
            kept.row(**_columns(case, passes, name, ms), peak_mb=peak_mb)


def _columns(case: Any, passes: str, name: str, ms: float) -> dict[str, Any]:
    """Of a row of `fastattn.gpu_check.races.race`."""
    return case.columns | {
        "passes": passes,
        "implementation": name,
        "kernel": "sdpa:flash" if name.startswith("sdpa") else "cpu: attention",
        "status": "ok",
        "error_of_budget": 0.1,
        "tflops": round(case.flops(passes) / ms / 1e9, 2),
        **columns_of([0.9 * ms, ms, 1.1 * ms]),
    }


def gpu_check(path: Path, races: Mapping[Any, Mapping[str, float]], **common: Any) -> None:
    """The file of a `fastattn gpu-check`: the ceilings, then a race of a case each."""
    shared = {
        "date": "2026-01-02",
        "started": "03:04:05",
        "run": "gpu",
        "machine": "A GPU",
        "torch": "2.13.0",
    }
    file = Rows(path, shared | common)
    step = {"step": "ceilings", "case": "matmul", "implementation": "torch", "status": "ok"}
    file.add(step | {"dtype": "bfloat16", "tflops": 600.0} | columns_of([1.0]))
    for case, times in races.items():
        for name, ms in times.items():
            file.add({"step": f"race {case.name}"} | _columns(case, "forward", name, ms))
    file.close()


def step(
    run: Run,
    times: Mapping[str, float],
    *,
    size: str = "gpt2",
    batch: int = 1,
    context: int = 1024,
    dropout: float = 0.1,
    dtype: str = "float32",
) -> None:
    """A race of `bench/gpt2`: milliseconds of a training step by implementation."""
    settings = SimpleNamespace(
        device="cpu", size=size, batch=batch, context=context, dropout=dropout, dtype=dtype
    )
    session: Any = SimpleNamespace(settings=settings, config=config_of(size), kernels={})
    race = run.next_race()
    for name, ms in times.items():
        measured = {"status": "ok", "race": race, **columns_of([ms]), "peak_mb": round(ms)}
        run.add(steps.problem_of(session, name) | measured)
