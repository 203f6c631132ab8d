"""What operations do is what bench/baseline.json keeps: FLOPs, bytes, calls, allocations, instructions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import fastattn
from bench import baseline, calls
from fastattn.testing import present_isas

KEPT: dict[str, Any] = json.loads(baseline.PATH.read_text())
RENEW = "if that is meant: python -m bench.baseline --write"
needs_avx2 = pytest.mark.skipif(
    baseline.ISA not in present_isas(), reason="the baseline is of the AVX2 kernels, which are not here"
)


def test_every_call_is_kept() -> None:
    assert calls.here() == list(KEPT["calls"]), RENEW


@needs_avx2
@pytest.mark.parametrize("name", KEPT["calls"])
def test_counts(name: str) -> None:
    with baseline.fixed():
        found = baseline.count(name)
    if baseline.versions()["torch"] != KEPT["torch"]:  # how torch gets to our ops is its own affair
        found.pop("ops")
    wrong = baseline.differences(KEPT["calls"][name], found)
    assert not wrong, f"{'; '.join(wrong)}: {RENEW}"


@needs_avx2
@pytest.mark.slow
def test_instructions() -> None:
    reason = baseline.instructions_not_comparable()
    if reason:
        pytest.skip(reason)
    names = [name for name, counts in KEPT["calls"].items() if "instructions" in counts]
    found = baseline.instructions(names)
    assert sorted(found) == sorted(names)
    wrong = [
        f"{name}: {x}"
        for name, number in found.items()
        for x in baseline.differences(KEPT["calls"][name], {"instructions": number})
    ]
    assert not wrong, f"{'; '.join(wrong)}: {RENEW}"


@needs_avx2
def test_skipped_tiles_are_not_visited() -> None:
    """FLOPs by formula are those of all pairs; what is visited tells whether masked tiles are skipped."""
    size = 256
    hidden = torch.full((1, 1, size, size), -torch.inf).triu(1)
    with baseline.fixed():
        full, causal, biased = (
            baseline.visited(calls.attention(size, **options))
            for options in ({}, {"mask": fastattn.causal()}, {"bias": hidden})
        )
    # queries times a key of eight, three times: forward, and backward for queries and for keys
    assert full == 3 * size * size // 8
    assert 0.5 * full < causal < 0.7 * full
    assert biased == full  # the same attention as causal, by a bias, of which no tile is skipped


def test_differences() -> None:
    kept = {"flops": 100, "ops": 7, "instructions": 1000}
    assert baseline.differences(kept, {"flops": 100, "ops": 7, "instructions": 1029}) == []
    assert baseline.differences(kept, {"ops": 8, "instructions": 1031}) == [
        "ops: expected 7, got 8 (+14.3%)",
        "instructions: expected 1000, got 1031 (+3.1%)",
    ]
    assert baseline.differences(kept, {"flops": 99, "ops": 6, "instructions": 900}) == [
        "flops: expected 100, got 99 (-1.0%)"
    ]
    assert len(baseline.differences(kept, {"ops": 6, "instructions": 900}, less_too=True)) == 2
    assert baseline.differences({}, {"peak": 5}) == ["peak: expected None, got 5"]
