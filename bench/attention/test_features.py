"""Features against the best that torch has for each; time against density.

`fastattn bench --op attention` takes two features at length 2,048, `--all-cases` every feature at 4,096 and
how time goes with what is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.attention.features import CASES, DENSITIES
from bench.contest import CLOCK, Problem

SHORT = [replace(case, length=2048) for case in CASES[:2]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [*CASES, *DENSITIES] if metafunc.config.getoption("--all-cases", False) else SHORT
    metafunc.parametrize("case", cases, ids=str)


@pytest.mark.benchmark(timer=CLOCK)
def test_features(case: Problem, compete: Callable[[Problem], None]) -> None:
    """Forward and backward, float32, batch 1."""
    compete(case)
