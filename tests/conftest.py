"""What holds for every test: the threads, the seeds, and uninitialised memory that is full of NaN."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """At most four threads: a large machine tests what a small one does. OMP_NUM_THREADS goes first."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in a test whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch allocates uninitialised with NaN (integers: their largest value), in kernels too."""
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filled
    torch.set_deterministic_debug_mode(mode)
