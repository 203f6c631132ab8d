"""A GPT-2 training step by each implementation of `fastattn compare gpt2`, interleaved, in processes of their
own.

The steps are taken before pytest-benchmark looks, so that the implementations can alternate; it then reads
them off a clock that moves by what was measured. Each implementation is a tidy row of the run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest

import fastattn
from bench.contest import CLOCK
from bench.rows import extra
from bench.tidy import RUN, isa_of
from fastattn.gpt2 import compare
from fastattn.gpt2.compare.progress import Progress
from fastattn.gpt2.compare.result import parity, summaries, versions
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, LOSS_TOLERANCE, settings_of
from fastattn.gpu_check.timing import columns_of


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, context: int, dropout: float) -> tuple[Session, int | None]:
    """Every implementation's steps, once their losses agree; the race's number where they took turns."""
    option = request.config.getoption
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    words = ["--size", option("--gpt2-size", "gpt2"), "--data", option("--gpt2-data", "shakespeare")]
    words += ["--steps", str(1 + option("--gpt2-rounds", 5)), "--no-sweep"]
    words += ["--context", str(context), "--dropout", str(dropout), "--device", RUN.device]
    names = option("--gpt2-implementations", None)
    words += [] if names is None else ["--implementations", names]
    settings = replace(settings_of(parser.parse_args(words)), parity_steps=2)
    with Session(settings, Progress(settings.implementations)) as done:
        done.run()
    phase = "parity" if dropout > 0 else "train"
    losses = parity(done.samples, phase, LOSS_TOLERANCE[settings.dtype], settings.baseline)
    fits = settings.baseline not in done.stopped and settings.ours not in done.stopped
    assert losses["passed"] or not fits, (
        f"losses at dropout 0: expected within {losses['tolerance']}, got {losses['largest']}"
    )
    return done, None if done.alone else RUN.next_race()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_step(
    benchmark: Any,
    session: tuple[Session, int | None],
    context: int,
    dropout: float,
    implementation: str,
) -> None:
    done, race = session
    if implementation not in done.settings.implementations:
        pytest.skip("not asked for: --gpt2-implementations")
    problem = problem_of(done, implementation)
    stop = done.stopped.get(implementation)
    if stop is not None:
        RUN.add(problem | {"status": stop.status, "note": stop.reason})
        pytest.skip(f"{stop.status}: {stop.reason}")
    own = [s for s in done.samples if s["implementation"] == implementation and s["phase"] == "train"]
    ms = [s["ms"] for s in own if not s["warmup"]]
    peak = summaries(own, "train", done.built)[implementation]["peak_bytes"]
    measured = {"status": "ok", "race": race, "peak_mb": round(peak / 1e6), **columns_of(ms)}
    benchmark.extra_info.update(RUN.add(problem | measured))
    benchmark.group = f"GPT-2 step, {context} tokens, dropout {dropout}"
    CLOCK.replay(benchmark, [x / 1000 for x in ms])


def problem_of(session: Session, implementation: str) -> dict[str, Any]:
    """The columns of a row that say what was to be measured, where and by whom."""
    settings, one = session.settings, IMPLEMENTATIONS[implementation]
    return {
        "isa": isa_of("fastattn" if one.attention == "fastattn" else implementation, RUN.device),
        "kernel": session.kernels.get(implementation),
        "op": "gpt2",
        "pass": "step",
        "dtype": settings.dtype,
        "batch": settings.batch,
        "heads": session.config.n_head,
        "kv_heads": session.config.n_head,
        "length": settings.context,
        "head_dim": session.config.head_dim,
        "v_dim": session.config.head_dim,
        "mask": "causal",
        "dropout": settings.dropout,
        "extra": extra(size=settings.size),
        "implementation": implementation,
        "version": fastattn.__version__ if one.own else f"transformers {versions()['transformers']}",
    }
