"""The wheels: one with the library for this platform, or a pure one; both with types and kernel sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastattn import _build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler")]

FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def project(tree: Path, root: Path) -> Path:
    """`tree` with what a wheel is built from, and a module of an older build lying about."""
    for name in FILES:
        shutil.copy(root / name, tree / name)
    stale = tree / "build/lib/fastattn/removed.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return tree


def wheel(project: Path, environment: Mapping[str, str], **variables: str) -> tuple[Path, str]:
    """Build one without isolation (nothing is downloaded); its path and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "dist", "."],
        env={**environment, **variables},
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (project / "dist").glob("*.whl")
    return path, done.stdout + done.stderr


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_with_kernels(project: Path, environment: dict[str, str], tmp_path: Path) -> None:
    path, _ = wheel(project, environment)
    python, abi, platform = path.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    inside = names(path)
    assert {"fastattn/_C.abi3.so", "fastattn/py.typed", "fastattn/csrc/library.cpp"} <= inside
    assert "fastattn/ops/attention/triton/tuning.csv" in inside
    assert not [name for name in inside if "removed" in name or name.startswith(("tests", "bench", "csrc"))]

    site = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    code = "from fastattn import _backends as b; print(b.library().path); print(b.library().origin)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(site), "FASTATTN_JIT": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == [str(site / "fastattn/_C.abi3.so"), "installed with the package"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FASTATTN_SKIP_BUILD": "1"}, "FASTATTN_SKIP_BUILD=1"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler not found"),
        ({"FASTATTN_TORCH_DIR": "/nonexistent"}, "/nonexistent has no torch headers"),
        ({"FASTATTN_CXXFLAGS": "-fno-such-flag"}, "-fno-such-flag"),
    ],
    ids=["skipped", "no-compiler", "no-torch", "compile-error"],
)
def test_pure_wheel(
    project: Path, environment: dict[str, str], tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    path, said = wheel(project, environment, **variables)
    assert path.name == "fastattn-0.1.0-py3-none-any.whl"
    assert reason in said
    inside = names(path)
    assert {"fastattn/py.typed", "fastattn/csrc/library.cpp"} <= inside
    assert not [name for name in inside if name.endswith(".so")]
    if "FASTATTN_SKIP_BUILD" not in variables:
        return

    # Installed, it builds the library from its own sources at first use.
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    code = "import json; from fastattn import _backends as b; print(json.dumps(b.library().origin))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == "built on first use"


def test_version_is_the_packages(root: Path) -> None:
    import fastattn

    assert f'\nversion = "{fastattn.__version__}"\n' in (root / "pyproject.toml").read_text()
    assert f"## [{fastattn.__version__}]" in (root / "CHANGELOG.md").read_text()


def test_oldest_torch_is_said_once(root: Path) -> None:
    wanted = ".".join(map(str, _build.MIN_TORCH))
    assert f'"torch>={wanted}"' in (root / "pyproject.toml").read_text()
    major, minor = _build.MIN_TORCH
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in _build.FLAGS
