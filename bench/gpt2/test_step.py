"""A GPT-2 training step with eager attention, sdpa and ours, interleaved, in processes of their own.

The steps are those of `fastattn compare gpt2`. They are taken before pytest-benchmark looks, so that the
implementations can alternate; it then reads them off a clock that moves by what was measured.
Each run adds a row an implementation to bench/results/gpt2_step.csv.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import date
from typing import Any

import pytest

import fastattn
from bench.rows import Clock, append, percentiles
from fastattn import _backends
from fastattn.gpt2 import compare
from fastattn.gpt2.compare.progress import Progress
from fastattn.gpt2.compare.result import machine, parity, versions
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, LOSS_TOLERANCE, settings_of

CLOCK = Clock()


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, context: int, dropout: float) -> Session:
    """Every implementation's steps; first of all that their losses agree."""
    option = request.config.getoption
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    words = ["--size", option("--gpt2-size", "gpt2"), "--data", option("--gpt2-data", "shakespeare")]
    words += ["--steps", str(1 + option("--gpt2-rounds", 5)), "--no-sweep"]
    words += ["--context", str(context), "--dropout", str(dropout)]
    settings = replace(settings_of(parser.parse_args(words)), parity_steps=2)
    with Session(settings, Progress(list(IMPLEMENTATIONS))) as done:
        done.run()
    phase = "parity" if dropout > 0 else "train"
    losses = parity(done.samples, phase, LOSS_TOLERANCE[settings.dtype])
    assert losses["passed"], (
        f"losses at dropout 0: expected within {losses['tolerance']}, got {losses['largest']}"
    )
    return done


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_step(benchmark: Any, session: Session, context: int, dropout: float, implementation: str) -> None:
    stop = session.stopped.get(implementation)
    if stop is not None:
        pytest.skip(f"{stop.status}: {stop.reason}")
    own = [s for s in session.samples if s["implementation"] == implementation and s["phase"] == "train"]
    ms = [s["ms"] for s in own if not s["warmup"]]
    row = result_row(session, implementation, ms, max(s["peak_bytes"] for s in own))
    benchmark.extra_info.update(row)
    benchmark.group = f"GPT-2 step, {context} tokens, dropout {dropout}"
    CLOCK.replay(benchmark, [x / 1000 for x in ms])
    append("gpt2_step.csv", row)


def result_row(session: Session, implementation: str, ms: list[float], peak_bytes: int) -> dict[str, Any]:
    settings, where, found = session.settings, machine(session.settings.device), versions()
    p20, p50, p80 = percentiles(ms)
    isa = (
        _backends.cpu_isa() if implementation == "fastattn" and where["gpu"] is None else where["isa"].lower()
    )
    return {
        "date": date.today().isoformat(),
        "machine": where["gpu"] or where["system"],
        "cpu": where["cpu"],
        "isa": isa,
        "threads": session.built[implementation]["threads"],
        "torch": found["torch"],
        "transformers": found["transformers"],
        "fastattn": fastattn.__version__,
        "size": settings.size,
        "batch": settings.batch,
        "context": settings.context,
        "dropout": settings.dropout,
        "dtype": settings.dtype,
        "implementation": implementation,
        "steps": len(ms),
        "p20_ms": round(p20, 1),
        "p50_ms": round(p50, 1),
        "p80_ms": round(p80, 1),
        "peak_mb": round(peak_bytes / 1e6),
    }
