"""Which backends are here, and if not, the reasons. The only file that asks the hardware."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

# Best first: the order in which `attention` looks for one that can run.
NAMES = ("cpu", "reference")
# The C++ kernels' instruction sets and their ids in csrc/common/isa.h, slowest first.
ISAS = ("scalar", "avx2", "avx512", "wide")


@cache
def _load() -> list[str]:
    path = os.environ.get("FASTATTN_LIBRARY", str(Path(__file__).with_name("_C.abi3.so")))
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return [str(error)]
    return []


@torch.compiler.assume_constant_result
def unavailable(backend: str) -> list[str]:
    """Why `backend` is not here; empty where it is."""
    return _load() if backend == "cpu" else []


def require(backend: str) -> None:
    """Raise RuntimeError where `backend` is not here."""
    reasons = unavailable(backend)
    if reasons:
        raise RuntimeError("; ".join(reasons))


def cpu_isa() -> str:
    """Name of the instruction set the C++ kernels run on."""
    return ISAS[cpu_isa_id()]


@cache
def cpu_isa_id() -> int:
    """Its id in csrc/common/isa.h."""
    return ISAS.index(os.environ.get("FASTATTN_ISA", "avx512"))
