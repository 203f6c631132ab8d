"""Peak memory of one implementation on a CPU, in a process of its own.

    python -m bench.memory CASE PEER PASSES

CASE is JSON of `fastattn.gpu_check.peers.Case`. Prints, for each pass, the bytes by which the process grew at
its highest beyond holding q, k, v and the output's gradient; nothing where the system does not tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch

from bench.peers import PEERS
from bench.rows import peak_growth
from fastattn.gpu_check.oracle import results
from fastattn.gpu_check.peers import Case, Inputs

ROOT = Path(__file__).resolve().parent.parent


@cache
def peaks_mb(case: Case, peer: str, wholes: tuple[str, ...]) -> dict[str, float]:
    """10^6 bytes of each of ``forward`` without a graph and ``both``; those that can be known."""
    given = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
    command = [sys.executable, "-m", "bench.memory", json.dumps(given), peer, ",".join(wholes)]
    # What is freed goes back to the system, whatever was freed before.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    found = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: round(int(line[1]) / 1e6, 1) for line in found if len(line) == 2 and line[0] in wholes}


def main() -> None:
    given, peer, wholes = sys.argv[1:]
    fields = json.loads(given)
    case = Case(**fields | {"dtype": getattr(torch, fields["dtype"])})
    make, device = PEERS[peer].make, torch.device("cpu")
    inputs = Inputs(case, device, compiles=True)
    attention = make(inputs, "cpu")
    for whole in wholes.split(","):
        run = partial(results, attention, inputs, whole == "both")
        run()  # what is compiled, or set up once, is not of the call
        grown = peak_growth(run)
        if grown is not None:
            print(whole, grown, flush=True)


if __name__ == "__main__":
    main()
