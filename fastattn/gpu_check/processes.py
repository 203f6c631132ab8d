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

from fastattn.gpu_check.rows import BAD

# How often a step is begun again behind a case that took its process with it.
ATTEMPTS: Final = 3
_TAIL: Final = 25
# Seconds without a word, in which the slowest kernel is compiled, until a process is taken to hang.
_SILENCE: Final = 120.0


@dataclass(frozen=True)
class Outcome:
    """How the last process of a batch ended.

    Attributes:
        status: its exit status; None where it had to be ended.
        tail: what it printed last.
    """

    status: int | None = 0
    tail: Sequence[str] = ()


Sink = Callable[[Mapping[str, Any]], None]
# By step, cases.
Keys = dict[str, list[str]]


@dataclass
class Batch:
    """Steps for one process after another.

    Attributes:
        steps: names.
        order: of `child.py`, without steps, seconds, done and lost.
        end: on `time.monotonic`'s clock, when they should be done.
        grace: seconds behind `end` after which they are ended.
        prefix: words before the command, as those of compute-sanitizer.
        environment: variables of its own.
    """

    steps: Sequence[str]
    order: Mapping[str, Any]
    end: float
    grace: float = 45.0
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def environment_of(dry_run: bool) -> dict[str, str]:
    """The variables that a child has besides the command's own."""
    # What torch needs to be deterministic; of Inductor's workers a few, as several processes compile at once.
    found = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if dry_run:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return found


def run_batch(
    batch: Batch, sink: Sink, stop: threading.Event, ended: Callable[[str], None] = lambda name: None
) -> Outcome:
    """Run the steps, each in the first process that gets to it.

    Args:
        batch: what to run.
        sink: gets every row.
        stop: set where all is to end now.
        ended: told of each step behind its last row.

    Returns:
        How the last process ended.
    """
    left = list(batch.steps)
    done: Keys = {name: [] for name in left}
    lost: Keys = {name: [] for name in left}
    outcome = Outcome()
    while left and not stop.is_set():
        if outcome.status is None and time.monotonic() > batch.end + batch.grace:
            for name in left:
                row = {"step": name, "case": name, "implementation": "fastattn", "status": "not run"}
                sink(row | {"note": "time"})
                ended(name)
            break
        order = dict(batch.order) | {"steps": left, "done": done, "lost": lost}
        order["seconds"] = max(batch.end - time.monotonic(), 0.0)
        child = _Child([*batch.prefix, sys.executable, "-m", "fastattn.gpu_check.child"], order, batch)
        status = child.follow(sink, done, stop, ended)
        outcome = Outcome(status, tuple(child.tail))
        left = [name for name in left if name not in child.ended]
        if not left or stop.is_set():
            break
        # It went before it was through.
        name = child.step or left[0]
        if not child.told:
            why = "no answer in time" if status is None else f"exit status {status}"
            said = " ".join(" | ".join(child.tail).split())[-400:]
            where = {"step": name, "case": name, "implementation": "fastattn"} | child.at
            sink({**where, "status": "failed", "note": f"{why}: {said}"})
        if child.key is not None:
            lost[name].append(child.key)
        if child.key is None or time.monotonic() > batch.end or len(lost[name]) >= ATTEMPTS:
            left.remove(name)
            ended(name)
    return outcome


class _Child:
    """One process; what it is at."""

    def __init__(self, command: Sequence[str], order: Mapping[str, Any], batch: Batch) -> None:
        self.step: str | None = None
        self.key: str | None = None
        # The case it is at, as columns, and whether there is bad news of it.
        self.at: dict[str, str] = {}
        self.told = False
        self.ended: set[str] = set()
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._limit = batch.end + batch.grace
        self._heard = time.monotonic()
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
        self, sink: Sink, done: Keys, stop: threading.Event, ended: Callable[[str], None]
    ) -> int | None:
        """Until its end; its exit status, None where it had to be ended."""
        try:
            while True:
                now = time.monotonic()
                if stop.is_set() or now > self._limit or now - self._heard > _SILENCE:
                    return None
                try:
                    line = self._lines.get(timeout=0.5)
                except queue.Empty:
                    continue
                if line is None:
                    return self._process.wait(timeout=10)
                self._heard = time.monotonic()
                self._take(line, sink, done, ended)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end()

    def _take(self, line: str, sink: Sink, done: Keys, ended: Callable[[str], None]) -> None:
        word, _, rest = line.partition(" ")
        if word == "@begin":
            self.step, self.key, self.at, self.told = rest, None, {}, False
        elif word == "@case":
            at = json.loads(rest)
            self.key, self.at, self.told = at.pop("key"), at, False
            done[at["step"]].append(self.key)
        elif word == "@row":
            row = json.loads(rest)
            self.told = self.told or row["status"] in BAD
            sink(row)
        elif word == "@end":
            self.ended.add(rest)
            self.step, self.key, self.at = None, None, {}
            ended(rest)
        elif line.strip():
            self.tail.append(line)

    def _end(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
