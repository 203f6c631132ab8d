"""Attention against everyone in `bench/peers.py`, on a CPU or a GPU.

`fastattn bench --op attention` takes the short list; `--all-cases` every case; `--length`, `--head-dim`,
`--mask`, `--dtype`, any of them, their product. Every implementation is held to float64 before any is timed;
then they take turns, on the device's clock. Rows go to the run's file under bench/results/runs/.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from bench import memory, rows
from bench.peers import LOOP_LENGTH, OURS, chosen, version_of
from bench.rows import Clock, percentiles
from bench.tidy import RUN, isa_of
from fastattn.gpu_check.machine import Machine
from fastattn.gpu_check.peers import Case
from fastattn.gpu_check.races import PASSES, race
from fastattn.gpu_check.report import Report

CLOCK = Clock()
KINDS = {"causal": "causal", "none": "full", "window": "window", "documents": "documents", "alibi": "alibi"}
# Where float64 takes longer than the race, what is checked is a shorter one.
CHECKED_AT = 2048
# Shorter ones are as large as what the allocator rounds to.
MEASURED_FROM = 1024
Problem = tuple[str, torch.dtype, int, int]  # mask, dtype, length, head_dim
F32, BF16 = torch.float32, torch.bfloat16
SHORT: dict[str, list[Problem]] = {
    "cpu": [
        ("causal", F32, 64, 64),
        ("causal", F32, 512, 64),
        ("causal", F32, 1024, 64),
        ("causal", F32, 2048, 64),
        ("causal", F32, 1024, 128),
        ("causal", BF16, 1024, 64),
        ("none", F32, 1024, 64),
        ("window", F32, 2048, 64),
        ("dropout", F32, 1024, 64),
    ],
    "cuda": [("causal", BF16, 1024, 64), ("causal", BF16, 4096, 64), ("causal", BF16, 8192, 128)],
}
EVERY: dict[str, list[Problem]] = {
    "cpu": [
        *product(("causal", "none"), (F32,), (512, 1024, 2048, 4096), (64, 128)),
        *product(("causal",), (BF16, torch.float16), (1024, 4096), (64,)),
        *product(("window", "alibi", "documents", "dropout"), (F32,), (1024, 4096), (64,)),
        ("causal", F32, 64, 64),
        ("causal", F32, 8192, 64),
    ],
    "cuda": [
        *product(("causal", "none"), (BF16,), (512, 1024, 2048, 4096, 8192, 16384), (64, 128)),
        *product(("window", "alibi", "documents", "dropout"), (BF16,), (4096, 8192), (64,)),
    ],
}


def case_of(problem: Problem, device: str) -> Case:
    """On a CPU, GPT-2's width of 768 and batch 1; on a GPU 16,384 tokens and a width of 2,048."""
    mask, dtype, length, dim = problem
    batch, width = (1, 768) if device == "cpu" else (max(1, 16384 // length), 2048)
    if device == "cpu" and length == 64:  # one head, as of the Python loop's problem
        width = dim
    kind = KINDS.get(mask, mask)
    return Case(kind, batch, max(1, width // dim), length, dim, dtype=dtype, window=min(512, length // 4))


@dataclass
class Kept(Report):
    """A report whose rows are the run's tidy ones."""

    problem: Case | None = None
    memory: bool = True
    wholes: tuple[str, ...] = ("forward", "both")

    def row(self, **columns: Any) -> None:
        case, name, which = self.problem, columns["implementation"], columns.pop("passes", "")
        assert case is not None
        mask = {"full": "none", "dropout": "causal", "alibi": "causal"}.get(case.kind, case.kind)
        more = {
            "window": {"window": case.window},
            "documents": {"documents": case.count},
            "alibi": {"bias": "alibi"},
        }
        peak, clock = columns.pop("peak_mb", None), columns.pop("sm_mhz", None)
        columns.pop("tflops", None)
        ok = columns.get("status") == "ok"
        if self.machine.on_cpu and self.memory and ok and which != "backward":
            peak = memory.peaks_mb(case, name, self.wholes).get(which)
        if clock:
            columns["note"] = "; ".join(filter(None, (columns.get("note"), f"{clock} MHz")))
        problem = {
            "op": "attention",
            "pass": which,
            "v_dim": case.dim,
            "mask": mask,
            "dropout": case.dropout if case.kind == "dropout" else 0.0,
            "extra": rows.extra(**more.get(case.kind, {})),
        }
        found = {
            "version": version_of(name),
            "isa": isa_of(name, self.machine.device.type),
            "peak_mb": peak,
        }
        if ok:
            found |= {"flops": int(case.flops(which)), "bytes": bytes_of(case, which)}
        columns.pop("case", None)
        self.rows.append(RUN.add(columns | problem | found))

    def enter(self, case: str, part: str = "", implementation: str = OURS) -> bool:
        return True

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []


def bytes_of(case: Case, which: str) -> int:
    """Every input read, every result written once: q, k, v, out; for backward dout and the gradients too."""
    tensors = {"forward": 4, "backward": 8, "both": 12}[which]
    tokens = case.batch * case.heads * case.length
    lse = 4 * tokens * {"forward": 0, "backward": 1, "both": 2}[which]
    return tensors * tokens * case.dim * case.dtype.itemsize + lse


def problems(config: pytest.Config, device: str) -> list[Problem]:
    """The short list, or every case, or the product of what the options list."""

    def given(option: str) -> list[str] | None:
        found = config.getoption(option, None)
        return None if found is None else [word.strip() for word in found.split(",")]

    masks, dtypes = given("--mask"), given("--dtype")
    lengths, dims = given("--length"), given("--head-dim")
    if not any((masks, dtypes, lengths, dims)):
        return (EVERY if config.getoption("--all-cases", False) else SHORT)[device]
    usual = "float32" if device == "cpu" else "bfloat16"
    return list(
        product(
            masks or ["causal"],
            [getattr(torch, name) for name in dtypes or [usual]],
            [int(n) for n in lengths or ["1024"]],
            [int(n) for n in dims or ["64"]],
        )
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = problems(metafunc.config, RUN.device)
    ids = [f"{mask}-{str(dtype).removeprefix('torch.')}-L{n}-D{dim}" for mask, dtype, n, dim in found]
    metafunc.parametrize("problem", found, ids=ids)


@pytest.mark.benchmark(timer=CLOCK)
def test_peers(
    benchmark: Any, problem: Problem, ceilings: dict[str, float], request: pytest.FixtureRequest
) -> None:
    option, case = request.config.getoption, case_of(problem, RUN.device)
    passes = [one for one in PASSES if option("passes") is None or one in option("passes").split(",")]
    machine = Machine(dry_run=False, device=RUN.device)
    backend = "cpu" if machine.on_cpu else "triton"
    peers = chosen(option("--peers"), RUN.device, option("--all-cases"))
    if case.length > LOOP_LENGTH and option("--peers") is None:
        peers.pop("python loop", None)
    report = Kept(case.name, machine, backend, option("--seconds"), problem=case)
    report.memory = not option("--no-memory") and case.length >= MEASURED_FROM
    report.wholes = tuple(one for one in passes if one != "backward")
    checked_at = CHECKED_AT if machine.on_cpu else None
    ours = race(report, case, peers, passes, checked_at)
    bad = [row for row in report.rows if row["implementation"] == OURS and row["status"] != "ok"]
    assert not bad, "; ".join(f"{row['pass']}: {row['status']}: {row.get('note')}" for row in bad)
    for row in report.rows:
        benchmark.extra_info[f"{row['implementation']}, {row['pass']}"] = row.get("p50_ms", row["status"])
    benchmark.group = case.name
    shown = next(one for one in reversed(passes) if one in ours)
    benchmark.extra_info["median_ms"] = round(percentiles(ours[shown])[1], 4)
    CLOCK.replay(benchmark, [ms / 1000 for ms in ours[shown]])
