"""What the benchmarks share: samples taken side by side, handed to pytest-benchmark, kept as rows of CSV."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


class Clock:
    """Seconds that pass only as `samples` are taken: pytest-benchmark then reads samples taken before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.samples)

    def replay(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """Let `benchmark`, whose timer is this clock, see the samples."""
        self.samples = iter(seconds)
        benchmark.pedantic(self.step, rounds=len(seconds))


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th, linear between samples."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def append(file_name: str, row: dict[str, Any]) -> None:
    """Add a row to a file under bench/results/; the file's header and the row's keys must agree."""
    path = RESULTS / file_name
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        assert header == list(row), f"{path}: expected columns {header}, got {list(row)}"
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def where() -> dict[str, Any]:
    """The first columns of every row."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
    }


def peak_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which `run` raises this process's resident memory at its highest; None off Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def high_water() -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    reset.write_text("5")  # the high-water mark starts again from what is resident now
    before = high_water()
    run()
    return high_water() - before
