"""`fastattn compare gpt2`: how time and memory are shared out, on simulated processes; and the arithmetic."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fastattn.gpt2 import compare
from fastattn.gpt2.compare import session as session_module
from fastattn.gpt2.compare.plan import fit, predict, rotated, turns
from fastattn.gpt2.compare.process import OutOfMemory, OutOfTime
from fastattn.gpt2.compare.progress import Progress
from fastattn.gpt2.compare.report import markdown, sweep_table, train_table, write_report
from fastattn.gpt2.compare.result import parity, result_of, summaries, verdict
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, settings_of


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class SimulatedWorker:
    """Answers as a child would; a step takes time and memory by a law of the context."""

    clock: ClassVar[Clock]
    seconds: ClassVar[dict[str, tuple[float, float]]] = {}  # per 1,024 tokens, and per its square
    activations: ClassVar[dict[str, tuple[float, float]]] = {}  # GB, likewise
    at_rest = int(2e9)
    losses: ClassVar[dict[str, float]] = {}
    warm_ups: ClassVar[list[int]] = []  # contexts of all steps

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        which = (spec["attention"], spec["compiled"], spec["own"])
        self.name = next(
            name for name, (at, _, compiled, own) in IMPLEMENTATIONS.items() if (at, compiled, own) == which
        )
        self.compile_seconds = 60.0 if spec["compiled"] else 0.0
        self.command: dict[str, Any] = {}
        self.context = 0

    def resident(self) -> int:
        return self.at_rest

    def send(self, command: dict[str, Any]) -> None:
        self.command = command

    def wait(self, limit: int, deadline: float | None, tick: Any) -> dict[str, Any]:
        if self.command["do"] == "build":
            self.clock.now += 2
            self.context = self.command["context"]
            model = {"libraries_bytes": int(4e8), "model_bytes": int(1.6e9), "weights": "same"}
            return {**model, "parameters": 10**8, "threads": 2, "backend": None}
        context = int(Path(self.command["batches"]).name.split("-")[0])
        if self.command["do"] == "profile":
            return {"kernel": "sdpa:flash" if self.name == "sdpa" else "mm"}
        self.warm_ups.append(context)
        t = context / 1024
        (a, b), (c, d) = self.seconds[self.name], self.activations[self.name]
        compiling, self.compile_seconds = self.compile_seconds, 0.0
        seconds, peak = a * t + b * t * t + compiling, self.at_rest + int(1e9 * (c * t + d * t * t))
        if peak > limit:
            raise OutOfMemory("stopped", limit)
        self.clock.now += seconds
        if deadline is not None and self.clock.now > deadline:
            raise OutOfTime
        return {"loss": self.losses.get(self.name, 10.0), "ms": 1000 * seconds, "peak_bytes": peak}

    def close(self) -> None:
        pass


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session on a machine of two cores: the times and sizes are those of GPT-2 124M."""
    clock = Clock()
    monkeypatch.setattr(SimulatedWorker, "clock", clock, raising=False)
    seconds = {"standard": (6, 8), "sdpa": (6, 6), "fastattn": (6, 1)}
    seconds |= {"compiled": (5, 4), "attention": (6.5, 1)}
    monkeypatch.setattr(SimulatedWorker, "seconds", seconds)
    activations = {"standard": (1, 2.6), "sdpa": (1, 2.6), "fastattn": (1, 0)}
    activations |= {"compiled": (1, 2), "attention": (1.2, 0)}
    monkeypatch.setattr(SimulatedWorker, "activations", activations)
    monkeypatch.setattr(SimulatedWorker, "losses", {})
    monkeypatch.setattr(SimulatedWorker, "warm_ups", [])
    monkeypatch.setattr(session_module, "Worker", SimulatedWorker)
    monkeypatch.setattr(session_module, "time", clock)
    monkeypatch.setattr(session_module, "available_bytes", lambda: int(24e9))

    ids = tmp_path / "ids.bin"
    ids.write_bytes(torch.full((200_000,), 65, dtype=torch.uint16).numpy().tobytes())

    def run(*words: str, implementations: str | None = "standard,sdpa,fastattn") -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        options = ["--data", str(ids), "--tokenizer", "bytes", "--device", "cpu", *words]
        options += [] if implementations is None else ["--implementations", implementations]
        settings = settings_of(parser.parse_args(options))
        with Session(settings, Progress(settings.implementations)) as session:
            session.run()
        result = result_of(session, started="now", seconds=clock.now - 1000, interrupted=False)
        assert markdown(result, None)
        return result

    return run


def cells(result: dict[str, Any]) -> dict[tuple[int, str], str]:
    return {(row["context"], row["implementation"]): row["status"] for row in result["sweep"]}


def test_the_default_run_fits_its_time(simulated: Any) -> None:
    result = simulated(implementations=None)
    assert result["seconds"] < 12 * 60
    assert list(result["train"]) == list(IMPLEMENTATIONS)
    assert all(row["steps"] >= 3 for row in result["train"].values())
    assert result["parity"]["steps"] >= 2
    assert (result["baseline"], result["ours"]) == ("standard", "fastattn")
    at = cells(result)
    names = ("standard", "sdpa", "attention", "fastattn")
    assert [at[1024, name] for name in names] == ["measured"] * 4
    assert [at[2048, name] for name in names] == ["measured"] * 4
    assert at[4096, "standard"] == at[4096, "sdpa"] == "out of memory" and at[4096, "fastattn"] == "measured"
    assert at[8192, "standard"] == "out of memory"
    refused = next(row for row in result["sweep"] if row["status"] == "out of memory")
    assert {row["status"] for row in result["implementations"].values()} == {"measured"}
    assert refused["predicted_bytes"] == pytest.approx(2e9 + 4e9 + 16 * 2.6e9, rel=0.01)
    assert "would need about 48 GB" in refused["reason"]


def test_what_is_compiled_trains_and_nothing_else(simulated: Any) -> None:
    result = simulated("--steps", "3", "--sweep", "512,1k", implementations=None)
    own = [s for s in result["samples"] if s["implementation"] == "compiled"]
    assert [s["phase"] for s in own] == ["train"] * 3 and own[0]["ms"] > 60_000
    assert result["train"]["compiled"]["max_ms"] == 9000.0
    assert "compiled" not in result["parity"]["largest"]
    assert "compiled" not in {name for _, name in cells(result)}
    assert {"attention", "fastattn"} <= set(result["parity"]["largest"])


def test_without_the_standard_the_next_is_the_baseline(simulated: Any) -> None:
    words = ("--steps", "3", "--dropout", "0", "--context", "2k", "--no-sweep")
    result = simulated(*words, implementations="fastattn,attention,sdpa")
    assert list(result["train"]) == ["sdpa", "attention", "fastattn"]
    assert result["train"]["fastattn"]["speedup"] == pytest.approx(36 / 16)
    assert result["parity"]["passed"] is True and set(result["parity"]["largest"]) == {
        "attention",
        "fastattn",
    }
    assert result["verdict"].endswith("Dropout 0; torch's sdpa ran sdpa:flash.")
    assert "than sdpa" in result["verdict"] and "attention alone: 2.12× faster" in result["verdict"]
    assert "difference of the loss from sdpa's" in markdown(result, None)


def test_a_slow_machine_does_fewer_steps_and_says_so(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SimulatedWorker, "seconds", {"standard": (15, 20), "sdpa": (15, 15), "fastattn": (15, 3)}
    )
    result = simulated()
    assert result["seconds"] <= 11 * 60
    assert result["train"]["standard"]["steps"] == 2
    assert any(note.startswith("train: 3 of 6 steps") for note in result["notes"])
    assert any(status == "not run (time)" for status in cells(result).values())


def test_the_run_at_dropout_0_has_its_time_kept(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"standard": (40, 20), "sdpa": (40, 15), "fastattn": (40, 3)}
    monkeypatch.setattr(SimulatedWorker, "seconds", seconds)
    result = simulated()
    assert result["train"]["fastattn"]["steps"] == 1
    assert result["parity"]["steps"] == 2
    assert result["seconds"] <= 11 * 60


def test_steps_that_were_asked_for_are_not_cut(simulated: Any) -> None:
    result = simulated("--steps", "40", "--no-sweep", "--time-budget", "100")
    assert result["train"]["fastattn"]["steps"] == 39
    assert result["parity"]["steps"] == 40


def test_a_sweep_without_an_end_of_its_own_gets_one(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "available_bytes", lambda: int(1e15))
    result = simulated("--steps", "2")
    statuses = cells(result)
    assert statuses[2048, "standard"] == "measured"
    assert statuses[max(t for t, _ in statuses), "standard"] == "not run (time)"
    assert result["seconds"] < 60 + 60 + session_module.SWEEP_SECONDS + 10


def test_the_time_budget_ends_a_run_in_the_middle(simulated: Any) -> None:
    result = simulated("--steps", "40", "--time-budget", "2")
    assert 0 < result["train"]["standard"]["steps"] < 39
    assert any("stopped at the time budget" in note for note in result["notes"])
    assert result["parity"]["passed"] is None


def test_without_room_beside_each_other_they_run_one_by_one(simulated: Any) -> None:
    result = simulated("--steps", "3", "--memory-budget", "6", "--no-sweep")
    assert any("not interleaved" in note for note in result["notes"])
    order = [s["implementation"] for s in result["samples"] if s["phase"] == "train"]
    assert order == ["standard"] * 3 + ["sdpa"] * 3 + ["fastattn"] * 3


def test_where_only_ours_fits_the_others_are_out_of_memory(simulated: Any) -> None:
    result = simulated("--steps", "3", "--memory-budget", "4.5", "--sweep", "512,1k,2k")
    assert list(result["train"]) == ["fastattn"]
    assert result["implementations"]["standard"]["status"] == "out of memory"
    at = cells(result)
    assert [at[t, "fastattn"] for t in (512, 1024, 2048)] == ["measured"] * 3
    assert [at[t, "standard"] for t in (512, 1024, 2048)] == ["measured", "out of memory", "out of memory"]
    assert "out of memory" in result["verdict"]


def test_an_end_by_the_watchdog_in_the_sweep_is_no_failure_of_the_training(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations = {"standard": (1, 2.6), "sdpa": (1, 2.6), "fastattn": (1, 0)}
    monkeypatch.setattr(SimulatedWorker, "activations", activations)
    result = simulated("--steps", "2", "--memory-budget", "10", "--sweep", "1k,2k")  # one point: no law yet
    row = next(r for r in result["sweep"] if r["context"] == 2048 and r["implementation"] == "standard")
    assert (row["status"], row["reason"]) == ("out of memory", "stopped")
    assert {row["status"] for row in result["implementations"].values()} == {"measured"}


def test_a_context_longer_than_the_text_is_told(simulated: Any) -> None:
    result = simulated("--steps", "2", "--sweep", "256k")
    assert set(cells(result).values()) <= {"not run (data)", "out of memory"}
    assert cells(result)[256 * 1024, "fastattn"] == "out of memory"


def test_points_that_are_not_measured_are_said_as_it_is_decided(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    result = simulated("--steps", "2", "--memory-budget", "10", "--sweep", "512,4k")
    missing = [row for row in result["sweep"] if row["status"] != "measured"]
    assert [(row["context"], row["implementation"]) for row in missing] == [
        (4096, "standard"),
        (4096, "sdpa"),
    ]
    for row in missing:
        assert f"{row['implementation']}, 4,096 tokens: out of memory: {row['reason']}" in said
    table = sweep_table(result).splitlines()
    assert table[0] == "| tokens | standard | sdpa | fastattn | speed-up |"
    assert table[-1].startswith("| 4,096 | out of memory | out of memory | 40,000 ms, 6.00 GB |")


@pytest.mark.parametrize(
    ("words", "warm_up", "said"),
    [
        (["--sweep", "512"], 512, "a warm-up step at full length"),
        (["--sweep", "512", "--time-budget", "5"], 64, "first touches of the memory"),
    ],
)
def test_the_report_tells_how_the_sweep_warms_up(
    simulated: Any, words: list[str], warm_up: int, said: str
) -> None:
    result = simulated("--steps", "2", *words)
    assert SimulatedWorker.warm_ups[-2:] == [warm_up, 512]
    method = markdown(result, None).partition("## How it was measured")[2]
    assert "contexts other than 1,024 tokens each point is one step" in method and said in method


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_and_is_noted(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float
) -> None:
    monkeypatch.setattr(SimulatedWorker, "losses", {"fastattn": value})
    result = simulated("--steps", "2", "--no-sweep")
    assert result["parity"]["passed"] is False
    assert result["parity"]["largest"] == {"sdpa": 0.0, "fastattn": math.inf}
    assert f"fastattn: expected a finite loss at train, step 1/2, got {value}" in result["notes"]
    assert "LOSSES ARE NOT FINITE" in result["verdict"]
    write_report(result, tmp_path / "report")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    written = json.loads((tmp_path / "report" / "result.json").read_text(), parse_constant=refuse)
    assert written["parity"]["largest"]["fastattn"] == "inf"
    assert {s["loss"] for s in written["samples"]} == {10.0, str(value)}


def curves(**losses: list[float]) -> list[dict[str, Any]]:
    return [
        {"implementation": name, "phase": "parity", "dropout": 0, "step": step, "loss": loss}
        for name, curve in losses.items()
        for step, loss in enumerate(curve)
    ]


@pytest.mark.parametrize(
    ("standard", "ours", "passed"),
    [
        ([10.0, 9.0], [10.0, 9.0001], True),
        ([10.0, 9.0], [10.0, 9.01], False),
        ([10.0, 9.0], [10.000001, math.nan], False),
        ([10.0, math.nan], [10.0, math.nan], False),
        ([10.0, 9.0, 8.0], [10.0], None),  # one step in common says nothing of the gradients
        ([10.0], [math.nan], False),
        ([10.0], [], None),
    ],
)
def test_parity(standard: list[float], ours: list[float], passed: bool | None) -> None:
    found = parity(curves(standard=standard, fastattn=ours, sdpa=standard), "parity", 1e-4)
    assert found["passed"] is passed


def test_parity_is_of_all_that_have_our_attention() -> None:
    losses = curves(standard=[10.0, 9.0], attention=[10.0, 9.01], fastattn=[10.0, 9.0])
    assert parity(losses, "parity", 1e-4)["passed"] is False


def test_the_training_table_ends_with_the_difference_of_the_losses() -> None:
    built = {name: {"libraries_bytes": 0, "model_bytes": 0} for name in IMPLEMENTATIONS}
    rows = summaries([sample("standard", 40.0, 100), sample("fastattn", 20.0, 50)], "train", built)
    head, _, *lines = train_table(rows, {"fastattn": 1.3e-7}).splitlines()
    assert head.endswith("| largest loss difference (dropout 0) |")
    assert [line.split(" | ")[-1] for line in lines] == ["– |", "1.3e-07 |"]


def test_fit_recovers_a_law_and_never_goes_below_zero() -> None:
    assert fit({256: 3 * 256 + 0.5 * 256**2, 512: 3 * 512 + 0.5 * 512**2}) == pytest.approx((3, 0.5))
    assert fit({256: 512.0, 512: 1000.0}) == pytest.approx((1000 / 512, 0))  # bends down: taken as linear
    assert fit({1: 1.0, 2: 4.0, 4: 16.0}) == pytest.approx((0, 1))
    with pytest.raises(ValueError, match="at least 2"):
        fit({512: 1.0})


def test_predictions_from_one_point_are_bounds() -> None:
    assert predict({}, 2048, "least") is None
    assert predict({1024: 8.0}, 512, "least") == 2.0
    assert predict({1024: 8.0}, 512, "most") == 4.0
    assert (
        predict({512: 1.0, 1024: 4.0}, 2048, "least") == predict({512: 1.0, 1024: 4.0}, 2048, "most") == 16.0
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 17])
@pytest.mark.parametrize("rounds", [1, 2, 3, 40])
def test_turns_cover_every_step_once(steps: int, rounds: int) -> None:
    cut = turns(steps, rounds)
    assert [step for turn in cut for step in turn] == list(range(steps))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_each_implementation_comes_first_in_its_turn() -> None:
    assert [rotated(list(IMPLEMENTATIONS), turn)[0] for turn in range(6)] == [*IMPLEMENTATIONS, "standard"]


def sample(name: str, ms: float, peak: int, step: int = 1) -> dict[str, Any]:
    base = {"phase": "train", "context": 8, "dropout": 0.1, "tokens": 8, "loss": 1.0, "warmup": step == 0}
    return {**base, "implementation": name, "step": step, "ms": ms, "peak_bytes": peak}


def test_summaries_leave_the_warm_up_out_of_times_but_not_of_memory() -> None:
    built = {name: {"libraries_bytes": 10, "model_bytes": 20} for name in IMPLEMENTATIONS}
    samples = [sample("standard", 900.0, 100, step=0), sample("standard", 30.0, 90, step=1)]
    samples += [sample("standard", 50.0, 80, step=2), sample("fastattn", 20.0, 70, step=1)]
    found = summaries(samples, "train", built)
    assert found["standard"]["median_ms"] == 40.0
    assert found["standard"]["peak_bytes"] == 100
    assert found["standard"]["activation_bytes"] == 70
    assert found["standard"]["tokens_per_second"] == pytest.approx(200.0)
    assert found["fastattn"]["speedup"] == 2.0

    compiled = [sample("compiled", 900.0, 100, step=0), sample("compiled", 30.0, 60, step=1)]
    assert summaries(compiled, "train", built)["compiled"]["peak_bytes"] == 60


@pytest.mark.parametrize(
    ("ours", "peak", "passed", "said"),
    [
        (20.0, 50, True, ["2.00× faster", "(50%) less memory", "losses agree to 1e-06"]),
        (80.0, 150, True, ["2.00× slower", "(50%) more memory"]),
        (20.0, 50, False, ["LOSSES DIFFER by 1e-06"]),
        (20.0, 50, None, ["losses were not compared"]),
    ],
)
def test_the_verdict_says_what_was_measured(
    ours: float, peak: int, passed: bool | None, said: list[str]
) -> None:
    built = {name: {"libraries_bytes": 0, "model_bytes": 0} for name in IMPLEMENTATIONS}
    rows = summaries([sample("standard", 40.0, 100), sample("fastattn", ours, peak)], "train", built)
    result = {
        "model": {"title": "GPT-2 124M"},
        "baseline": "standard",
        "ours": "fastattn",
        "settings": {"dropout": 0.1},
        "implementations": {"standard": {"kernel": "mm"}, "fastattn": {"kernel": "fastattn_cpu::attention"}},
        "train": rows,
        "parity": {"passed": passed, "largest": {"fastattn": 1e-6}, "tolerance": 1e-4},
    }
    sentence = verdict(result)
    for words in (*said, "Dropout 0.1."):
        assert words in sentence
