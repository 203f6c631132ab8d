"""Peak memory of one implementation and pass on a CPU, in a process of its own.

    python -m bench.memory CASE PEER PASS

CASE is JSON of `fastattn.gpu_check.peers.Case`. Prints the bytes by which the process grew at its highest
beyond holding q, k, v and the output's gradient; nothing where the system does not tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.peers import PEERS
from bench.rows import peak_growth
from fastattn.gpu_check.oracle import results
from fastattn.gpu_check.peers import Case, Inputs

ROOT = Path(__file__).resolve().parent.parent


def peak_mb(case: Case, peer: str, whole: str) -> float | None:
    """10^6 bytes, of ``forward`` without a graph or ``both``; None where it failed or can't be known."""
    given = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
    command = [sys.executable, "-m", "bench.memory", json.dumps(given), peer, whole]
    # What is freed goes back to the system, whatever was freed before.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    found = done.stdout.strip()
    return round(int(found) / 1e6, 1) if done.returncode == 0 and found else None


def main() -> None:
    given, peer, whole = sys.argv[1:]
    fields = json.loads(given)
    case = Case(**fields | {"dtype": getattr(torch, fields["dtype"])})
    make, training, device = PEERS[peer].make, whole == "both", torch.device("cpu")
    # What is compiled, and set up once, is not of the call.
    small = Inputs(replace(case, length=min(case.length, 8 * case.count)), device, compiles=True)
    results(make(small, "cpu"), small, training)
    inputs = Inputs(case, device, compiles=True)
    attention = make(inputs, "cpu")
    grown = peak_growth(lambda: results(attention, inputs, training))
    print("" if grown is None else grown)


if __name__ == "__main__":
    main()
