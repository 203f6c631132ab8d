"""What holds for every test: the threads, the seeds, and uninitialised memory that is full of NaN."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from fastattn.testing import poisoned_memory


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
def poison() -> Iterator[None]:
    """What torch allocates uninitialised is NaN (integers: their largest value), the kernels' outputs too."""
    with poisoned_memory():
        yield
