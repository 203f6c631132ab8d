"""Options of the attention benchmark, known when this folder is named: `fastattn bench bench/attention`."""

from __future__ import annotations

import pytest

# The benchmarks whose tensors are on a GPU; all others measure the CPU, on any machine.
ON_A_GPU = "test_gpu.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention")
    group.addoption("--all-cases", action="store_true", help="every case, not the short list")
    group.addoption("--device", choices=("cpu", "cuda"), help="only the benchmarks of this device")
    group.addoption("--length", type=int, help="features: try it out at this length, adding no rows")
    group.addoption("--seconds", type=float, default=4.0, help="timed seconds a case, about (default 4)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device", None)
    if device is None:
        return
    wanted = [item for item in items if (item.path.name == ON_A_GPU) == (device == "cuda")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
