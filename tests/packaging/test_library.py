"""Where the library comes from at first use: installed, built, or not at all; and never a stale one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fastattn import _build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler")]

Python = Callable[..., subprocess.CompletedProcess[str]]

ORIGIN = """
import json
from fastattn import _backends
library = _backends.library()
print(json.dumps([str(library.path), library.origin, library.notes, list(_backends.isas_present())]))
"""
MISSING = """
import json, warnings
import torch, fastattn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = torch.randn(1, 1, 3, 4)
    for _ in range(3):
        fastattn.attention(q, q, q)
    found = fastattn.explain(q, q, q)
ours = [str(w.message) for w in caught if "fastattn" in str(w.message)]
print(json.dumps([found.backend, found.reasons, ours]))
"""
BUILDING = "building the CPU kernels"


def test_two_processes_race_on_an_empty_cache(environment: Mapping[str, str], tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", ORIGIN],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], said
    results = [json.loads(out) for out, _ in said]
    assert results[0] == results[1]
    path, origin, _, present = results[0]
    assert origin == "built on first use"
    assert Path(path).is_relative_to(environment["FASTATTN_CACHE"])
    assert present == ["scalar", "avx2", "wide"]
    assert sum(err.count(BUILDING) for _, err in said) == 1
    assert len(list(Path(environment["FASTATTN_CACHE"]).rglob("*.so*"))) == 1


def test_second_use_and_leftovers(python: Python, tree: Path, environment: Mapping[str, str]) -> None:
    code = """
import threading
from fastattn import _backends
threads = [threading.Thread(target=_backends.library) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(_backends.library().path)
"""
    first = python("-c", code)
    assert first.stderr.count(BUILDING) == 1
    library = Path(first.stdout.strip())
    second = python("-c", code)
    assert (second.stdout, second.stderr) == (first.stdout, "")

    # A build that was killed leaves its lock and a part of the library.
    library.unlink()
    (library.parent / "lock").write_text("")
    (library.parent / f".{library.name}.123").write_text("half a libr")
    third = python("-c", code)
    assert third.stdout == first.stdout
    assert third.stderr.count(BUILDING) == 1


def test_cache_key(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    def key(torch_release: str = "2.13.0") -> str:
        return _build.cache_key(tree / "csrc", Path("/torch"), torch_release)

    keys = [key(), key("2.12.0")]
    monkeypatch.setenv("FASTATTN_CXXFLAGS", "-g")
    keys.append(key())
    monkeypatch.setenv("CXX", "g++ -m64")
    keys.append(key())
    (tree / "csrc/library.cpp").write_text("")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_no_library_and_no_jit_warns_once(python: Python) -> None:
    backend, reasons, warned = json.loads(python("-c", MISSING, FASTATTN_JIT="0").stdout)
    assert backend == "reference"
    assert any("FASTATTN_JIT=0" in reason for reason in reasons["cpu"])
    assert len(warned) == 1
    assert "python -m fastattn env" in warned[0]


def test_no_compiler(python: Python) -> None:
    backend, reasons, warned = json.loads(python("-c", MISSING, CXX="no-such-compiler").stdout)
    assert backend == "reference"
    assert any("no-such-compiler not found" in reason for reason in reasons["cpu"])
    assert len(warned) == 1
    assert "Install g++" in warned[0]


def test_unwritable_cache(python: Python) -> None:
    backend, reasons, _ = json.loads(python("-c", MISSING, FASTATTN_CACHE="/dev/null/cache").stdout)
    assert backend == "reference"
    assert any("/dev/null/cache" in reason and "FASTATTN_CACHE" in reason for reason in reasons["cpu"])


def test_installed_library_is_taken(python: Python, installed: Path) -> None:
    done = python("-c", ORIGIN, CXX="no-such-compiler")
    assert json.loads(done.stdout)[:3] == [str(installed), "installed with the package", []]
    assert done.stderr == ""


def test_stale_library_is_never_run(python: Python, tree: Path, installed: Path) -> None:
    with (tree / "csrc/attention/scalar.cpp").open("a") as source:
        source.write("// edited\n")
    path, origin, notes, _ = json.loads(python("-c", ORIGIN).stdout)
    assert origin == "built on first use"
    assert path != str(installed)
    assert "was not built from what" in notes[0]

    backend, reasons, warned = json.loads(python("-c", MISSING, FASTATTN_JIT="0").stdout)
    assert backend == "reference"
    assert "was not built from what" in reasons["cpu"][0]
    assert len(warned) == 1


def test_library_that_does_not_load_is_replaced(python: Python, tree: Path) -> None:
    broken = tree / "fastattn" / _build.LIBRARY_NAME
    broken.write_text(_build._STAMP + _build.source_hash(tree / "csrc"))
    _, origin, notes, _ = json.loads(python("-c", ORIGIN).stdout)
    assert origin == "built on first use"
    assert "does not load" in notes[0]


def test_explicit_library_never_falls_back(python: Python, library: Path, tmp_path: Path) -> None:
    backend, reasons, _ = json.loads(python("-c", MISSING, FASTATTN_LIBRARY=str(tmp_path / "no.so")).stdout)
    assert backend == "reference"
    assert len(reasons["cpu"]) == 1
    assert reasons["cpu"][0].startswith("FASTATTN_LIBRARY: ")

    path, origin, _, _ = json.loads(python("-c", ORIGIN, FASTATTN_LIBRARY=str(library)).stdout)
    assert (path, origin) == (str(library), "FASTATTN_LIBRARY")


@pytest.mark.usefixtures("installed")
def test_isa(python: Python) -> None:
    code = """
from fastattn import _backends
print(_backends.cpu_isa())
_backends.isa_override = "scalar"
print(_backends.cpu_isa())
_backends.isa_override = "neon"
try:
    _backends.cpu_isa()
except ValueError as error:
    print(error)
_backends.isa_override = None
print(_backends.cpu_isa())
"""
    said = python("-c", code).stdout.split("\n")
    assert said[:2] == ["avx2", "scalar"]  # the best that is present, and never the 16-lane body on its own
    assert said[2] == "isa_override: expected one of ['scalar', 'avx2', 'wide'] (present here), got 'neon'"
    assert said[3] == "avx2"
    assert python("-c", code, FASTATTN_ISA="wide").stdout.split("\n")[0] == "wide"
    with pytest.raises(AssertionError, match=r"FASTATTN_ISA: expected one of .*, got 'avx512'"):
        python("-c", code, FASTATTN_ISA="avx512")
