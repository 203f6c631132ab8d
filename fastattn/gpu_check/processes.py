"""Children that run steps: what they say becomes rows, and one that crashes or hangs is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# How often a step is begun again behind a case that took its process with it.
ATTEMPTS: Final = 3
_TAIL: Final = 25
Sink = Callable[[Mapping[str, Any]], None]


@dataclass
class Batch:
    """Steps for one process after another.

    Attributes:
        steps: names.
        order: of `child.py`, without steps, seconds and done.
        end: on `time.monotonic`'s clock, when they should be done.
        grace: seconds behind `end` after which they are ended.
        prefix: words before the command, as those of compute-sanitizer.
        dry_run: run Triton's interpreter, and see no GPU.
    """

    steps: Sequence[str]
    order: Mapping[str, Any]
    end: float
    grace: float = 45.0
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def environment_of(dry_run: bool) -> dict[str, str]:
    """The variables that a child has besides the command's own."""
    found = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    if dry_run:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return found


def run_batch(
    batch: Batch, sink: Sink, stop: threading.Event, ended: Callable[[str], None] = lambda name: None
) -> int | None:
    """Run the steps, each in the first process that gets to it.

    Args:
        batch: what to run.
        sink: gets every row.
        stop: set where all is to end now.
        ended: told of each step behind its last row.

    Returns:
        The exit status of the last process; None where it had to be ended.
    """
    left, done = list(batch.steps), {name: list[str]() for name in batch.steps}
    attempts = dict.fromkeys(batch.steps, 0)
    status: int | None = 0
    while left and not stop.is_set():
        order = dict(batch.order) | {"steps": left, "done": done}
        order["seconds"] = max(batch.end - time.monotonic(), 0.0)
        child = _Child([*batch.prefix, sys.executable, "-m", "fastattn.gpu_check.child"], order, batch)
        status = child.follow(sink, done, stop, ended)
        left = [name for name in left if name not in child.ended]
        if not left or stop.is_set():
            break
        # It went before it was through.
        name = child.step or left[0]
        why = f"no answer in time: ended after {child.case!r}" if status is None else f"exit status {status}"
        said = " ".join(" | ".join(child.tail).split())[-400:]
        case = child.case or name
        sink(
            {
                "step": name,
                "case": case,
                "implementation": "fastattn",
                "status": "failed",
                "note": f"{why}: {said}",
            }
        )
        done[name].append(case)
        attempts[name] += 1
        if status is None or attempts[name] >= ATTEMPTS or child.case is None:
            left.remove(name)
            ended(name)
    return status


class _Child:
    """One process; what it is at."""

    def __init__(self, command: Sequence[str], order: Mapping[str, Any], batch: Batch) -> None:
        self.step: str | None = None
        self.case: str | None = None
        self.ended: set[str] = set()
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._limit = batch.end + batch.grace
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [*command, json.dumps(order)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | dict(batch.environment),
            start_new_session=True,  # so that what it starts can be ended with it
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def follow(
        self, sink: Sink, done: dict[str, list[str]], stop: threading.Event, ended: Callable[[str], None]
    ) -> int | None:
        """Until its end; its exit status, None where it had to be ended."""
        try:
            while True:
                if stop.is_set() or time.monotonic() > self._limit:
                    return None
                try:
                    line = self._lines.get(timeout=0.5)
                except queue.Empty:
                    continue
                if line is None:
                    return self._process.wait(timeout=10)
                self._take(line, sink, done, ended)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end()

    def _take(self, line: str, sink: Sink, done: dict[str, list[str]], ended: Callable[[str], None]) -> None:
        word, _, rest = line.partition(" ")
        if word == "@begin":
            self.step, self.case = rest, None
        elif word == "@case":
            self.case = rest
        elif word == "@row":
            row = json.loads(rest)
            if row.get("case") == self.case or row.get("status") == "not run":
                done[row["step"]].append(row["case"])
            sink(row)
        elif word == "@end":
            self.ended.add(rest)
            ended(rest)
            self.step = self.case = None
        elif line.strip():
            self.tail.append(line)

    def _end(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
