"""What attention's benchmarks race: each computes what it should, and rows say what was timed with what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.attention import features, test_decode, test_peers
from bench.contest import Problem, Truth, results
from bench.tidy import Run
from fastattn import KVCache
from fastattn.gpu_check.peers import PEERS, Case
from fastattn.gpu_check.races import race
from fastattn.machine import Machine

CPU = torch.device("cpu")
SMALL: list[Problem] = [
    *(
        replace(case, heads=2, kv_heads=2 if case.kv_heads == case.heads else 1, length=n)
        for case in features.CASES
        for n in [1024 if case.mask == "window" else 256]
    ),
    *(replace(case.checked, heads=1, length=256) for case in features.DENSITIES[::4]),
    *(replace(case, batch=2, length=256) for case in test_decode.CASES),
]


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_all_compute_the_same(problem: Problem) -> None:
    """Uncompiled; what is compiled is held to float64 again before it is timed."""
    contest, training = problem.race(CPU), "both" in problem.passes
    truth = Truth(contest, training)
    quantised = problem.dtype in (torch.int8, torch.float8_e4m3fn)
    for name, function in contest.functions.items():
        if name != "torch compiled" and not (name == "sdpa" and quantised):
            assert truth.check(results(function, contest.tensors, training)) <= 1, name
    for function in contest.beside.values():
        (out, *_) = results(function, contest.tensors, training)
        assert out.isfinite().all()


def test_no_decoding_step_reads_the_cache_of_another() -> None:
    contest = replace(test_decode.CASES[0], batch=1, length=128).race(CPU)
    caches = []
    for function in (
        *(contest.functions[name] for name in ("fastattn", "fastattn paged", "sdpa")),
        contest.plain,
    ):
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        held += [x for one in held if isinstance(one, KVCache) for x in (one.k, one.v)]
        caches.append({x.untyped_storage().data_ptr() for x in held if isinstance(x, torch.Tensor)})
    assert [len(found) for found in caches] == [2] * 4
    assert len(set().union(*caches)) == 8


def test_rows_say_what_was_timed_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run()
    run.begin("attention", "cpu", tmp_path)
    monkeypatch.setattr(test_peers, "RUN", run)
    case = Case("bool", 1, 4, 48, 16, torch.float32, kv_heads=2, v_dim=32)
    report = test_peers.Kept(case.name, Machine(False, "cpu"), "reference", 0.01, problem=case, memory=False)
    race(report, case, {name: PEERS[name] for name in ("fastattn", "naive", "flash-attn 2")})
    run.close()
    timed = {(row["implementation"], row["pass"]): row for row in run.rows if row["status"] == "ok"}
    races = {key: row["race"] for key, row in timed.items()}
    assert races == {
        (name, which): 1 if which == "forward" else 2
        for name in ("fastattn", "naive")
        for which in ("forward", "backward", "both")
    }
    others = [row for row in run.rows if row["status"] != "ok"]
    assert {(row["status"], row.get("race")) for row in others} == {("absent", None)} and len(others) == 3
    row = timed["naive", "both"]
    assert (row["heads"], row["kv_heads"], row["head_dim"], row["v_dim"]) == (4, 2, 16, 32)
    assert (row["mask"], row["dropout"], row["extra"]) == ("bool", 0.0, "")
    assert row["flops"] == int(2 * 0.75 * 48 * 48 * (4 * 16 + 3 * 32) * 4)
    sizes = 48 * (4 * 16 + 2 * 16 + 2 * 32 + 4 * 32)
    assert row["bytes"] == 4 * (3 * sizes + 2 * 48 * 4) + 2 * 48 * 48


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_window_is_as_many_keys_at_every_length(length: int) -> None:
    assert test_peers.case_of("window", torch.float32, length).window == 512
