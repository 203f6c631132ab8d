"""Options of the attention benchmark, known when this folder is named: `fastattn bench bench/attention`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention")
    group.addoption("--feature-length", type=int, help="features: try it out at this length, adding no rows")
