"""Rows of the file that a check writes: one for each measurement, on disk as soon as it is made."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# What the same run's rows share, then what was measured, then what came out.
COLUMNS: Final = (
    "date",
    "started",
    "run",
    "machine",
    "driver",
    "cuda",
    "torch",
    "triton",
    "fastattn",
    "step",
    "case",
    "passes",
    "dtype",
    "batch",
    "heads",
    "kv_heads",
    "length",
    "head_dim",
    "implementation",
    "version",
    "kernel",
    "status",
    "note",
    "error_of_budget",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "tflops",
    "gb_per_s",
    "share_of_copy",
    "peak_mb",
    "sm_mhz",
)
# What `status` may be; those that end the command with 1 where they are ours.
OK: Final = "ok"
BAD: Final = ("wrong", "failed", "out of memory")
STATUSES: Final = (OK, *BAD, "refused", "absent", "not run")


class Rows:
    """A CSV file that rows are added to.

    Args:
        path: the file; it is made with its header where it does not exist.
        common: what is the same in every row.
        columns: of the file, in order; those of `fastattn gpu-check` if not given.

    Raises:
        ValueError: the file is there with other columns.
    """

    def __init__(self, path: Path, common: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
        self.common = dict(common)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(columns):
                raise ValueError(f"{path}: expected the columns {list(columns)}, got {header}")
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")
        if new:
            self._writer.writeheader()
            self._file.flush()

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row, now; returns it with what all rows have."""
        whole = {name: value for name, value in (self.common | dict(row)).items() if value is not None}
        self._writer.writerow(whole)
        self._file.flush()
        self.rows.append(whole)
        return whole

    def close(self) -> None:
        """End the file."""
        self._file.close()
