"""Options of the GPT-2 step benchmark, known to pytest when this folder is named among its arguments."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpt2")
    group.addoption("--gpt2-size", default="gpt2", help="as fastattn compare gpt2 --size (default gpt2)")
    group.addoption("--gpt2-context", default="512", help="comma-separated contexts (default 512)")
    group.addoption("--gpt2-dropout", default="0.1", help="comma-separated probabilities (default 0.1)")
    group.addoption("--gpt2-rounds", type=int, default=5, help="timed steps of each, interleaved (default 5)")
    group.addoption(
        "--gpt2-implementations",
        help="of standard,sdpa,compiled,attention,fastattn (default: all; compiled up to 1024 tokens)",
    )
    group.addoption("--gpt2-data", default="shakespeare", help="as fastattn compare gpt2 --data")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, convert in (("context", int), ("dropout", float)):
        if name in metafunc.fixturenames:
            default = {"context": "512", "dropout": "0.1"}[name]
            words = metafunc.config.getoption(f"--gpt2-{name}", default).split(",")
            metafunc.parametrize(name, [convert(word) for word in words], scope="module")
