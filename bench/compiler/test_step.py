"""A training step of GPT-2 with naive attention: eager, `torch.compile`d and `fastattn.optimize`d, by turns.

Each has a process of its own. Each run adds a row for each to bench/results/compiler_step.csv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compiler.worker import HOWS
from bench.rows import Clock, append, percentiles, where

CLOCK = Clock()
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"gpt2": "12x12x768", "tiny": "2x4x64"}


class Worker:
    def __init__(self, words: list[str], cache: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.compiler.worker", *words],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, tokens: int) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Every process's steps, the first of which compiles."""
    option = request.config.getoption
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = [SIZES[option("--step-size", "gpt2")], str(tokens), str(option("--step-dropout", 0.1))]
    words += [option("--step-dtype", "float32"), device]
    with tempfile.TemporaryDirectory() as cache:  # nothing is compiled yet
        workers = {how: Worker([how, *words], cache) for how in HOWS}
        found: dict[str, list[dict[str, Any]]] = {how: [] for how in HOWS}
        for turn in range(2 + option("--step-rounds", 5)):
            for i in range(len(HOWS)):
                how = HOWS[(i + turn) % len(HOWS)]
                found[how].append(workers[how].step())
        for worker in workers.values():
            worker.close()
    assert found["optimize"][0]["rewritten"] == int(words[0].split("x")[0])
    yield found


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("how", HOWS)
def test_step(benchmark: Any, request: pytest.FixtureRequest, steps: Any, tokens: int, how: str) -> None:
    own, timed = steps[how], steps[how][2:]
    ms = [s["ms"] for s in timed]
    losses = [sum(s["loss"] for s in steps[x]) / len(own) for x in (how, "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    p20, p50, p80 = percentiles(ms)
    row = {
        **where(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "size": request.config.getoption("--step-size", "gpt2"),
        "tokens": tokens,
        "dropout": request.config.getoption("--step-dropout", 0.1),
        "dtype": request.config.getoption("--step-dtype", "float32"),
        "how": how,
        "steps": len(ms),
        "p20_ms": round(p20, 1),
        "p50_ms": round(p50, 1),
        "p80_ms": round(p80, 1),
        "peak_mb": round(max(s["peak_bytes"] for s in timed) / 1e6),
        "first_step_ms": round(own[0]["ms"]),
        "pass_ms": round(own[-1]["pass_ms"], 1),
    }
    benchmark.extra_info.update(row)
    benchmark.group = f"GPT-2 step, naive attention, {tokens} tokens"
    CLOCK.replay(benchmark, [x / 1000 for x in ms])
    append("compiler_step.csv", row)
