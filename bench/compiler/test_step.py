"""A training step of GPT-2 with naive attention: eager, `torch.compile`d and `fastattn.optimize`d, by turns.

Each has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from bench.compiler.worker import HOWS
from bench.contest import CLOCK
from bench.memory import ROOT
from bench.rows import extra
from bench.tidy import RUN, isa_of
from fastattn.gpu_check.timing import columns_of
from fastattn.machine import version

SIZES = {"gpt2": "12x12x768", "tiny": "2x4x64"}
PACKAGES = {"standard": "transformers", "torch.compile": "torch", "fastattn.optimize": "fastattn"}


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
    """Every process's steps, the first of which compiles, and the second is profiled."""
    option = request.config.getoption
    words = [SIZES[option("--step-size", "gpt2")], str(tokens), str(option("--step-dropout", 0.1))]
    words += [option("--step-dtype", "float32"), RUN.device]
    with tempfile.TemporaryDirectory() as cache:  # nothing is compiled yet
        workers = {how: Worker([how, *words], cache) for how in HOWS}
        found: dict[str, list[dict[str, Any]]] = {how: [] for how in HOWS}
        for turn in range(2 + option("--step-rounds", 5)):
            for i in range(len(HOWS)):
                how = HOWS[(i + turn) % len(HOWS)]
                found[how].append(workers[how].step())
        for worker in workers.values():
            worker.close()
    assert found["fastattn.optimize"][0]["rewritten"] == int(words[0].split("x")[0])
    number = RUN.next_race()
    for how in HOWS:
        for step in found[how]:
            step["race"] = number
    yield found


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("how", HOWS)
def test_step(benchmark: Any, request: pytest.FixtureRequest, steps: Any, tokens: int, how: str) -> None:
    own, timed = steps[how], steps[how][2:]
    ms, peaks = ([s[name] for s in timed] for name in ("ms", "peak_bytes"))
    losses = [sum(s["loss"] for s in steps[x]) / len(own) for x in (how, HOWS[0])]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    option = request.config.getoption
    size = option("--step-size", "gpt2")
    _, heads, width = (int(n) for n in SIZES[size].split("x"))
    row = {
        "op": "gpt2",
        "pass": "step",
        "dtype": option("--step-dtype", "float32"),
        "batch": 1,
        **dict.fromkeys(("heads", "kv_heads"), heads),
        "length": tokens,
        **dict.fromkeys(("head_dim", "v_dim"), width // heads),
        "mask": "causal",
        "dropout": option("--step-dropout", 0.1),
        "extra": extra(size=size, model="transformers, naive attention"),
        "implementation": how,
        "race": own[0]["race"],
        "version": f"{PACKAGES[how]} {version(PACKAGES[how])}",
        "isa": isa_of(how, RUN.device),
        "kernel": own[1]["kernel"],
        "status": "ok",
        "note": f"first step {own[0]['ms']:.0f} ms, of it our pass {own[-1]['pass_ms']:.1f} ms",
        "peak_mb": round(max(peaks) / 1e6) if None not in peaks else None,
        **columns_of(ms),
    }
    benchmark.extra_info.update(RUN.add(row))
    benchmark.group = f"GPT-2 step, naive attention, {tokens} tokens"
    CLOCK.replay(benchmark, [x / 1000 for x in ms])
