"""The fused operations' Triton kernels as compilers leave them: no spills, products by tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn.testing.compiled import Kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FOLDER = Path(__file__).parent
# Scripts, how many kinds of launches each has, and how many programs fit on a multiprocessor at least.
SCRIPTS = [(FOLDER / "fused_kernels.py", 16, 1), (FOLDER.parent / "cross_entropy/compile_kernels.py", 5, 2)]
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kinds", "programs"), SCRIPTS, ids=["fused", "cross_entropy"])
def test_compiles_well(script: Path, kinds: int, programs: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *TARGETS],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [Kernel(**kernel) for kernel in json.loads(done.stdout)]
    assert len(found) == len(TARGETS) * kinds
    for kernel in found:
        assert kernel.spills == kernel.stack == 0, kernel
        assert kernel.programs is None or kernel.programs >= programs, kernel
        assert "gemm" not in kernel.name or kernel.count(TENSOR_CORES[kernel.target]), kernel
