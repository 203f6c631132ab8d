"""Attention against everyone in `bench/peers.py`, on a CPU or a GPU.

`fastattn bench --op attention` takes the short list; `--all-cases` every case; `--length`, `--head-dim`,
`--mask`, `--dtype`, any of them, their product. Every implementation is held to float64 before any is timed;
then they take turns, on the device's clock. Rows go to the run's file under bench/results/runs/.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from bench import memory, rows
from bench.peers import LOOP_LENGTH, OURS, chosen, version_of
from bench.rows import Clock, percentiles
from bench.tidy import RUN, isa_of
from fastattn.gpu_check import peers
from fastattn.gpu_check.peers import Case
from fastattn.gpu_check.races import PASSES, race
from fastattn.gpu_check.report import Report
from fastattn.machine import Machine

CLOCK = Clock()
KINDS = {"none": "full"}  # what `--mask` calls otherwise than `Case`
# Where float64 takes longer than the race, what is checked is a shorter one.
CHECKED_AT = 2048
# Shorter ones are as large as what the allocator rounds to.
MEASURED_FROM = 1024
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def case_of(mask: str, dtype: torch.dtype, length: int, dim: int = 64, **more: int) -> Case:
    """On a CPU, GPT-2's width of 768 and batch 1; on a GPU 16,384 tokens and a width of 2,048.

    Args:
        mask: a kind of `Case`, or ``none``.
        dtype: of the tensors.
        length: of queries and keys.
        dim: of a head.
        more: fields of `Case`.
    """
    batch, width = (1, 768) if RUN.device == "cpu" else (max(1, 16384 // length), 2048)
    if RUN.device == "cpu" and length == LOOP_LENGTH:  # one head, as of the Python loop's problem
        width = dim
    shared = {"batch": batch, "heads": max(1, width // dim)} | more
    return Case(KINDS.get(mask, mask), length=length, dim=dim, dtype=dtype, **shared)


def short() -> list[Case]:
    """A look at each kind of problem; the calls' own cost counts at the first two."""
    if RUN.device == "cuda":
        return [case_of("causal", BF16, *sizes) for sizes in ((1024, 64), (4096, 64), (8192, 128))]
    return [
        case_of("causal", F32, 64),
        case_of("causal", F32, 512),
        case_of("causal", F32, 1024),
        case_of("causal", F32, 2048),
        case_of("causal", F32, 1024, 128),
        case_of("causal", BF16, 1024),
        case_of("none", F32, 1024),
        case_of("window", F32, 2048),
        case_of("dropout", F32, 1024),
        case_of("causal", F32, 1024, kv_heads=3),
        case_of("bool", F32, 1024, v_dim=32),
    ]


def every() -> list[Case]:
    """All there is."""
    if RUN.device == "cuda":
        listed = [
            *product(("causal", "none"), (BF16,), (512, 1024, 2048, 4096, 8192, 16384), (64, 128)),
            *product(("window", "alibi", "documents", "dropout"), (BF16,), (4096, 8192)),
        ]
        return [case_of(*one) for one in listed] + [case_of("causal", BF16, 4096, kv_heads=8)]
    listed = [
        ("causal", F32, 64),
        *product(("causal", "none"), (F32,), (512, 1024, 2048, 4096), (64, 128)),
        *product(("causal",), (BF16, F16), (1024, 4096)),
        *product(("window", "alibi", "documents", "dropout"), (F32,), (1024, 2048, 4096)),
    ]
    return [
        *(case_of(*one) for one in listed),
        case_of("causal", F32, 8192, heads=1),
        *(case_of("causal", F32, length, kv_heads=3) for length in (1024, 4096)),
        *(case_of(mask, F32, length, v_dim=32) for mask in ("bool", "tril") for length in (1024, 2048)),
    ]


@dataclass
class Kept(Report):
    """A report whose rows are the run's tidy ones."""

    problem: Case | None = None
    memory: bool = True
    wholes: tuple[str, ...] = ("forward", "both")

    def row(self, **columns: Any) -> None:
        case, name, which = self.problem, columns["implementation"], columns.pop("passes", "")
        assert case is not None
        peak, clock = columns.pop("peak_mb", None), columns.pop("sm_mhz", None)
        for one in ("case", "tflops"):
            columns.pop(one, None)
        if clock:
            columns["note"] = "; ".join(filter(None, (columns.get("note"), f"{clock} MHz")))
        more = {
            "window": {"window": case.window},
            "documents": {"documents": case.count},
            "alibi": {"bias": "alibi"},
        }
        columns |= {
            "op": "attention",
            "pass": which,
            "v_dim": case.v_dim,
            "mask": {"full": "none", "dropout": "causal", "alibi": "causal"}.get(case.kind, case.kind),
            "dropout": case.dropout if case.kind == "dropout" else 0.0,
            "extra": rows.extra(**more.get(case.kind, {})),
            "version": version_of(name),
            "isa": isa_of(name, self.machine.device.type),
        }
        if columns.get("status") == "ok":
            if self.machine.on_cpu and self.memory and which != "backward":
                peak = memory.peaks_mb(partial(memory.attention, case, name, self.wholes)).get(which)
            # Forward without a graph is timed by itself, backward and both in the same turns.
            whole = "forward" if which == "forward" else "both"
            if whole not in self.races:
                self.races[whole] = RUN.next_race()
            columns |= {"race": self.races[whole], "peak_mb": peak}
            columns |= {"flops": int(case.flops(which)), "bytes": bytes_of(case, which)}
        self.rows.append(RUN.add(columns))

    def enter(self, case: str, part: str = "", implementation: str = OURS) -> bool:
        return True

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.races: dict[str, int] = {}


def bytes_of(case: Case, which: str) -> int:
    """Every input read, every result written once; of backward q, k, v, out, lse and what belongs to them."""
    q, k, v, out = (heads * dim for heads, dim in case.shapes)
    elements = {"forward": q + k + v + out, "backward": 2 * (q + k + v + out)}
    elements["both"] = sum(elements.values())
    tokens = case.batch * case.length
    lse = 4 * tokens * case.heads * {"forward": 0, "backward": 1, "both": 2}[which]
    mask = case.length**2 * (2 if which == "both" else 1) if case.kind in ("tril", "bool") else 0
    return tokens * elements[which] * case.dtype.itemsize + lse + mask


def cases(config: pytest.Config) -> list[Case]:
    """The short list, or every case, or the product of what the options list."""

    def given(option: str) -> list[str] | None:
        found = config.getoption(option, None)
        return None if found is None else [word.strip() for word in found.split(",")]

    masks, dtypes = given("--mask"), given("--dtype")
    unknown = [mask for mask in masks or () if KINDS.get(mask, mask) not in peers.KINDS]
    if unknown:
        known = ("none", *(kind for kind in peers.KINDS if kind != "full"))
        raise pytest.UsageError(f"--mask: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    lengths, dims = given("--length"), given("--head-dim")
    if not any((masks, dtypes, lengths, dims)):
        return every() if config.getoption("--all-cases", False) else short()
    usual = "float32" if RUN.device == "cpu" else "bfloat16"
    chosen = product(masks or ["causal"], dtypes or [usual], lengths or ["1024"], dims or ["64"])
    return [
        case_of(mask, getattr(torch, dtype), int(length), int(dim)) for mask, dtype, length, dim in chosen
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = cases(metafunc.config)
    ids = [f"{case.name}, {str(case.dtype).removeprefix('torch.')}".replace(", ", "-") for case in found]
    metafunc.parametrize("problem", found, ids=[name.replace(" ", "") for name in ids])


@pytest.mark.benchmark(timer=CLOCK)
def test_peers(
    benchmark: Any, problem: Case, ceilings: dict[str, float], request: pytest.FixtureRequest
) -> None:
    option, case = request.config.getoption, problem
    passes = [one for one in PASSES if option("passes") is None or one in option("passes").split(",")]
    machine = Machine(dry_run=False, device=RUN.device)
    backend = "cpu" if machine.on_cpu else "triton"
    raced = chosen(option("--peers"), RUN.device, option("--all-cases"))
    if case.length > LOOP_LENGTH and option("--peers") is None:
        raced.pop("python loop", None)
    report = Kept(case.name, machine, backend, option("--seconds"), problem=case)
    report.memory = not option("--no-memory") and case.length >= MEASURED_FROM
    report.wholes = tuple(one for one in passes if one != "backward")
    checked_at = CHECKED_AT if machine.on_cpu else None
    ours = race(report, case, raced, passes, checked_at)
    bad = [row for row in report.rows if row["implementation"] == OURS and row["status"] != "ok"]
    assert not bad, "; ".join(f"{row['pass']}: {row['status']}: {row.get('note')}" for row in bad)
    for row in report.rows:
        benchmark.extra_info[f"{row['implementation']}, {row['pass']}"] = row.get("p50_ms", row["status"])
    benchmark.group = case.name
    shown = next(one for one in reversed(passes) if one in ours)
    benchmark.extra_info["median_ms"] = round(percentiles(ours[shown])[1], 4)
    CLOCK.replay(benchmark, [ms / 1000 for ms in ours[shown]])
