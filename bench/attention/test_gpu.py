"""The races of `fastattn gpu-check` under pytest-benchmark, on a machine with a GPU.

Every implementation is checked against float64 and then timed in turn on the device's clock, before
pytest-benchmark looks: it shows our own samples, and keeps the others' medians in `extra_info`. Each run adds
its rows to the file that gpu-check writes, bench/results/DEVICE-DATE.csv.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

import pytest
import torch

from bench.rows import Clock
from fastattn.gpu_check.command import default_output
from fastattn.gpu_check.machine import Machine, describe
from fastattn.gpu_check.races import CASES, race
from fastattn.gpu_check.report import Report
from fastattn.gpu_check.rows import Rows

CLOCK = Clock()
SHORT = ("causal D64 1k", "causal D64 4k")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    now = {"date": date.today().isoformat(), "started": datetime.now().strftime("%H:%M:%S")}
    common = describe(dry_run=False) | now
    found = Rows(default_output(common["machine"], dry_run=False), common)
    yield found
    found.close()


class Kept(Report):
    """A report whose rows go to a file."""

    kept: Rows

    def row(self, **columns: Any) -> None:
        self.kept.add({"step": self.step} | columns)

    def enter(self, case: str, part: str = "", implementation: str = "fastattn") -> bool:
        return True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases", False)
    metafunc.parametrize("name", list(CASES) if everything else SHORT)


@pytest.mark.benchmark(timer=CLOCK)
def test_race(benchmark: Any, rows: Rows, name: str, request: pytest.FixtureRequest) -> None:
    # Each of about ten implementations has its share of the seconds, and some compile first.
    seconds = 10 * request.config.getoption("--seconds", 4.0)
    report = Kept(f"race {name}", Machine(dry_run=False), "triton", seconds)
    report.kept, first = rows, len(rows.rows)
    ours = race(report, CASES[name])
    mine = [row for row in rows.rows[first:] if row["implementation"] == "fastattn"]
    bad = [row for row in mine if row["status"] != "ok"]
    assert not bad, "; ".join(f"{row['passes']}: {row['status']}: {row.get('note')}" for row in bad)
    for row in rows.rows[first:]:
        key = f"{row['implementation']}, {row['passes']}"
        benchmark.extra_info[key] = row.get("p50_ms", row["status"])
    benchmark.group = CASES[name].name
    CLOCK.replay(benchmark, [ms / 1000 for ms in ours["both"]])
