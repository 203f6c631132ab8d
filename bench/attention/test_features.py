"""Features against the best that torch has for each; time against density.

`make bench ARGS=bench/attention/test_features.py` takes the short list, `--all-cases` every feature. A run
adds a row an implementation to bench/results/attention_features.csv, and a row a density to
attention_density.csv; with `--feature-length`, which is for trying it out, it adds none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.attention.features import DIM, HEADS, RACES, SHORT, SWEEPS, Attention, Race
from bench.rows import Clock, append, percentiles, where
from fastattn import _backends
from fastattn.gpu_check.machine import Machine, kernels_of
from fastattn.testing import assert_within_budget, attention_errors

CLOCK = Clock()
CHECKED_AT = 384
LENGTH, DENSITY_LENGTH, DENSITY_HEADS = 4096, 16384, 4


def timed(function: Attention, leaves: Sequence[Tensor], dout: Tensor) -> Callable[[], float]:
    """A call that runs forward and backward once and returns the seconds they took."""

    def run() -> float:
        for x in leaves:
            x.grad = None
        start = time.perf_counter()
        function(*leaves).backward(dout)
        return time.perf_counter() - start

    return run


def interleaved(runs: dict[Any, Callable[[], float]], seconds: float) -> dict[Any, list[float]]:
    """Samples of all in alternation, after one each that is left out."""
    warm = [run() for run in runs.values()]
    rounds = max(5, min(200, int(seconds / sum(warm))))
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    return samples


def check(race: Race) -> None:
    """Refuse to time a wrong result: ours against float64, the others against ours, gradients too."""
    q, k, v, *bias = race.leaves
    options = race.options | ({"bias": bias[0]} if bias else {})
    assert_within_budget(attention_errors(q, k, v, backend="cpu", **options))
    dout = torch.randn(1, HEADS, q.shape[2], DIM, generator=torch.Generator().manual_seed(3))

    def results(function: Attention) -> list[Tensor]:
        out = function(*race.leaves)
        return [out, *torch.autograd.grad(out, race.leaves, dout)]

    want = results(race.ours)
    for name, function in race.peers.items():
        for a, b in zip(results(function), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def row_of(seconds: Sequence[float], name: str) -> dict[str, Any]:
    p20, p50, p80 = (1e3 * x for x in percentiles(seconds))
    ours = name.startswith("fastattn")
    return {
        "isa": _backends.cpu_isa() if ours else torch.backends.cpu.get_cpu_capability().lower(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "implementation": name,
        "rounds": len(seconds),
        "p20_ms": round(p20, 3),
        "p50_ms": round(p50, 3),
        "p80_ms": round(p80, 3),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases", False)
    if "feature" in metafunc.fixturenames:
        metafunc.parametrize("feature", list(RACES) if everything else SHORT)
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", list(SWEEPS) if everything else ["window"])


@pytest.fixture
def length(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.config.getoption("--feature-length", None)
    return found


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    found: float = request.config.getoption("--seconds", 4.0)
    return found


@pytest.mark.benchmark(timer=CLOCK)
def test_features(benchmark: Any, feature: str, length: int | None, seconds: float) -> None:
    """Forward and backward, float32, batch 1, causal unless the feature says otherwise."""
    small = RACES[feature](CHECKED_AT)
    check(small)
    torch.compiler.reset()
    race = RACES[feature](length or LENGTH)
    functions = {"fastattn": race.ours, **race.peers, **race.baselines}
    q = race.leaves[0]
    dout = torch.randn(1, HEADS, q.shape[2], DIM, generator=torch.Generator().manual_seed(3))
    samples = interleaved({name: timed(f, race.leaves, dout) for name, f in functions.items()}, seconds)
    ours, machine = percentiles(samples["fastattn"])[1], Machine(dry_run=False, device="cpu")
    for name, taken in samples.items():
        kernel = kernels_of(machine, lambda f=functions[name]: f(*race.leaves).backward(dout))
        row = where() | {
            "feature": feature,
            "dtype": "float32",
            "heads": HEADS,
            "kv_heads": race.leaves[1].shape[1],
            "length": q.shape[2],
            "head_dim": DIM,
            "kernel": kernel,
            **row_of(taken, name),
            "speedup": round(percentiles(taken)[1] / ours, 2),
        }
        if length is None:
            append("attention_features.csv", row)
        benchmark.extra_info[name] = row
    benchmark.group = feature
    CLOCK.replay(benchmark, samples["fastattn"])


@pytest.mark.benchmark(timer=CLOCK)
def test_density(benchmark: Any, kind: str, length: int | None, seconds: float) -> None:
    """Forward and backward by the share of pairs kept: how much of the ideal saving is saved."""
    size = length or DENSITY_LENGTH
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, DENSITY_HEADS, size, DIM, generator=g) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    masks = SWEEPS[kind](size)
    for mask in SWEEPS[kind](CHECKED_AT).values():
        some = (x.detach()[:, :2, :CHECKED_AT] for x in leaves)
        assert_within_budget(attention_errors(*some, mask=mask, backend="cpu"))

    def ours(mask: fastattn.Mask) -> Attention:
        return lambda q, k, v: fastattn.attention(q, k, v, mask=mask, backend="cpu")

    samples = interleaved({share: timed(ours(mask), leaves, dout) for share, mask in masks.items()}, seconds)
    medians = {share: percentiles(x)[1] for share, x in samples.items()}
    whole = medians[1.0]
    for share, taken in samples.items():
        row = where() | {
            "kind": kind,
            "dtype": "float32",
            "heads": DENSITY_HEADS,
            "length": size,
            "head_dim": DIM,
            "density": round(share, 4),
            **row_of(taken, "fastattn"),
            "share_of_saving": round((whole - medians[share]) / (whole * (1 - share)), 3)
            if share < 1
            else "",
            "cost_of_pair": round(medians[share] / (whole * share), 3),
        }
        if length is None:
            append("attention_density.csv", row)
        benchmark.extra_info[f"{share:.4f}"] = row
    benchmark.group = kind
    CLOCK.replay(benchmark, samples[min(samples)])
