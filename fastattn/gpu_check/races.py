"""Attention against every other on the machine: first whether it is right, then how long it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.gpu_check.oracle import Truth, results
from fastattn.gpu_check.peers import OURS, PEERS, Attention, Case, Inputs, Peer, version_of
from fastattn.gpu_check.report import Absent, Report, reraise_if_lost, status_of
from fastattn.gpu_check.timing import Run, columns_of, interleaved
from fastattn.machine import Moment, kernels_of

# Implementations that take seconds before their first result.
COMPILING: Final = (OURS, "flex compiled", "naive compiled", "flash-attn 4")
PASSES: Final = ("forward", "backward", "both")
# What is run, and the passes that are timed in it.
WHOLES: Final = {"forward": ("forward",), "both": ("backward", "both")}
# Batch times length is 16,384 and heads times head_dim 2,048.
CASES: Final = {
    "causal D64 1k": Case("causal", 16, 32, 1024, 64),
    "causal D64 4k": Case("causal", 4, 32, 4096, 64),
    "causal D64 16k": Case("causal", 1, 32, 16384, 64),
    "causal D128 8k": Case("causal", 2, 16, 8192, 128),
    "window": Case("window", 2, 32, 8192, 64),
    "documents": Case("documents", 2, 32, 8192, 64),
    "alibi": Case("alibi", 4, 32, 4096, 64),
    "dropout": Case("dropout", 4, 32, 4096, 64),
}


def tiny(case: Case) -> Case:
    """The same for the interpreter."""
    return Case(case.kind, 1, 1, 32, 16, dtype=torch.float32, window=16, count=2)


@dataclass
class Runner:
    """One implementation and what is known of it.

    Attributes:
        attention: the call.
        kernels: what it ran, by pass.
        errors: share of its budget, by pass; a pass that is not here is not timed.
        peaks: 10^6 bytes, by pass.
    """

    attention: Attention
    kernels: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)


def race(
    report: Report,
    case: Case,
    peers: Mapping[str, Peer] = PEERS,
    passes: Collection[str] = PASSES,
    checked_at: int | None = None,
) -> dict[str, list[float]]:
    """Forward alone, then forward and backward, of all implementations in turn; a row for each and pass.

    Args:
        report: what the rows go to.
        case: the problem.
        peers: the implementations.
        passes: those that are timed.
        checked_at: the length at which results are held to float64, where the case's own would take too long.

    Returns:
        Our own samples in milliseconds, by pass.
    """
    machine = report.machine
    case = tiny(case) if machine.dry_run else case
    if not report.in_time(case.name):
        return {}
    inputs = Inputs(case, machine.device, compiles=not machine.dry_run)
    columns = case.columns
    # With dropout each draws in its own way, so that there it is the case without that is checked.
    sober, note = inputs, []
    if case.kind == "dropout":
        sober, note = (
            Inputs(replace(case, kind="causal"), machine.device, inputs.compiles),
            ["without dropout"],
        )
    if checked_at is not None and checked_at < case.length:
        sober = Inputs(replace(sober.case, length=checked_at), machine.device, inputs.compiles)
        note.append(f"at length {checked_at}")
    runners = _checked(report, inputs, sober, columns, peers, passes)
    columns["note"] = f"checked {', '.join(note)}" if note else None
    ours: dict[str, list[float]] = {}
    if not report.enter(case.name, "timing"):
        return ours
    # Backward is most of the time.
    for training, share in ((False, 0.3), (True, 0.7)):
        wanted = [one for one in WHOLES["both" if training else "forward"] if one in passes]
        if wanted:
            ours |= _time(report, inputs, columns, runners, wanted, max(report.left, 4.0) * share)
    return ours


def _checked(
    report: Report,
    inputs: Inputs,
    sober: Inputs,
    columns: dict[str, Any],
    peers: Mapping[str, Peer],
    passes: Collection[str],
) -> dict[str, Runner]:
    """Every implementation that is here, with the passes in which it is right; a row for each that is not."""
    machine, case = report.machine, inputs.case
    truth = Truth(sober)
    runners: dict[str, Runner] = {}
    for name, peer in peers.items():
        own = columns | {"implementation": name, "version": version_of(name)}
        if not report.enter(case.name, name, name):
            continue
        try:
            lacking = peer.lacks(case)
            if lacking is not None:
                raise Absent(lacking)
            runner = Runner(peer.make(inputs, report.backend))
            checked = peer.make(sober, report.backend)
        except Exception as failure:
            _say(report, own, passes, failure)
            continue
        runners[name] = runner
        for whole, parts in WHOLES.items():
            wanted = [one for one in parts if one in passes]
            refusal = peer.refuses(inputs.device.type, whole)
            if refusal is not None:
                _rows(report, own, wanted, "refused", refusal)
            if refusal is not None or not wanted:
                continue
            run = partial(results, runner.attention, inputs, whole == "both")
            try:
                found = results(checked, sober, whole == "both")
                if sober is not inputs:
                    run()  # what is compiled, or set up once, is not of what is measured next
                runner.peaks[whole] = machine.peak_mb(run)
                runner.kernels[whole] = kernels_of(machine, run)
            except Exception as failure:
                _say(report, own, wanted, failure)
            else:
                try:
                    runner.errors[whole] = truth.check(found)
                except AssertionError as failure:
                    _rows(report, own, wanted, *status_of(failure))
                del found
            machine.free_bytes()  # what a failure has left
    return runners


def prepare(report: Report, case: Case) -> None:
    """Run once what compiles itself, so that its kernels are in the caches on disk when the race begins."""
    inputs = Inputs(case, report.machine.device)
    for name in COMPILING:
        for training in (False, True):
            # Whatever goes wrong here does so again in the race, and is told there.
            with contextlib.suppress(Exception):
                results(PEERS[name].make(inputs, report.backend), inputs, training)


def _say(report: Report, columns: dict[str, Any], passes: Iterable[str], failure: Exception) -> None:
    """Rows of a call that did not end; an assertion of its own says nothing of a result."""
    status, note = status_of(failure, peer=columns["implementation"] != OURS)
    _rows(report, columns, passes, "failed" if status == "wrong" else status, note)
    reraise_if_lost(failure)


def _rows(report: Report, columns: dict[str, Any], passes: Iterable[str], status: str, note: str) -> None:
    for one in passes:
        report.row(**columns | {"passes": one, "status": status, "note": note})


def _time(
    report: Report,
    inputs: Inputs,
    columns: dict[str, Any],
    runners: dict[str, Runner],
    wanted: Collection[str],
    seconds: float,
) -> dict[str, list[float]]:
    machine, case = report.machine, inputs.case
    training = "forward" not in wanted
    whole = "both" if training else "forward"
    runs = {
        name: _run(report, inputs, runner.attention, training)
        for name, runner in runners.items()
        if whole in runner.errors
    }
    for name, run in list(runs.items()):
        try:
            run()
            machine.synchronize()
        except Exception as failure:  # as for memory, now that all the others' inputs are there
            del runs[name]
            version = version_of(name)
            _say(report, columns | {"implementation": name, "version": version}, wanted, failure)
    taken = interleaved(machine, runs, seconds)
    mhz = machine.sm_mhz()
    ours: dict[str, list[float]] = {}
    for name, parts in taken.items():
        runner = runners[name]
        times = {"forward": parts[0]}
        if training:
            times = {"backward": parts[1], "both": [a + b for a, b in zip(*parts, strict=True)]}
        if name == OURS:
            ours = times
        for passes, samples in times.items():
            if passes not in wanted:
                continue
            found = columns_of(samples)
            report.row(
                **columns,
                **found,
                passes=passes,
                implementation=name,
                version=version_of(name),
                kernel=(f"{report.backend}: " if name == OURS else "") + runner.kernels[whole],
                status="ok",
                error_of_budget=round(runner.errors[whole], 3),
                tflops=round(case.flops(passes) / found["p50_ms"] / 1e9, 2),
                peak_mb=runner.peaks[whole] if passes != "backward" else None,
                sm_mhz=mhz,
            )
    return ours


def _run(report: Report, inputs: Inputs, attention: Attention, training: bool) -> Run:
    machine = report.machine

    def forward() -> list[Moment]:
        with torch.no_grad():
            start = machine.mark()
            attention(*inputs.leaves)
            return [start, machine.mark()]

    def both() -> list[Moment]:
        start = machine.mark()
        out = attention(*inputs.leaves)
        middle = machine.mark()
        torch.autograd.grad(out, inputs.leaves, inputs.dout)
        return [start, middle, machine.mark()]

    return both if training else forward


def ceilings(report: Report) -> None:
    """What the device can do at all: a bfloat16 matrix product, and a copy."""
    machine = report.machine
    if not report.begin("ceilings"):
        return
    size = 256 if machine.dry_run else 8192
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    source, target = copy_buffers(report)

    def timed(run: Callable[[], object]) -> Run:
        def samples() -> list[Moment]:
            start = machine.mark()
            run()
            return [start, machine.mark()]

        return samples

    runs = {"matmul": timed(lambda: a @ b), "copy": timed(lambda: target.copy_(source))}
    for name, parts in interleaved(machine, runs, min(5.0, report.seconds / 2)).items():
        found = columns_of(parts[0])
        moved = 2 * source.numel() * source.itemsize / found["p50_ms"] / 1e6
        report.row(
            case=name,
            implementation="torch",
            version=str(torch.__version__),
            status="ok",
            dtype="bfloat16" if name == "matmul" else "uint8",
            length=size if name == "matmul" else None,
            tflops=round(2 * size**3 / found["p50_ms"] / 1e9, 1) if name == "matmul" else None,
            gb_per_s=round(moved, 1) if name == "copy" else None,
            sm_mhz=machine.sm_mhz(),
            **found,
        )


def copy_buffers(report: Report, size: int = 2**30) -> tuple[Tensor, Tensor]:
    """Two of a size that no cache holds."""
    if report.machine.dry_run:
        size = 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=report.machine.device)
    return source, torch.empty_like(source)
