"""What a child process that trains is made of: its commands, and the memory it measures itself by."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def serve(start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer commands, JSON lines on standard input, on standard output until the input ends.

    Args:
        start: given the child's argument, returns what answers a command. What it or its answer raises is
            answered too: ``{"out of memory": why}`` or ``{"error": why}``.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    with contextlib.suppress(OSError):  # should the machine run out after all, end this process first
        Path("/proc/self/oom_score_adj").write_text("1000")

    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        os._exit(0)  # the parent is gone, even in the middle of a step

    threading.Thread(target=read, daemon=True).start()
    answer_to: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    while True:
        command = commands.get()
        try:
            if answer_to is None:
                answer_to = start(json.loads(sys.argv[1]))
            answer = answer_to(command)
        except Exception as error:
            traceback.print_exc()
            kind = "out of memory" if _is_out_of_memory(error) else "error"
            answer = {kind: f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def limit_device_memory(device: torch.device, most: int | None) -> None:
    """Let torch's allocator take `most` bytes of a GPU; None, or a CPU, has no such limit."""
    if device.type == "cuda" and most:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def reset_peak(device: torch.device) -> bool:
    """Start a new high-water mark; False where the system has none that can be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The high-water mark: what torch allocated on a GPU, else what of this process is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident() -> int:
    """Resident memory of this process, in bytes."""
    try:
        return _status("VmRSS")
    except OSError:
        import resource  # noqa: PLC0415, not on every platform

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def give_back_memory(device: torch.device) -> None:
    """Return what a dropped model leaves in the allocators, so that it is not in the next one's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
