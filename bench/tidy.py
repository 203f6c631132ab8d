"""The tidy rows of the run that is going on: opened by conftest.py, filled by whatever is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import rows
from fastattn import _backends
from fastattn.gpu_check.rows import Rows

# What the files of one suite call otherwise.
RENAMED = {
    "passes": "pass",
    "tokens": "length",
    "context": "length",
    "dim": "head_dim",
    "how": "implementation",
    "steps": "rounds",
    "fma_share": "share_of_ceiling",
}
# What they have of where and when, which a run says in its own columns, and what follows from other rows.
LEFT_OUT = (
    *("date", "machine", "cpu", "gpu", "torch", "fastattn", "transformers"),
    *("speedup", "share_of_copy", "share_of_saving", "cost_of_pair", "q_mb", "pass_ms", "first_step_ms"),
)
# Files that are not of the operation that their name begins with.
OPS = {"compiler_step": "gpt2"}

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


def translate(file_name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a suite's own file as a tidy one; what it says of the problem beyond columns is `extra`."""
    stem = file_name.removesuffix(".csv")
    folders = [path.name for path in rows.RESULTS.parent.iterdir() if stem.startswith(f"{path.name}_")]
    found: dict[str, Any] = {"op": OPS.get(stem) or max(folders, key=len, default=stem), "status": "ok"}
    more: dict[str, Any] = {}
    for name, value in row.items():
        key = RENAMED.get(name, name)
        if key in rows.COLUMNS and name not in LEFT_OUT:
            found[key] = value
        elif name not in LEFT_OUT and value != "":
            more[name] = value
    if stem in ("gpt2_step", "compiler_step"):
        found["pass"] = "step"
    elif "pass" not in found:
        found["pass"] = "forward" if stem == "decode" else "both"
    found["extra"] = rows.extra(**more)
    if "fma_share" in row:
        found["ceiling"] = "fma" if row["fma_share"] != "" else ""
    return found
