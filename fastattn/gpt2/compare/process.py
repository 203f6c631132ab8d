"""The parent's side of a child process: starting it, asking it, and ending it before memory runs out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05  # a step of two cores touches at most a few 100 MB of new memory in that time
RESERVE_BYTES = 300_000_000  # left to the system, whoever else takes memory meanwhile
_HAS_PROC = Path("/proc/meminfo").exists()
_PACKAGE_FOLDER = Path(__file__).resolve().parents[3]


class OutOfMemory(Exception):
    """The child needed more than its limit; `peak` is how far it had come, in bytes, if known."""

    def __init__(self, message: str, peak: int | None = None) -> None:
        super().__init__(message)
        self.peak = peak


class OutOfTime(Exception):
    """The child was still at work at the deadline."""


class WorkerFailed(Exception):
    """The child raised, or died."""


class Worker:
    """A child process that trains with one implementation; see its module for what it answers.

    Args:
        spec: the child's argument, JSON-serialisable.
        log: file for what the child prints.
        module: what the child runs, on `child.serve`.
    """

    def __init__(self, spec: dict[str, Any], log: Path, module: str = "fastattn.gpt2.compare.worker") -> None:
        self.log = log
        path = os.pathsep.join(filter(None, (str(_PACKAGE_FOLDER), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
                start_new_session=True,  # Ctrl-C goes to the parent alone, which ends its children
            )
        self._partial = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def resident(self) -> int:
        """Bytes of memory the child holds now."""
        return resident_bytes(self.pid)

    def send(self, command: dict[str, Any]) -> None:
        """Give the child a command; `wait` brings its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._last_words()) from None

    def wait(
        self,
        limit: int | None = None,
        deadline: float | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """The answer to the command sent last.

        Args:
            limit: bytes of resident memory at which the child is killed.
            deadline: `time.monotonic()` at which the child is killed.
            tick: called with the resident bytes while waiting.

        Returns:
            The child's answer. ``peak_bytes`` that the child could not tell is the highest value seen here.

        Raises:
            OutOfMemory: the limit was reached, or the child could not allocate.
            OutOfTime: the deadline was reached.
            WorkerFailed: the child raised or died.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        peak = 0
        while b"\n" not in self._partial:
            ready, _, _ = select.select([descriptor], [], [], POLL_SECONDS)
            if ready:
                received = os.read(descriptor, 1 << 16)
                if not received:
                    raise WorkerFailed(self._last_words())
                self._partial += received
                continue
            resident = self.resident()
            peak = max(peak, resident)
            if limit is not None and resident > limit:
                self.close()
                raise OutOfMemory(f"stopped at {peak / 1e9:.1f} GB, its limit {limit / 1e9:.1f} GB", peak)
            if limit is not None and available_bytes() < RESERVE_BYTES:
                self.close()
                raise OutOfMemory(f"stopped at {peak / 1e9:.1f} GB, the machine had no more", peak)
            if deadline is not None and time.monotonic() > deadline:
                self.close()
                raise OutOfTime
            if tick is not None:
                tick(resident)
        line, self._partial = self._partial.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "out of memory" in answer:
            self.close()
            raise OutOfMemory(answer["out of memory"], peak or None)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        if "peak_bytes" in answer and answer["peak_bytes"] is None:
            answer["peak_bytes"] = max(peak, self.resident())
        return answer

    def close(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the process ended with status {code}" + (f": {lines[-1]}" if lines else "")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    if _HAS_PROC:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) * 1024


def available_bytes() -> int:
    """Memory that can be taken without swapping, by the system's account and the control group's."""
    if not _HAS_PROC:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_control_group_rooms(Path("/sys/fs/cgroup"))])


def _control_group_rooms(root: Path) -> list[int]:
    """What each limit of this process's control groups leaves, version 2 and version 1."""
    rooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file at this level, or "max"
                limit = int((level / limit_name).read_text())
                used = int((level / usage_name).read_text())
                rooms.append(max(limit - used + _page_cache(level), 0))
    return rooms


def _page_cache(group: Path) -> int:
    """File pages of a control group that are given back under pressure."""
    with contextlib.suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
