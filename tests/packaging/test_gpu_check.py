"""`fastattn gpu-check`: the whole of it in a dry run, and each part on what goes wrong."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import cli
from fastattn.gpu_check import command, peers, processes, races
from fastattn.gpu_check.goals import GOALS, tables, value_of, verdict
from fastattn.gpu_check.oracle import Truth, one_head, results
from fastattn.gpu_check.peers import Case, Inputs, Peer
from fastattn.gpu_check.report import REFUSALS, Report
from fastattn.gpu_check.rows import COLUMNS, Rows
from fastattn.gpu_check.steps import chosen, steps
from fastattn.gpu_check.timing import columns_of, interleaved
from fastattn.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not command.describe(True)["triton"], reason="triton is not here")


class Kept(Report):
    """A report that keeps its rows."""

    def __init__(self, backend: str = "reference", seconds: float = 60.0) -> None:
        super().__init__("test", Machine(dry_run=True), backend, seconds)
        self.rows: list[dict[str, Any]] = []

    def row(self, **columns: Any) -> None:
        self.rows.append(columns)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@needs_triton
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU, with the kernels in Triton's interpreter; no row goes where the measured ones are."""
    path, before = tmp_path / "rows.csv", sorted((ROOT / "bench/results").iterdir())
    only = "features float32,cache,dropout,far,sanitizer,ceilings,launch,decode 12:12,race causal"
    status = cli.main(["gpu-check", "--dry-run", "--only", only, "--output", str(path)])
    said = capsys.readouterr().out
    rows = read(path)
    bad = [row for row in rows if row["status"] in ("wrong", "failed", "out of memory")]
    assert (status, bad) == (0, []), said
    assert {row["run"] for row in rows} == {"dry-run"}
    assert "a dry run: nothing above is a measurement" in said
    assert sorted((ROOT / "bench/results").iterdir()) == before
    features = {row["case"] for row in rows if row["step"] == "features float32"}
    from fastattn.testing import cases

    assert features == {f"{name}, float32" for name in cases.FEATURES}
    interpreted = {row["case"] for row in rows if row["kernel"] == "triton" and row["status"] == "ok"}
    assert {"causal, float32", "dropout, float32", "cache, rows", "strides over 2^31"} <= interpreted
    raced = [row for row in rows if row["step"] == "race causal D64 1k" and row["p50_ms"]]
    assert {row["passes"] for row in raced} == {"forward", "backward", "both"}
    assert {"fastattn", "sdpa flash", "naive"} <= {row["implementation"] for row in raced}
    assert all(row["kernel"].startswith("triton") for row in raced if row["implementation"] == "fastattn")
    flash = next(row for row in raced if row["implementation"] == "sdpa flash")
    assert flash["kernel"] == "sdpa:flash"
    cudnn = [row for row in rows if row["implementation"] == "sdpa cudnn"]
    assert cudnn and all(row["status"] == "refused" and not row["p50_ms"] for row in cudnn)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-check"]) == 1
    assert "finds no GPU; --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "got 'nonsense'"),
        (["--budget", "0"], "--budget above 0"),
        (["--jobs", "0"], "--jobs of 1 or more"),
        (["--dry-run", "--output", str(ROOT / "bench/results/x.csv")], "measures nothing"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu-check", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (ROOT / "bench/results/x.csv").exists()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu-check", "--list", "--only", "bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = {line.split()[0] for line in lines}
    assert groups == {"bench", "prepare"}
    assert len(lines) == sum(step.group in groups for step in steps(False).values())


def test_every_goal_has_its_case() -> None:
    cases = {case.name for case in races.CASES.values()} | set(races_of_models())
    assert {goal.case for goal in GOALS} <= cases
    assert {goal.peer for goal in GOALS} <= {
        *peers.PEERS,
        "copy",
        "transformers, eager",
        "fastattn.gpt2, standard",
    }


def races_of_models() -> list[str]:
    from fastattn.gpu_check import models

    return [*models.DECODE, "GPT-2 step"]


def test_only_takes_groups_and_names() -> None:
    assert set(chosen("far", dry_run=False)) == {"far"}
    assert "far" in chosen("correctness", dry_run=False)
    assert "prepare window" in chosen("bench", dry_run=False)
    assert set(chosen("race window, launch", dry_run=False)) == {"race window", "launch"}


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    rows = Rows(path, {"date": "2026-01-01", "machine": "a GPU"})
    rows.add({"step": "s", "case": "c, d", "status": "ok", "p50_ms": 1.5, "note": None})
    assert [row["case"] for row in read(path)] == ["c, d"]
    rows.close()
    again = Rows(path, {"date": "2026-01-02"})
    again.add({"step": "s", "case": "e", "status": "ok"})
    again.close()
    found = read(path)
    assert list(found[0]) == list(COLUMNS)
    assert [row["date"] for row in found] == ["2026-01-01", "2026-01-02"]
    with pytest.raises(ValueError, match="not in fieldnames"):
        rows = Rows(path, {})
        rows.add({"nonsense": 1})
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns"):
        Rows(other, {})


# In the place of a child: tells what the order in its last argument makes of it.
FAKE = """
import json, os, sys, time
order = json.loads(sys.argv[-1])
for step in order["steps"]:
    print("@begin", step, flush=True)
    for case in ("one", "two", "three"):
        if case in order["done"][step]:
            continue
        at = {"key": case, "step": step, "case": case, "implementation": "fastattn"}
        print("@case", json.dumps(at), flush=True)
        if case == "two" and step == "crashes":
            print("terminate called")
            os._exit(7)
        if case == "two" and step == "hangs":
            time.sleep(60)
        row = {"step": step, "case": case, "implementation": "fastattn", "status": "ok"}
        print("@row", json.dumps(row), flush=True)
    print("@end", step, flush=True)
"""


def batch_of(names: list[str], seconds: float = 30.0, grace: float = 30.0) -> processes.Batch:
    prefix = [sys.executable, "-c", FAKE]
    return processes.Batch(names, {}, time.monotonic() + seconds, grace=grace, prefix=prefix)


def run(batch: processes.Batch) -> tuple[list[dict[str, Any]], list[str], processes.Outcome]:
    rows: list[dict[str, Any]] = []
    ended: list[str] = []
    outcome = processes.run_batch(batch, lambda row: rows.append(dict(row)), threading.Event(), ended.append)
    return rows, ended, outcome


def test_a_crash_costs_its_case_alone() -> None:
    rows, ended, outcome = run(batch_of(["fine", "crashes", "after"]))
    assert ended == ["fine", "crashes", "after"]
    assert outcome.status == 0
    found = {(row["step"], row["case"]): row for row in rows}
    assert len(found) == len(rows) == 9
    crashed = found.pop(("crashes", "two"))
    assert crashed["status"] == "failed"
    assert crashed["note"] == "exit status 7: terminate called"
    assert {row["status"] for row in found.values()} == {"ok"}


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SILENCE", 1.5)
    rows, ended, _ = run(batch_of(["hangs", "after"]))
    assert ended == ["hangs", "after"]
    hung = [row for row in rows if row["status"] == "failed"]
    assert [(row["step"], row["case"]) for row in hung] == [("hangs", "two")]
    assert "no answer in time" in hung[0]["note"]
    assert len(rows) == 6


def test_nothing_outlasts_the_budget() -> None:
    start = time.monotonic()
    rows, ended, outcome = run(batch_of(["hangs", "crashes"], seconds=0.0, grace=1.0))
    assert time.monotonic() - start < 10
    assert outcome.status is None
    assert ended == ["hangs", "crashes"]
    assert [row["status"] for row in rows if row["step"] == "crashes"] == ["not run"]
    assert "failed" in {row["status"] for row in rows if row["step"] == "hangs"}


def test_a_child_that_does_not_start_is_reported() -> None:
    batch = processes.Batch(
        ["s"], {}, time.monotonic() + 30, prefix=[sys.executable, "-c", "import nonsense"]
    )
    rows, ended, _ = run(batch)
    assert ended == ["s"]
    assert [row["status"] for row in rows] == ["failed"]
    assert "No module named" in rows[0]["note"]


class Quick(command.Check):
    """The command as on a GPU, with `FAKE` for its children."""

    def _batch(self, steps: Sequence[str], end: float, memory: float | None = None, **more: Any) -> Any:
        found = super()._batch(steps, end, memory, **more)
        return dataclasses.replace(found, prefix=[*found.prefix, sys.executable, "-c", FAKE])


def quick(tmp_path: Path) -> Quick:
    args = argparse.Namespace(dry_run=False, budget=60.0, backend="triton", jobs=3)
    return Quick(args, Rows(tmp_path / "rows.csv", {}))


GROUPS = {
    "correctness": ["a", "b", "crashes", "c", "d"],
    "prepare": ["e"],
    "alone": ["far"],
    "sanitizer": ["sanitized"],
    "bench": ["g", "h"],
}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("clean", [True, False])
def test_all_groups(
    clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "compute-sanitizer"
    ending = 'exec "$@"' if clean else '"$@"; echo "========= Invalid __global__ read"; exit 99'
    tool.write_text(
        f'#!/bin/sh\n[ "$1 $3 $4" = "--tool --error-exitcode 99" ] || exit 5\nshift 4\n{ending}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(command, "find_sanitizer", lambda: str(tool))
    check = quick(tmp_path)
    check.run(GROUPS)
    rows = check.rows.rows
    for step in ("a", "b", "c", "d", "e", "far", "g", "h"):
        assert [row["status"] for row in rows if row["step"] == step] == ["ok"] * 3, step
    assert [row["status"] for row in rows if row["step"] == "crashes"] == ["ok", "failed", "ok"]
    sanitizer = {row["case"]: row for row in rows if row["step"] == "sanitizer"}
    assert set(sanitizer) == {"compute-sanitizer memcheck", "compute-sanitizer racecheck"}
    for row in sanitizer.values():
        assert row["status"] == ("ok" if clean else "failed")
        assert clean or "Invalid __global__ read" in row["note"]
    assert check.verdict(interrupted=False) == 1
    said = capsys.readouterr().out
    assert "FAILED: crashes: two: exit status 7" in said
    order = [row["step"] for row in rows]
    assert order.index("far") > max(order.index(step) for step in ("a", "b", "c", "d", "e"))


def test_stopping_ends_the_children(tmp_path: Path) -> None:
    check = quick(tmp_path)
    threading.Timer(1.0, check.stop.set).start()
    start = time.monotonic()
    check.run({"correctness": ["hangs", "a"], "bench": ["hangs"]})
    assert time.monotonic() - start < 10
    assert check.verdict(interrupted=True) == 1


class FakeMachine(Machine):
    """A device whose clock moves as runs say."""

    def __init__(self) -> None:
        super().__init__(dry_run=True)
        self.dry_run, self.now = False, 0.0

    def mark(self) -> float:
        return self.now

    def synchronize(self) -> None: ...

    def settle(self) -> None: ...


def test_samples_take_turns() -> None:
    machine, order = FakeMachine(), []

    def runner(name: str, first: float, second: float) -> Callable[[], list[Any]]:
        def samples() -> list[Any]:
            order.append(name)
            start = machine.mark()
            machine.now += first
            middle = machine.mark()
            machine.now += second
            return [start, middle, machine.mark()]

        return samples

    runs = {"a": runner("a", 0.001, 0.002), "b": runner("b", 0.003, 0.004), "c": runner("c", 0.1, 0.2)}
    found = interleaved(machine, runs, 0.01)
    assert {name: [round(part[0], 6) for part in parts] for name, parts in found.items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
        "c": [100.0, 200.0],
    }
    assert len({len(part) for parts in found.values() for part in parts}) == 1
    rounds = len(found["a"][0])
    assert 5 <= rounds <= 100
    firsts = order[-3 * rounds :: 3]
    assert set(firsts) == {"a", "b", "c"}
    assert columns_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        "rounds": 6,
        "p20_ms": 2.0,
        "p50_ms": 3.5,
        "p80_ms": 5.0,
    }


PROBLEMS = {
    **{kind: Case(kind, 2, 4, 40, 8, torch.float32, window=7, count=4) for kind in peers.KINDS},
    "grouped": Case("alibi", 2, 4, 40, 8, torch.float32, kv_heads=2),
    "wide": Case("window", 2, 4, 40, 8, torch.float32, window=7, kv_heads=2, v_dim=16),
}
del PROBLEMS["dropout"]  # which each draws in its own way
problems = pytest.mark.parametrize("case", PROBLEMS.values(), ids=list(PROBLEMS))


@problems
def test_oracle_is_the_reference(case: Case) -> None:
    inputs = Inputs(case, torch.device("cpu"))
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    out = fastattn.attention(*leaves, backend="reference", **inputs.options)
    assert isinstance(out, Tensor)
    want = [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout.double())]
    last, group = case.kv_heads - 1, case.heads // case.kv_heads
    want = [x[1, -group:] if x.shape[1] == case.heads and i < 2 else x[1, last] for i, x in enumerate(want)]
    for a, b in zip(one_head(inputs, 1, last, torch.float64), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_oracle_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(Case("alibi", 1, 2, 50, 8, dtype=torch.float32), torch.device("cpu"))
    whole = one_head(inputs, 0, 1, torch.float64)
    monkeypatch.setattr("fastattn.gpu_check.oracle._ROWS", 16)
    for a, b in zip(one_head(inputs, 0, 1, torch.float64), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["fastattn", "sdpa default", "sdpa flash", "naive"])
@problems
def test_peers_compute_the_same(case: Case, name: str) -> None:
    """What is raced is one problem, whoever solves it."""
    inputs = Inputs(case, torch.device("cpu"))
    try:
        found = results(peers.PEERS[name].make(inputs, "reference"), inputs, True)
    except RuntimeError as refusal:
        assert name == "sdpa flash" and case.v_dim != case.dim
        assert any(word in str(refusal) for word in REFUSALS)
        return
    assert Truth(inputs).check(found) <= 1


@pytest.mark.slow
@problems
def test_flex_attention_computes_the_same(case: Case) -> None:
    inputs = Inputs(case, torch.device("cpu"))
    found = results(peers.PEERS["flex compiled"].make(inputs, "reference"), inputs, False)
    assert Truth(inputs).check(found) <= 1


def test_a_dense_mask_is_made_before_the_call() -> None:
    inputs = Inputs(PROBLEMS["window"], torch.device("cpu"))
    peers.PEERS["sdpa default"].make(inputs, "reference")
    assert "additive" in vars(inputs)


def flash_attn(kinds: dict[str, Any]) -> Any:
    """A module with flash-attn's functions on our reference, that keeps what it was called with."""

    class Module:
        @staticmethod
        def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            kinds["plain"] = options
            mask = fastattn.causal() if options["causal"] else None
            if "window_size" in options:
                mask = fastattn.sliding_window(*options["window_size"])
            slopes = options.get("alibi_slopes")
            bias = None if slopes is None else fastattn.alibi(slopes)
            heads = (x.transpose(1, 2) for x in (q, k, v))
            out = fastattn.attention(*heads, mask=mask, bias=bias, backend="reference")
            return out.transpose(1, 2), None

        @staticmethod
        def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            kinds["packed"] = options
            return fastattn.varlen_attention(
                q, k, v, options["cu_seqlens_q"], mask=fastattn.causal(), backend="reference"
            )

    return Module


@pytest.mark.parametrize("kind", ["causal", "full", "window", "alibi", "documents"])
def test_flash_attn_is_called_as_it_wants(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(calls))
    inputs = Inputs(Case(kind, 2, 2, 32, 16, dtype=torch.float32, window=5, count=4), torch.device("cpu"))
    found = results(peers.PEERS["flash-attn 2"].make(inputs, "reference"), inputs, True)
    assert Truth(inputs).check(found) <= 1
    assert list(calls) == ["packed" if kind == "documents" else "plain"]


def test_a_wrong_result_is_not_timed() -> None:
    def wrong(inputs: Inputs, backend: str) -> peers.Attention:
        right = peers.naive(inputs, backend)
        return lambda q, k, v: right(q, k, v) * 1.01

    table = {"fastattn": Peer(peers.ours, ""), "wrong": Peer(wrong, "")}
    report = Kept()
    ours = races.race(report, races.CASES["causal D64 1k"], table)
    assert set(ours) == {"forward", "backward", "both"}
    found = {(row["implementation"], row["passes"]): row for row in report.rows}
    assert {row["status"] for key, row in found.items() if key[0] == "fastattn"} == {"ok"}
    for passes in ("forward", "backward", "both"):
        assert found["wrong", passes]["status"] == "wrong"
        assert "over budget" in found["wrong", passes]["note"]
        assert "p50_ms" not in found["wrong", passes]


def raising(failure: Exception) -> peers.Make:
    """An implementation whose forward, where a gradient is wanted, ends in `failure`."""

    def make(inputs: Inputs, backend: str) -> peers.Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise failure
            return peers.naive(inputs, backend)(q, k, v)

        return attention

    return make


def test_what_a_peer_ends_with_has_its_word() -> None:
    never = raising(AssertionError("was run"))
    table = {
        "refuses": Peer(raising(RuntimeError("No available kernel. Aborting execution.")), ""),
        "crashes": Peer(raising(RuntimeError("index out of range")), ""),
        "asserts": Peer(raising(AssertionError("expected bfloat16")), ""),
        "lacks": Peer(never, "", can=("full",)),
        "elsewhere": Peer(never, "", backward=("cuda",)),
        "fastattn": Peer(raising(RuntimeError("not supported")), ""),
    }
    report = Kept()
    races.race(report, races.CASES["causal D64 1k"], table)
    found = {(row["implementation"], row["passes"]): row["status"] for row in report.rows}
    words = {"refuses": "refused", "crashes": "failed", "asserts": "failed", "elsewhere": "refused"}
    for name, word in (words | {"fastattn": "failed"}).items():
        assert [found[name, which] for which in races.PASSES] == ["ok", word, word], name
    notes = {row["note"] for row in report.rows if row["implementation"] == "lacks"}
    assert notes == {"has no causal"} and found["lacks", "forward"] == "absent"
    assert "has no backward on cpu" in {row["note"] for row in report.rows}


@pytest.mark.parametrize(
    ("more", "why"),
    [({"kv_heads": 1}, "fewer heads"), ({"v_dim": 8}, "another head size"), ({"kind": "bool"}, "a tensor")],
)
def test_what_a_peer_lacks(more: dict[str, Any], why: str) -> None:
    case, peer = Case("causal", 1, 2, 32, 16), Peer(peers.naive, "", ("causal",), grouped=False, wide=False)
    assert peer.lacks(case) is None
    assert why in str(peer.lacks(dataclasses.replace(case, **more)))


def test_our_own_wrong_result_ends_in_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastattn.gpu_check import checks

    right = fastattn.attention

    def wrong(q: Tensor, *args: Any, **options: Any) -> Any:
        out, lse = right(q, *args, **options)
        return out + (0.5 if torch.is_grad_enabled() and options.get("seed") is None else 0.0), lse

    report = Kept()
    monkeypatch.setattr("fastattn.testing.budget.api.attention", wrong)
    checks.errors(report, "causal", ("causal",), checks.MINI, "float32", "reference")
    assert report.rows[0]["status"] == "wrong"
    assert "out: error 5" in report.rows[0]["note"]
    check = command.Check(argparse.Namespace(dry_run=True, budget=1.0), Rows(tmp_path / "rows.csv", {}))
    check.add(report.rows[0] | {"step": "s"})
    assert check.verdict(interrupted=False) == 1


def test_a_step_without_time_says_so() -> None:
    from fastattn.gpu_check import checks

    report = Kept(seconds=-1.0)
    checks.dropout(report)
    assert [row["status"] for row in report.rows] == ["not run"] * 3
    assert {row["note"] for row in report.rows} == {"time"}


def row_of(implementation: str, ms: float, **columns: Any) -> dict[str, Any]:
    case = races.CASES["causal D64 1k"].name
    return {
        "case": case,
        "passes": "forward",
        "implementation": implementation,
        "status": "ok",
        "p50_ms": ms,
        **columns,
    }


def test_goals_against_rows() -> None:
    goal = next(g for g in GOALS if g.peer == "sdpa cudnn" and g.passes == "forward")
    rows = [row_of("fastattn", 2.0), row_of("sdpa cudnn", 2.1), row_of("sdpa flash", 3.4)]
    assert value_of(rows, goal) == pytest.approx(1.05)
    assert verdict(1.05, goal) == "minimum reached"
    assert verdict(1.2, goal) == "aim reached"
    assert verdict(0.99, goal) == "NOT reached"
    rows[1] = {**rows[1], "status": "wrong"}
    assert value_of(rows, goal) is None
    table = tables(rows)
    assert "1.70x" in table
    assert "not measured" in table
    decode = next(g for g in GOALS if g.peer == "copy")
    share = row_of("fastattn", 1.0, share_of_copy=0.8) | {"case": decode.case}
    assert value_of([share], decode) == 0.8


def test_flops_by_the_usual_formula() -> None:
    case = Case("causal", 2, 3, 64, 16)
    assert case.flops("forward") == 4 * 64 * 64 * 16 * 3 * 2 / 2
    assert case.flops("both") == 3.5 * case.flops("forward")
    for size in (64, 512):
        assert Case("window", 1, 1, 64, 16, window=size).pairs == 64 * 65 / 2
    wide = Case("full", 1, 1, 64, 16, v_dim=32)
    assert wide.flops("forward") == 2 * 64 * 64 * (16 + 32)
    assert wide.flops("backward") == 2 * 64 * 64 * (3 * 16 + 2 * 32)
    assert Case("documents", 1, 1, 64, 16, count=8).pairs == 8 * 8 * 8 / 2


def test_the_order_is_json() -> None:
    order = command.Check(argparse.Namespace(dry_run=True, budget=9.0, backend="triton"), None)._batch(
        ["far"], 1.0
    )  # type: ignore[arg-type]
    assert json.loads(json.dumps(order.order)) == {"dry_run": True, "backend": "triton", "memory": None}
    assert order.environment["TRITON_INTERPRET"] == "1"
