"""What a machine can do at all, measured in the same run as what is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastattn import _backends
from fastattn.gpu_check.machine import Machine
from fastattn.gpu_check.rows import OK
from fastattn.gpu_check.timing import columns_of, interleaved


def measure(machine: Machine) -> Iterator[dict[str, Any]]:
    """Tidy rows: the most floating-point operations and the most bytes a second.

    On a CPU ``fma``, independent FMAs on all threads and the kernels' instruction set; on a GPU ``matmul``,
    of bfloat16. ``copy`` is of a buffer that no cache holds, read and written.
    """
    if machine.on_cpu:
        if not _backends.unavailable("cpu"):
            isa = _backends.cpu_isa_id()
            samples = [_seconds(lambda: torch.ops.fastattn_cpu.fma_loop(200_000, isa)) for _ in range(60)]
            flops = torch.ops.fastattn_cpu.fma_loop(200_000, isa)
            yield _row("fma", "float32", flops, 0, samples)
        source = torch.zeros(2**28, dtype=torch.uint8)
        target = torch.zeros_like(source)
        samples = [_seconds(lambda: target.copy_(source)) for _ in range(11)]
        yield _row("copy", "uint8", 0, 2 * source.numel(), samples)
        return
    size = 8192
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    source = torch.zeros(2**30, dtype=torch.uint8, device=machine.device)
    target = torch.zeros_like(source)
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    taken = interleaved(machine, {name: _moments(machine, run) for name, run in runs.items()}, 3.0)
    yield _row("matmul", "bfloat16", 2 * size**3, 0, [ms / 1e3 for ms in taken["matmul"][0]])
    yield _row("copy", "uint8", 0, 2 * source.numel(), [ms / 1e3 for ms in taken["copy"][0]])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _moments(machine: Machine, run: Callable[[], object]) -> Callable[[], list[Any]]:
    def timed() -> list[Any]:
        start = machine.mark()
        run()
        return [start, machine.mark()]

    return timed


def _row(name: str, dtype: str, flops: int, moved: int, seconds: list[float]) -> dict[str, Any]:
    """Of the best sample: a ceiling is what was reached once."""
    best = min(seconds)
    rate = {"gflops": round(flops / best / 1e9, 1)} if flops else {"gb_per_s": round(moved / best / 1e9, 2)}
    amount = {"flops": flops} if flops else {"bytes": moved}
    row = {"implementation": name, "pass": "forward", "dtype": dtype, "status": OK}
    return row | columns_of([1e3 * x for x in seconds]) | amount | rate
