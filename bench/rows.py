"""What the benchmarks share: samples taken side by side, handed to pytest-benchmark, kept as rows of CSV."""

from __future__ import annotations

import csv
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.gpu_check.rows import Rows
from fastattn.machine import version

RESULTS = Path(__file__).resolve().parent / "results"
# Raised when a column of the tidy rows goes or changes its meaning.
SCHEMA = 2
# Where and when, which problem, who computed it, and what came out; results/README.md says what each is.
COLUMNS = (
    "schema",
    "started",
    "suite",
    "device",
    "processor",
    "isa",
    "threads",
    "torch",
    "triton",
    "fastattn",
    "op",
    "pass",
    "dtype",
    "batch",
    "heads",
    "kv_heads",
    "length",
    "head_dim",
    "v_dim",
    "mask",
    "dropout",
    "extra",
    "implementation",
    "race",
    "version",
    "kernel",
    "status",
    "note",
    "error_of_budget",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "flops",
    "bytes",
    "gflops",
    "gb_per_s",
    "share_of_ceiling",
    "ceiling",
    "peak_mb",
)
# Two rows with these alike, of one run or of two, are of one problem.
CASE = COLUMNS[COLUMNS.index("op") : COLUMNS.index("implementation")]
_INTEGERS = (
    "schema",
    "threads",
    "batch",
    "heads",
    "kv_heads",
    "length",
    "head_dim",
    "v_dim",
    "race",
    "rounds",
)
_NUMBERS = ("dropout", "error_of_budget", *COLUMNS[COLUMNS.index("p20_ms") :])


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


def processor(device: str = "cpu") -> str:
    """The name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit(root: Path = RESULTS.parent.parent) -> str:
    """The checkout's, short, with ``.dirty`` where it has been changed since; empty outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=9", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastattn", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + (".dirty" if changed else "")


def common(suite: str, device: str = "cpu") -> dict[str, Any]:
    """The columns that all tidy rows of one run share."""
    here = commit()
    return {
        "schema": SCHEMA,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "suite": suite,
        "device": device,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "fastattn": fastattn.__version__ + (f"+{here}" if here else ""),
    }


def start_run(suite: str, device: str = "cpu", folder: Path = RESULTS / "runs") -> Rows:
    """A new file ``<date>-<device>-<suite>.csv`` for the tidy rows of one run; a row is on disk once added.

    Args:
        suite: what is run: an operation, or what a command is called.
        device: ``cpu`` or ``cuda``.
        folder: where the file goes.

    Returns:
        `Rows`, whose ``add`` takes a dict of the other columns; ``extra`` as `extra` makes it.
    """
    shared = common(suite, device)
    slug = re.sub(r"[^a-z0-9]+", "-", shared["processor"].lower()).strip("-")
    name = f"{shared['started'][:10]}-{slug}-{suite}"
    path, count = folder / f"{name}.csv", 1
    while path.exists():
        count += 1
        path = folder / f"{name}-{count}.csv"
    return Rows(path, shared, COLUMNS)


def extra(**values: Any) -> str:
    """What a problem is beyond the other columns, as JSON with sorted keys; empty where nothing."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")) if values else ""


def read(path: Path) -> list[dict[str, Any]]:
    """Tidy rows of a file, numbers as numbers, ``extra`` as a dict, and None for what is empty.

    Raises:
        ValueError: the file is of another schema.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        if row.get("schema") != str(SCHEMA):
            raise ValueError(f"{path}: expected rows of schema {SCHEMA}, got {row.get('schema')}")
        for name, text in row.items():
            if name == "extra":
                row[name] = json.loads(text or "{}")
            elif text == "":
                row[name] = None
            elif name in _INTEGERS:
                row[name] = int(text)
            elif name in _NUMBERS and name != "ceiling":
                row[name] = float(text)
    return rows


def case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What problem a row is of, to find the same in another file; `row` as written or as read."""
    words = []
    for name in CASE:
        value = row.get(name)
        if name == "extra" and isinstance(value, dict):
            value = extra(**value)
        words.append(
            "" if value is None else f"{float(value):g}" if name == "dropout" and value != "" else str(value)
        )
    return tuple(words)
