"""What a machine can do at all, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastattn import _backends
from fastattn.gpu_check.rows import OK
from fastattn.gpu_check.timing import columns_of, interleaved
from fastattn.machine import Machine

# Bytes of the buffers that are copied; the fastest counts, as none is always.
COPIES = {"cpu": (2**25, 2**26, 2**27, 2**28), "cuda": (2**28, 2**30)}


def measure(machine: Machine) -> Iterator[dict[str, Any]]:
    """Tidy rows: the most floating-point operations and the most bytes a second.

    On a CPU ``fma``, independent FMAs on all threads and the kernels' instruction set, of float32; on a GPU
    ``matmul``, of bfloat16. ``copy``, read and written, is of the size that is fastest.
    """
    if not machine.on_cpu:
        size = 8192
        a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
        yield _row("matmul", "bfloat16", 2 * size**3, 0, _seconds(machine, {"": lambda: a @ b})[""])
    elif not _backends.unavailable("cpu"):
        isa = _backends.cpu_isa_id()
        flops = int(torch.ops.fastattn_cpu.fma_loop(200_000, isa))
        run = partial(torch.ops.fastattn_cpu.fma_loop, 200_000, isa)
        yield _row("fma", "float32", flops, 0, _seconds(machine, {"": run})[""])
    copies = {}
    for size in COPIES[machine.device.type]:
        source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
        copies[size] = partial(torch.empty_like(source).copy_, source)
    rows = [_row("copy", "uint8", 0, 2 * size, taken) for size, taken in _seconds(machine, copies).items()]
    yield max(rows, key=lambda row: row["gb_per_s"])


def _seconds(machine: Machine, runs: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
    timed = {name: _moments(machine, run) for name, run in runs.items()}
    return {name: [ms / 1e3 for ms in parts[0]] for name, parts in interleaved(machine, timed, 1.5).items()}


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
