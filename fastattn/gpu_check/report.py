"""How a step tells the command what it found: lines on standard output, one for each row.

``@begin STEP``, ``@case JSON`` before a case is run, ``@row JSON`` for a result, ``@end STEP``. Whatever else
libraries print has no ``@`` in front and is passed on only where a step fails.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fastattn.machine import Machine


class Absent(Exception):
    """A peer, or a package, that is not here, or does not do this at all; the message says what."""


@dataclass
class Report:
    """What a step writes to.

    Attributes:
        step: its name.
        machine: what it runs on.
        backend: of `fastattn.attention`.
        seconds: how long the step may take, about.
        done: cases that were run before, by a process that this one takes the place of.
        lost: of these, the ones that took their process with them.
    """

    step: str
    machine: Machine
    backend: str
    seconds: float
    done: Collection[str] = ()
    lost: Collection[str] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the step should end."""
        return self.seconds - (time.monotonic() - self.started)

    def row(self, **columns: Any) -> None:
        """A result."""
        print(f"@row {json.dumps({'step': self.step} | columns)}", flush=True)

    def begin(self, case: str) -> bool:
        """Whether to run the case, as was not done before; says so where the time is over."""
        return case not in self.done and self.in_time(case) and self.enter(case)

    def in_time(self, case: str) -> bool:
        """Whether there is time left; says so where there is none."""
        if self.left <= 0:
            self.row(case=case, implementation="fastattn", status="not run", note="time")
        return self.left > 0

    def enter(self, case: str, part: str = "", implementation: str = "fastattn") -> bool:
        """Say what is run next, so that it is known what a process ended at; whether none has before."""
        key = f"{case}: {part}" if part else case
        if key in self.lost:
            return False
        where = {"key": key, "step": self.step, "case": case, "implementation": implementation}
        print(f"@case {json.dumps(where)}", flush=True)
        return True

    def check(self, case: str, run: Callable[[], float | None], **columns: Any) -> None:
        """Run a case of our own and report how it went.

        Args:
            case: its name.
            run: raises AssertionError for a wrong result; may return the error as a share of its budget.
            columns: of the row.
        """
        if not self.begin(case):
            return
        ours: dict[str, Any] = {"case": case, "implementation": "fastattn", "kernel": self.backend}
        row = ours | columns
        try:
            error = run()
        except Exception as failure:
            status, note = status_of(failure)
            self.row(**row, status=status, note=note)
            reraise_if_lost(failure)
        else:
            self.row(**row, status="ok", error_of_budget=None if error is None else round(error, 3))

    def not_run(self, case: str, why: str) -> None:
        """A case that can't be run here."""
        if case not in self.done:
            self.row(case=case, implementation="fastattn", status="not run", note=why)


# What torch and others say of a problem they are not made for; whatever else a peer ends with is a failure.
REFUSALS: Final = (
    *("No available kernel", "No viable backend", "not supported", "not implemented"),  # torch
    *("only support", "No operator found"),  # flash-attn, xformers
)


def status_of(failure: Exception, peer: bool = False) -> tuple[str, str]:
    """The word for a failure, and its message in one line; what a `peer` is not made for it refuses."""
    note = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    if isinstance(failure, Absent):
        return "absent", str(failure)
    if isinstance(failure, AssertionError):
        return "wrong", note
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory", note
    if peer and any(word in note for word in REFUSALS):
        return "refused", note
    return "failed", note


def reraise_if_lost(failure: Exception) -> None:
    """Raise what leaves the process without a usable GPU: all after it would fail too."""
    lost = ("CUDA error", "HIP error", "illegal memory access", "misaligned address", "unspecified launch")
    if any(word in str(failure) for word in lost):
        raise failure
