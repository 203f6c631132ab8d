"""The GPU kernels as their compilers leave them: spills, shared memory, tensor-core instructions.

Rules are held. Registers and instructions that moved from those in gpu_static.json, kept for each version of
Triton, are warned of: `python tests/packaging/gpu_entries.py baseline` writes what they are now.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from fastattn.ops.attention.triton.tuning import shared_memory
from fastattn.testing.compiled import Kernel, compile_kernels

SCRIPT = Path(__file__).with_name("gpu_entries.py")
# Processes that compile; those of pytest-xdist have one each.
PROCESSES = 2
MORE_REGISTERS, MORE_INSTRUCTIONS = 8, 1.1
# What takes products: all but the passes over rows, the lists of tiles, and the sums of decoding's parts.
PRODUCTS = {"forward", "dk_dv", "dq", "dbias", "drelative", "decode"}
# What streams tiles, by TMA or asynchronous copies.
STREAMS = {"forward", "dk_dv", "dq"}
LARGE_HEAD = 256
# The block sizes are those that spill nothing on this version; of another's spills there is a warning.
CHOSEN_WITH = "3.6.0"
# What ptxas does now and then in kernels without products, with most registers free: stores one and loads it.
ARTEFACT = (2, 8)
NOT_PARAMETRISED = SimpleNamespace(params={})


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_entries", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


entries = _load()


class Compilers:
    """Processes without TRITON_INTERPRET, each asked for one entry at a time."""

    def __init__(self, count: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.idle: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self.all = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT)],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.all.append(process)
            self.idle.put(process)

    def ask(self, name: str) -> dict[str, Any]:
        process = self.idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer
        finally:
            self.idle.put(process)

    def close(self) -> None:
        for process in self.all:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """What each entry that is to be tested compiles to; under pytest-xdist when it is asked for."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    compilers = Compilers(PROCESSES if alone else 1)
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "name" in getattr(item, "callspec", NOT_PARAMETRISED).params
    ]
    with ThreadPoolExecutor(PROCESSES if alone else 1) as pool:
        yield Answers(pool, compilers, wanted if alone else [])
        pool.shutdown(cancel_futures=True)
    compilers.close()


class Answers(dict[str, "Future[dict[str, Any]]"]):
    """By entry; those known to be asked for are begun at once."""

    def __init__(self, pool: ThreadPoolExecutor, compilers: Compilers, wanted: list[str]) -> None:
        super().__init__()
        self.pool, self.compilers = pool, compilers
        for name in wanted:
            self[name] = pool.submit(compilers.ask, name)

    def __missing__(self, name: str) -> Future[dict[str, Any]]:
        self[name] = self.pool.submit(self.compilers.ask, name)
        return self[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(entries.ENTRIES))
def test_compiles_well(name: str, answers: dict[str, Future[dict[str, Any]]]) -> None:
    answer = answers[name].result(timeout=300)
    assert "error" not in answer, answer
    kernels = answer["kernels"]
    assert kernels
    broken = [reason for kernel in kernels for reason in broken_rules(kernel, entries.ENTRIES[name])]
    assert not broken, broken
    drift = list(drifted(name, kernels))
    if drift:
        warnings.warn(f"{name}: {'; '.join(drift)}", stacklevel=1)


def broken_rules(kernel: dict[str, Any], entry: Any) -> Iterator[str]:
    found = Kernel(**kernel)
    what = found.name.removeprefix("_")
    if spills(found) and triton.__version__ == CHOSEN_WITH:
        yield spills(found)
    if found.shared_memory > shared_memory(entry.target):
        yield f"{what}: {found.shared_memory} bytes of shared memory"
    if found.tensor_memory > 512:
        yield f"{what}: {found.tensor_memory} columns of tensor memory"
    if found.programs is not None and found.programs < 1:
        yield f"{what}: no program fits on a multiprocessor"
    if entry.dtype == "float32" or what not in PRODUCTS:
        return
    large = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(entry.target)
    # These take 64 rows: decoding has fewer, and the tiles of large heads.
    if large and what != "decode" and entry.dim < LARGE_HEAD:
        wanted = [large]
        if entry.target == "sm_90" and found.count("HMMA"):
            yield f"{what}: {found.count('HMMA')} HMMA beside HGMMA"
    else:
        wanted = ["v_mfma" if entry.target.startswith("gfx") else "HMMA|HGMMA|UTCHMMA"]
    if what in STREAMS:
        wanted += {"sm_80": ["LDGSTS"], "sm_90": ["UTMALDG"], "sm_100": ["UTMALDG"]}.get(entry.target, [])
    yield from (f"{what}: no {names}" for names in wanted if not any(map(found.count, names.split("|"))))


def spills(found: Kernel) -> str:
    what = found.name.removeprefix("_")
    allowed = (0, 0) if what in PRODUCTS else ARTEFACT
    broken = (found.spills, found.stack) > allowed
    return f"{what}: {found.spills} spills, {found.stack} bytes of stack" if broken else ""


def drifted(name: str, kernels: list[dict[str, Any]]) -> Iterator[str]:
    if triton.__version__ != CHOSEN_WITH:
        yield from filter(None, (spills(Kernel(**kernel)) for kernel in kernels))
    versions = entries.baseline()
    if triton.__version__ not in versions:
        return
    before = versions[triton.__version__].get(name, {})
    for kernel, (registers, instructions) in entries.sizes_of(kernels).items():
        if kernel not in before:
            yield f"{kernel} is not in {entries.BASELINE.name}"
            continue
        if registers > before[kernel][0] + MORE_REGISTERS:
            yield f"{kernel} takes {registers} registers, took {before[kernel][0]}"
        if instructions > before[kernel][1] * MORE_INSTRUCTIONS:
            yield f"{kernel} has {instructions} instructions, had {before[kernel][1]}"


@pytest.mark.slow
def test_what_is_read_off_a_small_kernel() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("small_kernel.py")), "sm_80", "sm_90", "gfx942"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [[Kernel(*kernel) for kernel in kernels] for kernels in json.loads(done.stdout)]
    assert all(len(kernels) == 1 for kernels in found)
    ampere, too_large, hopper, _, amd, _ = (kernels[0] for kernels in found)
    for kernel, target, threads in ((ampere, "sm_80", 128), (hopper, "sm_90", 128), (amd, "gfx942", 256)):
        assert kernel[:2] == ("product", target)
        assert kernel.threads == threads
        assert kernel.spills == kernel.stack == 0
        assert 0 < kernel.registers < 256
        assert kernel.programs
        assert kernel.instructions == sum(kernel.opcodes.values()) > 100
    assert ampere.count("HMMA") and ampere.count("LDGSTS")
    assert hopper.count("HGMMA") and not hopper.count("HMMA")
    assert amd.count("v_mfma")
    assert hopper.shared_memory == 2 * 2 * 64 * 64 * 2, "two stages of two tiles"
    assert too_large.spills and too_large.stack, "128 x 128 numbers do not fit one warp"


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="expected a process without TRITON_INTERPRET"):
        compile_kernels("sm_90", lambda: None)


@pytest.mark.parametrize("target", ["hopper", "sm_", "90"])
def test_a_wrong_target_is_told(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"arch: expected 'sm_<number>' or 'gfx<number>', got '{target}'"):
        compile_kernels(target, lambda: None)


def test_the_baseline_is_of_the_entries() -> None:
    for version, numbers in entries.baseline().items():
        assert set(numbers) == set(entries.ENTRIES), version
