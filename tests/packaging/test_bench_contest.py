"""The contest that the benchmarks of every operation are: who is wrong has no time, and what a row has."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contest, memory, tidy
from bench.contest import Contest, Problem, Race
from bench.linear import test_linear as linear

ROOT = Path(__file__).resolve().parents[2]


class Threefold(torch.autograd.Function):
    """3 x, with a gradient of `slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return 3 * x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return ctx.slope * dout, None


@dataclass(frozen=True)
class Triple(Problem):
    op = "triple"
    length: int = 5
    slope: float = 3.0
    dropout: float = 0.0

    def race(self, device: torch.device) -> Race:
        x = torch.linspace(-1, 1, self.length, dtype=self.dtype)
        return Race(
            {"x": x},
            {
                "fastattn": partial(self.scaled, slope=self.slope),
                "torch": lambda x: 3 * x,
                "wrong gradient": partial(self.scaled, slope=3.1),
                "wrong result": lambda x: 3.001 * x,
                "of another shape": lambda x: (3 * x)[None],
                "crash": self.crash,
                "no kernel": self.no_kernel,
                "no gradient": lambda x: 3 * x.detach(),
            },
            beside={"copy": lambda x: x.clone()},
            forward_only=("no gradient",),
        )

    def scaled(self, x: Tensor, slope: float) -> Tensor:
        out: Tensor = Threefold.apply(x, slope)
        return out * (1 - self.dropout)  # as if what is drawn were wrong beside the equation's

    def crash(self, x: Tensor) -> Tensor:
        raise AssertionError("lost")

    def no_kernel(self, x: Tensor) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    def flops(self, which: str) -> int:
        return 10**9


Run = Callable[..., Contest]


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A contest that is run, its rows in a file of its own."""
    run = tidy.Run()
    run.begin("triple", "cpu", tmp_path)
    run.ceilings = {"fma": 1000.0, "copy": 10.0}
    monkeypatch.setattr(contest, "RUN", run)
    usual = {"--peers": None, "--all-cases": False, "passes": None, "--seconds": 0.001, "--no-memory": True}
    return lambda problem, **given: Contest(problem, (usual | given).get)


def test_who_is_wrong_has_no_time(held: Run) -> None:
    done = held(Triple())
    done.run()
    found = {(row["implementation"], row["pass"]): row for row in done.rows}
    status = {which: row["status"] for which, row in found.items()}
    for name in ("fastattn", "torch", "copy"):
        assert {status[name, which] for which in ("forward", "backward", "both")} == {"ok"}
    assert status["wrong gradient", "forward"] == "ok" and status["wrong gradient", "both"] == "wrong"
    assert status["wrong result", "forward"] == status["wrong result", "backward"] == "wrong"
    assert status["of another shape", "forward"] == "wrong" and status["no kernel", "both"] == "refused"
    assert status["crash", "forward"] == "failed" and "lost" in found["crash", "forward"]["note"]
    assert status["no gradient", "forward"] == "ok" and status["no gradient", "both"] == "absent"
    for row in done.rows:
        assert (row["status"] == "ok") == ("p50_ms" in row) == ("race" in row) == ("kernel" in row)
    assert (
        "for comparison" in found["copy", "both"]["note"] and "error_of_budget" not in found["copy", "both"]
    )
    assert found["fastattn", "forward"]["error_of_budget"] <= 1


def test_a_row_has_every_column_that_applies(held: Run) -> None:
    done = held(Triple(length=7), passes="backward,both")
    done.run()
    assert {row["pass"] for row in done.rows} == {"backward", "both"}
    row = next(row for row in done.rows if row["implementation"] == "fastattn" and row["pass"] == "both")
    assert row["op"] == "triple" and row["length"] == 7 and row["extra"] == '{"slope":3.0}'
    assert row["flops"] == 10**9 and row["bytes"] == 4 * (7 + 7 + 7 + 7 + 7)
    assert row["rounds"] >= 5 and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["share_of_ceiling"] > 0 and row["version"] and row["isa"]
    assert {row["race"] for row in done.rows if row["status"] == "ok"} == {1}, "both are of the same turns"


@pytest.mark.parametrize("problem", [Triple(slope=3.1), Triple(slope=3.1, dropout=0.5)], ids=str)
def test_ours_wrong_ends_the_benchmark(held: Run, problem: Triple) -> None:
    with pytest.raises(AssertionError, match=r"backward: wrong: .*dx"):
        held(problem).run()


def test_dropout_is_checked_without(held: Run) -> None:
    done = held(Triple(dropout=0.5), passes="forward")
    done.run()
    row = next(row for row in done.rows if row["implementation"] == "fastattn")
    assert row["status"] == "ok" and row["dropout"] == 0.5 and row["note"].startswith("checked as length5")


def test_peers_are_chosen_by_name(held: Run) -> None:
    assert list(held(Triple(), **{"--peers": "torch"}).functions) == ["fastattn", "torch", "copy"]
    assert "torch compiled" in held(Triple(), **{"--all-cases": True}).functions
    assert "torch compiled" not in held(Triple()).functions
    with pytest.raises(ValueError, match=r"expected peers among .*; got nobody"):
        held(Triple(), **{"--peers": "nobody"})


SUITES = ("linear", "mlp", "cross_entropy", "layer_norm", "rotary", "embedding", "adamw")
SMALL = {
    **{"rows": 20, "width": 48, "hidden": 64, "vocabulary": 99, "vocab": 99, "columns": 40, "layers": 1},
    **{"in_features": 33, "out_features": 65, "length": 9, "head_dim": 16},
}


def test_rounded_gradients_reach_the_truth_too() -> None:
    """Else the error of bfloat16 would be that of other numbers, and the budget twice that."""
    race = Triple(dtype=torch.bfloat16, length=99).race(torch.device("cpu"))
    truth = contest.Truth(race, training=True)
    (plain,), (exact,) = truth.plain[1:], truth.exact[1:]
    rounded = contest.arriving([race.leaves["x"]])[0].double()
    assert torch.equal(exact, 3 * rounded) and not torch.equal(plain.double(), exact)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suites_cases(held: Run, suite: str) -> None:
    """Small ones: each implementation that is here is right, and every pass has its rows."""
    for case in importlib.import_module(f"bench.{suite}.test_{suite}").CASES:
        sizes = {name: size for name, size in SMALL.items() if name in case.__dataclass_fields__}
        problem = replace(case, **sizes)
        done = held(problem)
        done.run()
        assert {row["pass"] for row in done.rows} == set(problem.passes)
        assert {row["implementation"] for row in done.rows if row["status"] == "ok"} == set(done.functions)
        assert all(row["bytes"] > 0 for row in done.rows if row["status"] == "ok")


def test_a_ceiling_of_other_instructions_is_none(held: Run) -> None:
    row = {"op": "linear", "status": "ok", "p50_ms": 1.0, "flops": 10**9, "bytes": 1000}
    assert contest.RUN.add(row | {"dtype": "float32"})["ceiling"] == "fma"
    assert "share_of_ceiling" not in contest.RUN.add(row | {"dtype": "bfloat16"})
    assert contest.RUN.add(row | {"dtype": "bfloat16", "bytes": 10**9})["ceiling"] == "copy"


def test_a_case_is_found_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("as_pytest_calls_it", linear.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "as_pytest_calls_it", module)
    spec.loader.exec_module(module)
    case = module.Case(rows=3, dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(case)) == linear.Case(rows=3, dtype=torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_the_calls_own() -> None:
    """The result has 16.8 MB, the gradients 1.3; what reaches them is there beforehand."""
    case = linear.Case(rows=4096, in_features=64, out_features=1024)
    found = memory.peaks_mb(partial(contest.alone, case, "torch", ("forward", "both")))
    assert 16 <= found["forward"] <= 20
    assert 17 <= found["both"] <= 24
