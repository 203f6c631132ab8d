"""A copy of the package with stand-in kernels that compile in seconds, and fresh processes that import it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastattn import _build

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = """
#include <torch/csrc/stable/library.h>
int64_t isa_present() {
  return 0b1011;  // scalar, avx2, wide
}
STABLE_TORCH_LIBRARY(fastattn_cpu, m) { m.def("isa_present() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_present", TORCH_BOX(&isa_present));
}
"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def write_kernels(csrc: Path) -> None:
    for source in _build.SOURCES:
        path = csrc / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("// nothing\n")
    (csrc / "library.cpp").write_text(LIBRARY)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree: the package without a library, beside stand-in kernels. Its path has a space."""
    tree = tmp_path / "a tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastattn", tree / "fastattn", ignore=ignore)
    write_kernels(tree / "csrc")
    return tree


@pytest.fixture(scope="session")
def compiler() -> _build.Compiler:
    """A C++20 compiler; the test is skipped where there is none."""
    try:
        return _build.find_compiler()
    except _build.ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library(compiler: _build.Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the stand-in kernels, built once."""
    folder = tmp_path_factory.mktemp("library")
    write_kernels(folder / "csrc")
    _build.build(folder / "csrc", _build.find_torch(), folder / _build.LIBRARY_NAME)
    return folder / _build.LIBRARY_NAME


@pytest.fixture
def installed(tree: Path, library: Path) -> Path:
    """`library` in its place in `tree`, as an editable install puts it."""
    return shutil.copy(library, tree / "fastattn")


@pytest.fixture
def environment(tree: Path, tmp_path: Path) -> dict[str, str]:
    """Variables under which a fresh process imports `tree`, with an empty cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    return kept | {"PYTHONPATH": str(tree), "FASTATTN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def python(environment: Mapping[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh process, outside the repository, with `environment` and the variables given."""

    def run(*arguments: str, **variables: str) -> Any:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**environment, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
