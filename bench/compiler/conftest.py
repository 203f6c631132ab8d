"""Options of the compiler benchmark, known to pytest when this folder is named among its arguments."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compiler")
    group.addoption("--step-size", default="gpt2", choices=["gpt2", "tiny"], help="124M parameters, or few")
    group.addoption("--step-tokens", default="1024", help="comma-separated lengths (default 1024)")
    group.addoption("--step-dropout", type=float, default=0.1, help="of all of GPT-2's dropouts")
    group.addoption("--step-dtype", default="float32", help="of autocast; float32 for none")
    group.addoption("--step-rounds", type=int, default=5, help="timed steps of each, interleaved (default 5)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tokens" in metafunc.fixturenames:
        words = metafunc.config.getoption("--step-tokens", "1024").split(",")
        metafunc.parametrize("tokens", [int(word) for word in words], scope="module")
