"""Attention against torch's: each case's implementations alternate in one run, after their results agree.

`make bench ARGS=bench/attention` takes the short list, `ARGS="bench/attention --all-cases"` every case. Each
run adds a row an implementation to bench/results/attention.csv and attention_memory.csv.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.attention.cases import CASES, IMPLEMENTATIONS, Case, sdpa_kernel
from bench.rows import Clock, append, percentiles, where
from fastattn import _backends
from fastattn.testing import assert_within_budget, attention_errors

CLOCK = Clock()


@pytest.fixture(scope="module")
def fma_peak() -> float:
    """GFLOP/s of independent FMAs on all threads and the kernels' instruction set: best of many windows."""
    isa, best = _backends.cpu_isa_id(), 0.0
    for _ in range(60):
        start = time.perf_counter()
        flops = torch.ops.fastattn_cpu.fma_loop(200_000, isa)
        best = max(best, flops / (time.perf_counter() - start) / 1e9)
    return best


def isa_of(name: str) -> str:
    return _backends.cpu_isa() if name == "fastattn" else torch.backends.cpu.get_cpu_capability().lower()


def check(case: Case) -> None:
    """Refuse to time a wrong result: ours against float64 on the case's mask, dtype and head sizes.

    And, where nothing is random, the peers' against ours.
    """
    small = replace(case, length=300, heads=2)
    q, k, v, _, mask = small.tensors()
    keep = fastattn.causal() if case.mask == "causal" else mask
    if case.dropout == 0:
        tolerance = max(4 * torch.finfo(case.dtype).eps, 1e-5)
        want = IMPLEMENTATIONS["fastattn"](q, k, v, small, mask)
        for name in case.peers:
            found = IMPLEMENTATIONS[name](q, k, v, small, mask)
            torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)
    assert_within_budget(attention_errors(q, k, v, mask=keep, dropout=case.dropout, seed=1, backend="cpu"))


def timed(case: Case, name: str) -> Callable[[], float]:
    """A call that runs the case's passes once and returns the seconds they took."""
    function = IMPLEMENTATIONS[name]
    q, k, v, dout, mask = case.tensors()

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            function(q, k, v, case, mask)
        return time.perf_counter() - start

    def with_backward() -> float:
        q.grad = k.grad = v.grad = None
        start = time.perf_counter()
        out: Tensor = function(q, k, v, case, mask)
        if case.passes == "backward":
            start = time.perf_counter()
        out.backward(dout)
        return time.perf_counter() - start

    return forward if case.passes == "forward" else with_backward


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases", False)
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", [4096, 16384] if everything else [4096])
    else:
        metafunc.parametrize("case", [c for c in CASES if everything or c.short], ids=str)


@pytest.mark.benchmark(timer=CLOCK)
def test_attention(benchmark: Any, case: Case, fma_peak: float, request: pytest.FixtureRequest) -> None:
    check(case)
    runs = {name: timed(case, name) for name in ("fastattn", *case.peers)}
    warm = [run() for run in runs.values()]
    rounds = max(5, min(200, int(request.config.getoption("--seconds", 4.0) / sum(warm))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())

    threads = torch.get_num_threads()
    for name, seconds in samples.items():
        p20, p50, p80 = (1e3 * x for x in percentiles(seconds))
        kernel = sdpa_kernel(case) if name == "sdpa" else "eager" if name == "naive" else "cpu"
        row = where() | {
            "isa": isa_of(name),
            "threads": threads,
            "torch": torch.__version__,
            "fastattn": fastattn.__version__,
            "passes": case.passes,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mask": case.mask,
            "heads": case.heads,
            "length": case.length,
            "head_dim": case.dim,
            "v_dim": case.v_dim,
            "dropout": case.dropout,
            "implementation": name,
            "kernel": kernel,
            "rounds": rounds,
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
            "gflops": round(case.flops / p50 / 1e6, 1),
            "fma_share": round(case.flops / p50 / 1e6 / fma_peak, 3) if name == "fastattn" else "",
        }
        append("attention.csv", row)
        benchmark.extra_info[name] = row
    medians = {name: percentiles(x)[1] for name, x in samples.items()}
    benchmark.extra_info["speedup"] = {
        name: round(x / medians["fastattn"], 2) for name, x in medians.items() if name != "fastattn"
    }
    benchmark.group = str(case)
    CLOCK.replay(benchmark, samples["fastattn"])


IN_A_FRESH_PROCESS = """
import sys, time
from bench.attention.cases import IMPLEMENTATIONS, Case
from bench.rows import peak_growth
name, length = sys.argv[1], int(sys.argv[2])
def step(case):
    q, k, v, dout, mask = case.tensors()
    return lambda: IMPLEMENTATIONS[name](q, k, v, case, mask).backward(dout)
step(Case("both", 64))()
run = step(Case("both", length))
start = time.perf_counter()
print(peak_growth(run), time.perf_counter() - start)
"""


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", ["fastattn", "sdpa"])
def test_memory(benchmark: Any, name: str, length: int) -> None:
    """Memory of forward and backward above what holds q, k, v and dout (float32, causal, H 12, D 64)."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, name, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()
    if peak == "None":
        pytest.skip("read from /proc, which is Linux's")
    row = where() | {
        "isa": isa_of(name),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "length": length,
        "implementation": name,
        "kernel": sdpa_kernel(Case("both", 64)) if name == "sdpa" else "cpu",
        "peak_mb": round(int(peak) / 1e6, 1),
        "q_mb": round(12 * length * 64 * 4 / 1e6, 1),
    }
    append("attention_memory.csv", row)
    benchmark.extra_info.update(row)
    CLOCK.replay(benchmark, [float(seconds)])
