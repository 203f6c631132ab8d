"""Options of the attention benchmark, known when this folder is named: `fastattn bench bench/attention`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention")
    group.addoption("--all-cases", action="store_true", help="every case, not the short list")
    group.addoption("--length", type=int, help="features: try it out at this length, adding no rows")
    group.addoption("--seconds", type=float, default=4.0, help="timed seconds a case, about (default 4)")
