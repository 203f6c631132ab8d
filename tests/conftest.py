"""What holds for every test: threads, seeds, uninitialised memory that is full of NaN, where Triton runs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: without a GPU they run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastattn.gpt2.compare.process import available_bytes
from fastattn.testing import poisoned_memory

# A worker that trains, compiles or starts another process takes up to 2 GB.
BYTES_OF_A_WORKER = 3 << 30


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker for each core and each 3 GB, eight at most; the cores are shared among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, available_bytes() // BYTES_OF_A_WORKER, 8))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, cores // workers))))
    return workers


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
