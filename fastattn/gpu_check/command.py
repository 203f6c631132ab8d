"""The command itself: chooses the steps, shares out the time, writes the rows and says how it went."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

import torch

import fastattn
from fastattn.gpu_check.processes import Batch, environment_of, run_batch
from fastattn.gpu_check.rows import BAD, Rows
from fastattn.machine import describe, details

# Of the budget: until when the checks and what goes on beside them, the sanitizer, and the races may last.
_CHECKS_END: Final = 0.4
_SANITIZER_END: Final = 0.5
# Seconds that what needs the whole device's memory has at the least.
_ALONE: Final = 25.0
TOOLS: Final = ("memcheck", "racecheck")
_RESULTS: Final = Path(__file__).resolve().parents[2] / "bench" / "results"
_OWN: Final = ("fastattn", "fastattn.gpt2, fastattn", "transformers, fastattn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastattn gpu-check`."""
    parser.add_argument(
        "--only",
        metavar="WORDS",
        help="correctness, sanitizer, bench, or names that steps begin with, separated by commas",
    )
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="default 480")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the CSV file to add rows to (default bench/results/DEVICE-DATE.csv of a checkout, else here)",
    )
    parser.add_argument("--backend", default="triton", help="of fastattn.attention (default triton)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes that check side by side (default: half the cores, at most 8)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prove the command itself on a CPU, at tiny sizes: measures nothing",
    )
    parser.add_argument("--list", action="store_true", help="print the steps and do nothing")


def run(args: argparse.Namespace) -> int:
    """Check this machine.

    Returns:
        0 where everything of ours that was run is right, else 1.
    """
    from fastattn.gpu_check.steps import chosen  # noqa: PLC0415 - for its --help the command needs no torch ops

    try:
        known = chosen(args.only, args.dry_run)
    except ValueError as error:
        print(f"fastattn gpu-check: {error}", file=sys.stderr)
        return 1
    if args.budget <= 0 or (args.jobs is not None and args.jobs < 1):
        print("fastattn gpu-check: expected a --budget above 0 and --jobs of 1 or more", file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{step.group:<12} {name}" for name, step in known.items()))
        return 0
    missing = None if args.dry_run else _missing(args.backend)
    if missing:
        print(f"fastattn gpu-check: {missing}; --dry-run proves the command itself on a CPU", file=sys.stderr)
        return 1
    if args.dry_run and args.output is not None and _RESULTS in args.output.resolve().parents:
        print(
            f"fastattn gpu-check: --dry-run measures nothing: expected no --output in {_RESULTS}",
            file=sys.stderr,
        )
        return 1
    common = describe(args.dry_run)
    common |= {"date": date.today().isoformat(), "started": datetime.now().strftime("%H:%M:%S")}
    path = args.output or default_output(common["machine"], args.dry_run)
    try:
        rows = Rows(path, common)
    except (OSError, ValueError) as error:
        print(f"fastattn gpu-check: --output: {error}", file=sys.stderr)
        return 1
    for name, value in [(key, common.get(key)) for key in ("machine", "driver", "cuda", "torch", "triton")]:
        print(f"{name:<26} {value if value is not None else 'unknown'}")
    for name, value in details(args.dry_run):
        print(f"{name:<26} {value}")
    print(f"{'rows':<26} {path}", flush=True)
    check = Check(args, rows)
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that no child is left behind
    groups: dict[str, list[str]] = {}
    for name, step in known.items():
        groups.setdefault(step.group, []).append(name)
    interrupted = False
    try:
        check.run(groups)
    except KeyboardInterrupt:
        check.stop.set()
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
        rows.close()
    return check.verdict(interrupted)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Check:
    """One run of the command.

    Args:
        args: its options.
        rows: where results go.
    """

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows = args, rows
        self.start = time.monotonic()
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; say so where it is bad news."""
        with self._lock:
            self.rows.add(row)
            if _is_bad(row):
                print(
                    f"{row['status'].upper()}: {row['step']}: {row['case']}: {row.get('note', '')}",
                    flush=True,
                )

    def run(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Run the steps, by group."""
        if self.args.dry_run:
            self._dry_run(groups)
            return
        together = [*groups.get("correctness", ()), *groups.get("prepare", ())]
        later = any(group in groups for group in ("sanitizer", "bench"))
        checks_end = self._at(_CHECKS_END if later else 1.0)
        self._side_by_side(together, checks_end)
        self._one(groups.get("alone", ()), max(checks_end, time.monotonic() + _ALONE))
        if "sanitizer" in groups:
            self._sanitize(groups["sanitizer"], self._at(_SANITIZER_END if "bench" in groups else 1.0))
        self._one(groups.get("bench", ()), self._at(1.0))

    def _dry_run(self, groups: Mapping[str, Sequence[str]]) -> None:
        """One process for all: to start one takes longer than most steps."""
        self._one([name for names in groups.values() for name in names], self._at(1.0))
        if "sanitizer" in groups:
            self._sanitize((), self._at(1.0))

    def _at(self, share: float) -> float:
        return self.start + share * float(self.args.budget)

    def _batch(self, steps: Sequence[str], end: float, memory: float | None = None, **more: Any) -> Batch:
        order = {"dry_run": self.args.dry_run, "backend": self.args.backend, "memory": memory}
        return Batch(
            steps,
            order,
            end,
            environment=environment_of(self.args.dry_run) | more.pop("variables", {}),
            **more,
        )

    def _one(self, steps: Sequence[str], end: float) -> None:
        if steps:
            run_batch(self._batch(steps, end), self.add, self.stop, self.say)

    def _side_by_side(self, steps: Sequence[str], end: float) -> None:
        if not steps:
            return
        jobs = self.args.jobs or max(1, min(8, (os.cpu_count() or 2) // 2))

        def one(name: str) -> None:
            run_batch(self._batch([name], end, memory=0.9 / jobs), self.add, self.stop, self.say)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(one, steps))
            except BaseException:
                self.stop.set()
                raise

    def _sanitize(self, steps: Sequence[str], end: float) -> None:
        tool = None if self.args.dry_run else find_sanitizer()
        for i, name in enumerate(TOOLS):
            row: dict[str, Any] = {
                "step": "sanitizer",
                "case": f"compute-sanitizer {name}",
                "implementation": "fastattn",
            }
            if tool is None:
                why = "needs a GPU" if self.args.dry_run else "compute-sanitizer is not on PATH"
                self.add(row | {"status": "not run", "note": why})
                continue
            until = time.monotonic() + (end - time.monotonic()) / (len(TOOLS) - i)
            prefix = [tool, "--tool", name, "--error-exitcode", "99"]
            variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            said: list[Mapping[str, Any]] = []
            outcome = run_batch(
                self._batch(steps, until, prefix=prefix, variables=variables), said.append, self.stop
            )
            bad = [r for r in said if _is_bad(r)]
            if outcome.status == 0 and not bad:
                self.add(row | {"status": "ok"})
                continue
            notes = [str(r.get("note")) for r in bad] or [f"exit status {outcome.status}"]
            notes += [line for line in outcome.tail if line.startswith("=========")]
            self.add(row | {"status": "failed", "note": "; ".join(notes)[:800]})
        self.say("sanitizer")

    def say(self, step: str) -> None:
        """Print how a step went, that has ended."""
        with self._lock:
            mine = [row["status"] for row in self.rows.rows if row["step"] == step]
            counts = ", ".join(f"{mine.count(word)} {word}" for word in dict.fromkeys(mine))
            spent = time.monotonic() - self.start
            print(f"{spent:6.1f} s  {step:<32} {counts or 'done'}", flush=True)

    def verdict(self, interrupted: bool) -> int:
        """Print the tables and the outcome; the exit status."""
        from fastattn.gpu_check.goals import tables  # noqa: PLC0415

        rows = self.rows.rows
        found = tables(rows, goals=not self.args.dry_run)
        if found:
            print(f"\n{found}")
        bad = [row for row in rows if _is_bad(row)]
        fine = sum(row["status"] == "ok" and row["implementation"] in _OWN for row in rows)
        skipped = [row for row in rows if row["status"] == "not run"]
        spent = time.monotonic() - self.start
        print(f"\n{fine} of ours ok, {len(bad)} bad, {len(skipped)} not run, {spent:.0f} s")
        for row in bad:
            print(f"  {row['status']}: {row['step']}: {row['case']}: {row.get('note', '')}")
        whys: dict[str, list[str]] = {}
        for row in skipped:
            whys.setdefault(row.get("note", ""), []).append(row["case"])
        for why, which in whys.items():
            print(f"  not run ({why}): {len(which)}, as {', '.join(which[:3])}")
        if self.args.dry_run:
            print("a dry run: nothing above is a measurement")
        print(f"rows: {self.rows.path}")
        if interrupted:
            print("interrupted: the rows until then are kept")
        return 1 if bad or interrupted else 0


def _is_bad(row: Mapping[str, Any]) -> bool:
    return row["status"] in BAD and row["implementation"] in _OWN


def _missing(backend: str) -> str | None:
    """Why there is nothing to check."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    x = torch.empty(1, 1, 1, 16, dtype=torch.bfloat16, device="cuda")
    try:
        reasons = fastattn.explain(x, x, x, backend=backend).reasons
    except ValueError as error:
        return f"--backend: {error}"
    return (
        f"backend {backend!r} can't run here: {'; '.join(reasons[backend])}" if backend in reasons else None
    )


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or where CUDA is installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(Path(home) / "bin")
    )


def default_output(machine: str, dry_run: bool) -> Path:
    """Where rows of a machine go on a day; those of a dry run into a folder for temporary files."""
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="fastattn-")) / "dry-run.csv"
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    folder = _RESULTS if _RESULTS.is_dir() else Path.cwd()
    return folder / f"{name}-{date.today().isoformat()}.csv"
