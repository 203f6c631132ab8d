"""Two versions compared: intervals that hold, files of older runs, and a call of each operation."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import calls, rows
from bench.against import kept, paired, versions

ROOT = Path(__file__).resolve().parents[2]


def launches(shift: float, spread: float = 0.05) -> list[list[float]]:
    draw = random.Random(3)
    return [[shift + draw.gauss(0, spread) for _ in range(20)] for _ in range(paired.LAUNCHES)]


@pytest.mark.parametrize(("shift", "says"), [(0.0, "within the noise"), (-0.2, "faster"), (0.2, "slower")])
def test_interval(shift: float, says: str) -> None:
    ratio, low, high = paired.interval(launches(shift))
    assert low <= ratio <= high
    assert low <= math.exp(shift) <= high
    assert paired.verdict(low, high) == says


def test_one_launch_of_its_own_mind_is_noise() -> None:
    """A process that is slow from its start says nothing about a version."""
    found = [[0.0, 0.01, -0.01] * 5 for _ in range(paired.LAUNCHES - 1)] + [[0.5] * 15]
    _, low, high = paired.interval(found)
    assert paired.verdict(low, high) == "within the noise"


def test_older_rows_are_compared_case_by_case(tmp_path: Path) -> None:
    common = {"op": "rotary", "pass": "both", "implementation": "fastattn", "status": "ok"}
    file = rows.start_run("rotary", folder=tmp_path)
    old = file.add(common | {"length": 64, "p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.1})
    file.add(common | {"length": 128, "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0})
    file.close()
    now = [
        old | {"p20_ms": 0.4, "p50_ms": 0.5, "p80_ms": 0.6},
        old | {"length": 128, "p20_ms": 1.5, "p50_ms": 2.5, "p80_ms": 3.5, "threads": 64},
        old | {"length": 256},
    ]
    first, faster, same = kept.lines(file.path, now)
    assert "not paired" in first
    assert faster.split()[0] == "0.500" and "within" not in faster and "other" not in faster
    assert same.split()[0] == "1.250" and "within their p20 to p80" in same and "other threads" in same
    assert kept.lines(file.path, now[2:]) == [f"against {file.path}: no case of this run is among its rows"]


def test_a_worker_runs_the_version_it_was_given() -> None:
    lines = '{"call": "rotary", "size": 16, "pass": "both"}\n{"repeat": 2}\n'
    worker = [sys.executable, str(ROOT / "bench/against/worker.py"), str(ROOT)]
    done = subprocess.run(worker, input=lines, capture_output=True, text=True, check=True, cwd="/")
    hello, prepared, timed = done.stdout.splitlines()
    assert '"attention causal"' in hello and '"norms"' in prepared and '"seconds"' in timed


def test_an_unknown_commit_is_told() -> None:
    with pytest.raises(ValueError, match="no-such-commit"), versions.checkout("no-such-commit"):
        pass


@pytest.mark.parametrize("name", calls.here())
def test_every_call_runs(name: str) -> None:
    call = calls.make(name, 24)
    assert call.forward().isfinite().all()
    gradients = call.both()
    assert [x.shape for x in gradients] == [x.shape for x in call.leaves] or not call.trains
    assert all(isinstance(x, torch.Tensor) and x.isfinite().all() for x in gradients)
