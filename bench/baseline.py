"""What each operation does, counted, not timed: the guard against a slow-down that a busy machine would hide.

    python -m bench.baseline            # what is different from bench/baseline.json
    python -m bench.baseline --write    # take what is counted now for the baseline

Per call of `bench.calls`: ``flops`` of forward and backward by torch's counter, ``saved`` bytes for backward
beyond inputs, ``ops`` that go through the dispatcher, and the ``peak`` of bytes allocated, scratch of the C++
kernels included; of attention also the pairs of query and key ``visited``, masked or not. On one thread, by
the cpu backend with its AVX2 kernels. Where valgrind is, also the ``instructions`` of most calls, Python's
included, within 3 %: they are those of one compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import calls
from fastattn import _backends, _build
from fastattn.testing import force_isa

PATH = Path(__file__).resolve().parent / "baseline.json"
ROOT = PATH.parent.parent
SIZE = 192
ISA = "avx2"
TOLERANCE = 0.03
# Instructions take valgrind seconds a call: those whose kernels another of the calls runs are left out.
NOT_COUNTED = (
    *("attention full", "attention dropout", "attention alibi", "attention bias"),
    *("linear", "linear_cross_entropy"),
)
_PROBED = 8  # one position of so many: no tile is smaller
_NOT_OPS = ("autograd::", "torch::autograd::")


@contextmanager
def fixed() -> Iterator[None]:
    """One thread, AVX2, our matrix product, and no memory filled for a test: what counts would depend on."""
    threads, asked = torch.get_num_threads(), os.environ.get("FASTATTN_GEMM")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    os.environ["FASTATTN_GEMM"] = "ours"
    try:
        with force_isa(ISA):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warned_only)
        if asked is None:
            del os.environ["FASTATTN_GEMM"]
        else:
            os.environ["FASTATTN_GEMM"] = asked


def count(name: str) -> dict[str, int]:
    """flops, saved, ops, peak and visited of one call, forward and backward, the second of its kind."""
    call = calls.make(name, SIZE)
    call.both()
    with FlopCounterMode(display=False) as counter:
        call.both()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call.both()
    ops, held, peak = 0, 0, 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif "::" in event.name() and not event.name().startswith(_NOT_OPS):
            ops += 1
    found = {"flops": counter.get_total_flops(), "saved": _saved(call), "ops": ops, "peak": peak}
    return found | ({"visited": visited(call)} if name.startswith("attention") else {})


def _saved(call: calls.Call) -> int:
    """Bytes of the storages that the graph holds for backward, inputs' own left out."""
    found: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)  # so that no two storages have one address
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        call.function(*call.leaves)
    inputs = {x.untyped_storage().data_ptr() for x in call.leaves}
    return sum(size for address, size in found.items() if address not in inputs)


def visited(call: calls.Call) -> int:
    """Pairs of a query and a key that attention's kernels compute with, by their mark: 0 · NaN is NaN.

    A NaN in a row of v reaches the output of each query that met its key, hidden by the mask or not; one in k
    so the queries' gradient, and one in the output's gradient that of v. Tiles that are skipped show none.

    Args:
        call: whose leaves begin with q, k and v.
    """
    q, k, v, *others = (x.detach() for x in call.leaves)
    kv_heads, probes = k.shape[1], range(_PROBED - 1, k.shape[2], _PROBED)

    def rows(x: Tensor) -> int:
        return int(x.isnan().any(-1).sum())

    total = 0
    for first in range(0, len(probes), kv_heads):

        def marked(x: Tensor, positions: Sequence[int] = probes[first : first + kv_heads]) -> Tensor:
            """A copy with a NaN at a position of its own for each head of keys."""
            x = x.clone()
            size = x.shape[1] // kv_heads
            for head, at in enumerate(positions):
                x[:, size * head : size * (head + 1), at] = float("nan")
            return x

        with torch.no_grad():
            total += rows(call.function(q, k, marked(v), *others))
        dout = torch.ones(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for key, reaching, wanted in ((marked(k), dout, 0), (k, marked(dout), 2)):
            leaves = [x.clone().requires_grad_() for x in (q, key, v)]
            out = call.function(*leaves, *others)
            total += rows(torch.autograd.grad(out, leaves[wanted], reaching)[0])
    return total


_CLIENT = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
# All are warm before any is counted, the interpreter too: to start counting makes valgrind translate the
# whole program again.
_COUNTED = """
import ctypes, gc, sys
import torch
from bench import calls
from bench.baseline import SIZE
torch.set_num_threads(1)
client = ctypes.CDLL(sys.argv[1])
made = {name: calls.make(name, SIZE) for name in sys.argv[2:]}
for call in 4 * list(made.values()):
    call.both()
gc.disable()
client.start()
for name, call in made.items():
    client.zero()
    call.both()
    client.dump(name.encode())
"""


def missing_for_instructions() -> str:
    """Why instructions can't be counted here; empty where they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if shutil.which("cc") is None or not Path("/usr/include/valgrind/callgrind.h").exists():
        return "valgrind's header, or a C compiler, is not installed"
    if _backends.unavailable("cpu"):
        return "the compiled kernels are not here"
    return ""


def instructions(names: Sequence[str]) -> dict[str, int]:
    """Of one call each, forward and backward, the fifth of its kind, in a process under valgrind."""
    with tempfile.TemporaryDirectory() as folder:
        source, client = Path(folder) / "client.c", Path(folder) / "client.so"
        source.write_text(_CLIENT)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", client, source], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-c", _COUNTED, str(client), *names]
        environment = os.environ | {
            "FASTATTN_ISA": ISA,
            "FASTATTN_GEMM": "ours",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind: {done.stderr[-2000:]}")
        found = {}
        for path in Path(folder).glob("out*"):
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if name is not None and total is not None:
                found[name[1]] = int(total[1])
        return found


def differences(want: Mapping[str, int], got: Mapping[str, int], less_too: bool = False) -> list[str]:
    """What of a call is more than was kept; FLOPs, which are the mathematics', what is not the same.

    Args:
        want: what is kept of the call.
        got: what was counted; instructions may be more within the tolerance.
        less_too: tell what is less, too.
    """
    found = []
    for key, value in got.items():
        kept = want.get(key)
        if kept is not None:
            near = TOLERANCE * kept if key == "instructions" else 0
            if value - kept <= near and (kept - value <= near or not (less_too or key == "flops")):
                continue
        change = f" ({value / kept - 1:+.1%})" if kept else ""
        found.append(f"{key}: expected {kept}, got {value}{change}")
    return found


def versions() -> dict[str, str]:
    """What the counts depend on: ops on torch, instructions on the compiler too."""
    return {
        "torch": ".".join(str(torch.__version__).split(".")[:2]),
        "compiler": _build.find_compiler().version,
        "python": platform.python_version(),
    }


def instructions_not_comparable() -> str:
    """Why instructions can't be held to the baseline here; empty where they can."""
    kept, here = json.loads(PATH.read_text()), versions()
    other = [f"{key} {kept[key]}, not {here[key]}" for key in here if here[key] != kept[key]]
    return missing_for_instructions() or (f"the baseline is of {', '.join(other)}" if other else "")


def measure() -> dict[str, Any]:
    """All there is to count of all calls."""
    with fixed():
        found = {name: count(name) for name in calls.here()}
    if not missing_for_instructions():
        for name, number in instructions([x for x in calls.here() if x not in NOT_COUNTED]).items():
            found[name]["instructions"] = number
    return {"size": SIZE, **versions(), "calls": found}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.baseline", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="take what is counted now for the baseline")
    write, found = parser.parse_args().write, measure()
    if write:
        PATH.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    kept = json.loads(PATH.read_text())["calls"]
    lines = [
        f"{name}: {x}"
        for name, got in found["calls"].items()
        for x in differences(kept.get(name, {}), got, less_too=True)
    ]
    print("\n".join(lines) or "as in the baseline")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
