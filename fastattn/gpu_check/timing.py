"""Samples taken in alternation on the device's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeAlias

from fastattn.machine import Machine, Moment

# Runs once; the moments at which it began and each of its parts ended.
Run: TypeAlias = Callable[[], list[Moment]]
FEWEST: Final = 5
MOST: Final = 100


def interleaved(
    machine: Machine, runs: Mapping[str, Run], seconds: float, *, cold: bool = True
) -> dict[str, list[list[float]]]:
    """Milliseconds of each part of each run, `runs` taking turns after a warm-up.

    Args:
        machine: whose clock.
        runs: by name.
        seconds: to spend, about; there are at least `FEWEST` rounds and at most `MOST`.
        cold: empty the L2 cache before each sample, and let the host go ahead.

    Returns:
        By name, a list for each part.
    """
    rounds = 1
    if not machine.dry_run:
        for _ in range(2):
            _round(machine, runs, cold)
        start = time.perf_counter()
        _round(machine, runs, cold)
        rounds = max(FEWEST, min(MOST, int(seconds / max(time.perf_counter() - start, 1e-6))))
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        # Each comes first, and behind each other, as often.
        turn = i % max(len(names), 1)
        order = {name: runs[name] for name in (*names[turn:], *names[:turn])}
        for name, parts in _round(machine, order, cold).items():
            found[name].append(parts)
    return {name: [list(part) for part in zip(*taken, strict=True)] for name, taken in found.items()}


def _round(machine: Machine, runs: Mapping[str, Run], cold: bool) -> dict[str, list[float]]:
    moments = {}
    for name, run in runs.items():
        if cold:
            machine.settle()
        moments[name] = run()
    machine.synchronize()
    return {name: [machine.between(a, b) for a, b in pairwise(taken)] for name, taken in moments.items()}


def columns_of(samples: Sequence[float]) -> dict[str, Any]:
    """rounds, and the 20th, 50th and 80th percentile, linear between samples."""
    if len(samples) == 1:
        p20 = p50 = p80 = samples[0]
    else:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        p20, p50, p80 = fifths[0], statistics.median(samples), fifths[3]
    return {"rounds": len(samples), "p20_ms": round(p20, 5), "p50_ms": round(p50, 5), "p80_ms": round(p80, 5)}
