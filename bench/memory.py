"""Peak memory on a CPU, of calls in a process of their own: `python -m bench.memory`, told which on stdin."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch

from bench.peers import PEERS
from fastattn.gpt2.compare.child import peak_bytes, reset_peak
from fastattn.gpu_check.oracle import results
from fastattn.gpu_check.peers import Case, Inputs

ROOT = Path(__file__).resolve().parent.parent
Setup: TypeAlias = Callable[[], Mapping[str, Callable[[], object]]]


def peaks_mb(setup: Setup) -> dict[str, float]:
    """By how many 10^6 bytes a fresh process grows at its highest; nothing where the system does not tell.

    Args:
        setup: called in that process, so that it can be pickled; gives calls by name. Each is run once before
            it is measured: what is compiled, or set up once, is not the call's.
    """
    return _peaks_mb(pickle.dumps(setup))


@cache
def _peaks_mb(setup: bytes) -> dict[str, float]:
    # What is freed goes back to the system, whatever was freed before.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory"],
        input=setup,
        capture_output=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        warnings.warn(f"no peak memory: the process ended with {done.returncode}: {last}", stacklevel=3)
        return {}
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(grown / 1e6, 1) for name, grown in found.items()}


def peak_growth(run: Callable[[], object]) -> int | None:
    """Bytes by which `run` raises this process's resident memory at its highest; None off Linux."""
    cpu = torch.device("cpu")
    if not reset_peak(cpu):
        return None
    before = peak_bytes(cpu)  # what is resident now
    run()
    return peak_bytes(cpu) - before


def attention(case: Case, peer: str, wholes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """One of `PEERS`, ``forward`` without a graph or ``both``."""
    inputs = Inputs(case, torch.device("cpu"), compiles=True)
    function = PEERS[peer].make(inputs, "cpu")
    return {whole: partial(results, function, inputs, whole == "both") for whole in wholes}


def main() -> None:
    """Run what was pickled to stdin; print bytes by name as JSON."""
    setup: Setup = pickle.load(sys.stdin.buffer)
    grown = {}
    for name, call in setup().items():
        call()
        gc.collect()
        grown[name] = peak_growth(call)
    print(json.dumps({name: size for name, size in grown.items() if size is not None}))


if __name__ == "__main__":
    main()
