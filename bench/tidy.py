"""The tidy rows of the run that is going on: opened by conftest.py, filled by whatever is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import rows
from fastattn import _backends
from fastattn.gpu_check.rows import Rows

# Where these are nearer they hold for these dtypes alone: products of others may use other instructions.
CEILING_OF = {"fma": ("float32",), "matmul": ("bfloat16", "float16")}


class Run:
    """The run's file, made with its first row.

    Attributes:
        ceilings: gflops of ``fma`` and gb_per_s of ``copy``, once they were measured.
        races: how many there were.
    """

    def __init__(self) -> None:
        self.suite, self.device, self.folder = "", "cpu", rows.RESULTS / "runs"
        self.file: Rows | None = None
        self.ceilings: dict[str, float] = {}
        self.races = 0

    def begin(self, suite: str, device: str, folder: Path | None) -> None:
        """Say what is run, where, and in which folder its rows go."""
        self.suite, self.device = suite, device
        self.folder = folder or self.folder

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a tidy row; its rates follow from its median, and its share from the ceilings."""
        if self.file is None:
            self.file = rows.start_run(self.suite or "bench", self.device, self.folder)
        return self.file.add(self._with_rates(dict(row)))

    def next_race(self) -> int:
        """A number for the column ``race`` of rows that are timed in turns with each other."""
        self.races += 1
        return self.races

    def _with_rates(self, row: dict[str, Any]) -> dict[str, Any]:
        p50 = row.get("p50_ms")
        for amount, rate in (("flops", "gflops"), ("bytes", "gb_per_s")):
            if p50 and row.get(amount) and not row.get(rate):
                row[rate] = round(row[amount] / p50 / 1e6, 2)
        shares = {
            name: row[rate] / self.ceilings[name]
            for name, rate in (("fma", "gflops"), ("matmul", "gflops"), ("copy", "gb_per_s"))
            if row.get(rate) and self.ceilings.get(name) and row.get("op") != "ceiling"
        }
        if shares and row.get("status") == "ok":
            nearest = max(shares, key=lambda name: shares[name])
            if row.get("dtype") in CEILING_OF.get(nearest, (row.get("dtype"),)):
                row["ceiling"], row["share_of_ceiling"] = nearest, round(shares[nearest], 3)
        return row

    def close(self) -> Path | None:
        """End the file; where it is, if there were rows."""
        if self.file is None:
            return None
        self.file.close()
        return self.file.path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was written."""
        return [] if self.file is None else self.file.rows


RUN = Run()


def isa_of(implementation: str, device: str = "cpu") -> str:
    """The instruction set whose kernels an implementation runs."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    if implementation.startswith("fastattn") and not _backends.unavailable("cpu"):
        return _backends.cpu_isa()
    return torch.backends.cpu.get_cpu_capability().lower()
