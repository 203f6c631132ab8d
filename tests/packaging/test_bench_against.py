"""Two versions compared: intervals that hold, files of older runs, and a call of each operation."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import calls, rows
from bench.against import kept, paired, versions

ROOT = Path(__file__).resolve().parents[2]


CASES = 34


def launches(draw: random.Random, shift: float, spread: float = 0.03) -> list[float]:
    """Medians of the launches of two versions: each process has a speed of its own."""
    return [shift + draw.gauss(0, spread) for _ in range(paired.LAUNCHES)]


@pytest.mark.parametrize(("shift", "says"), [(0.0, "within the noise"), (-0.2, "faster"), (0.2, "slower")])
def test_interval(shift: float, says: str) -> None:
    ratio, low, high = paired.interval(launches(random.Random(3), shift), CASES)
    assert low <= ratio <= high
    assert low <= math.exp(shift) <= high
    assert paired.verdict(low, high) == says


def test_a_version_against_itself_is_within_the_noise() -> None:
    """Of 200 comparisons of a version with itself, each of many cases, about two find a difference."""
    draw, false = random.Random(5), 0
    for _ in range(200):
        found = [paired.interval(launches(draw, 0.0), CASES) for _ in range(CASES)]
        false += any(paired.verdict(low, high) != "within the noise" for _, low, high in found)
    assert false <= 6


def test_one_launch_of_its_own_mind_is_noise() -> None:
    """A process that is slow from its start says nothing about a version."""
    found = [*(0.01 * (i % 3 - 1) for i in range(paired.LAUNCHES - 1)), 0.5]
    _, low, high = paired.interval(found, 1)
    assert paired.verdict(low, high) == "within the noise"


def test_rounds_are_paired_within_their_launch() -> None:
    pair = paired.Pair(
        "rotary", 64, "both", before=[[1.0, 2.0, 4.0]] * 2, now=[[2.0, 4.0, 8.0], [1.0, 2.0, 4.0]]
    )
    assert pair.logs() == pytest.approx([math.log(2), 0.0])


@pytest.mark.parametrize("name", calls.here())
def test_results_are_held_to_float64(name: str) -> None:
    call = calls.make(name, 48)
    exact = call.exact()
    for _ in range(2):
        right, found = exact.both(), [x.detach().clone() for x in call.both()]
    assert paired.disagreement(found, right) == ""
    for i in range(len(found)):  # a sign, and a hundredth, of any tensor
        for factor in (-1.0, 1.01):
            bad = [x * factor if i == j else x for j, x in enumerate(found)]
            # bfloat16 has no more than 3 roundings of a 256th
            seen = factor < 0 or found[i].dtype == torch.float32
            assert bool(paired.disagreement(bad, right)) == seen, (i, factor)
    assert "shapes" in paired.disagreement(found[:-1], right)
    assert "nan" in paired.disagreement([x * math.nan for x in found], right)


class Version:
    """A worker whose results are multiplied by a factor."""

    calls = ("rotary",)

    def __init__(self, factor: float) -> None:
        self.factor, self.timed = factor, 0

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        if "save" in order:
            call = calls.make(order["call"], order["size"])
            call.both()
            torch.save([x * self.factor for x in call.both()], order["save"])
        self.timed += "repeat" in order
        return {"seconds": 1e-3}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("factor, wrong", [(1.0, []), (-1.0, ["now"])])
def test_what_is_wrong_is_not_timed(
    factor: float, wrong: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    then, now = Version(1.0), Version(factor)
    monkeypatch.setattr(paired, "Worker", lambda which: {"then": then, "now": now}[which])
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(paired, "RUN", SimpleNamespace(add=kept.append, next_race=lambda: 7))
    pair = paired.Pair("rotary", 32, "both")
    for launch in range(2):
        paired._launch([("then",), ("now",)], [pair], 0.01, check=launch == 0)
    said: list[str] = []
    paired._report([pair], "abc", said.append)
    assert sorted(pair.wrong) == wrong
    assert bool(then.timed) == bool(now.timed) == bool(pair.now) == (not wrong)
    assert [row["status"] for row in kept] == (["not run", "wrong"] if wrong else ["ok", "ok"])
    assert ("WRONG now" in said[-1]) == bool(wrong)
    assert all(("p50_ms" in row) == (not wrong) and row["race"] == 7 for row in kept)


def test_options_that_would_change_nothing_are_refused() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--against", "HEAD", "--mask=causal"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0
    assert "--mask: expected without --against a commit" in done.stdout + done.stderr


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
    assert '"attention causal"' in hello and prepared == "{}" and '"seconds"' in timed


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
