"""`fastattn tune`: what it proposes and rules out without a GPU, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastattn import cli
from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.tuning import Config
from fastattn.testing.compiled import Kernel
from fastattn.tune.calls import Case
from fastattn.tune.candidates import Compiled, candidates, ruled_out
from fastattn.tune.measure import difference, measure

ONE = ["--kernel", "forward", "--dim", "64", "--causal", "yes", "--rich", "no"]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels are compiled and not interpreted, without a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastattn", "tune", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_dry_run_compiles_and_writes_nothing() -> None:
    before = tuning.TABLE.read_bytes()
    done = tune(*ONE, "--dry-run", "--arch", "sm_90", "--most", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("forward bfloat16 head dim 64 causal on sm_90, now block_q ")
    assert lines[1] == "  4 x 32 heads x 4096 keys: causal"
    assert lines[2].startswith("  fits: block_q 128 block_k 128 warps 8 stages 3 (")
    assert "registers" in lines[2]
    assert tuning.TABLE.read_bytes() == before


@pytest.mark.slow
def test_static_writes_a_row_that_compiles_without_spills(tmp_path: Path) -> None:
    table = tmp_path / "tuning.csv"
    tuning.write([], table)
    done = tune(*ONE, "--dtype", "float16", "--static", "--arch", "sm_80", "--output", str(table))
    assert done.returncode == 0, done.stderr
    assert "spills" in done.stdout, "128 x 128 tiles of sm_80 spill"
    (row,) = tuning.read(table)
    assert row[:6] == ("forward", "sm_80", 64, "any", "any", "no")
    assert row.source == "static"
    chosen = " ".join(f"{name} {value}" for name, value in row.config._asdict().items())
    assert f"  fits: {chosen} (" in done.stdout


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sees no GPU, and nothing is measured without one. --dry-run --arch sm_90 shows what would be"),
        (["--arch", "sm_90"], "sees no GPU"),
        (["--dry-run"], "--arch: expected an architecture such as sm_90"),
        (["--dry-run", "--arch", "hopper"], "arch: expected 'sm_<number>' or 'gfx<number>', got 'hopper'"),
        (
            ["--static", "--arch", "sm_90", "--output", "/nowhere/x.csv"],
            "expected a file that can be written",
        ),
    ],
)
def test_what_can_not_be_done_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_the_interpreter_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["tune", "--dry-run", "--arch", "sm_90"]) == 1
    assert "expected an environment without TRITON_INTERPRET" in capsys.readouterr().err


def test_without_triton_it_is_told_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr("importlib.import_module", missing)
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().err == "fastattn tune needs triton: pip install 'fastattn[triton]'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dim", "48"],
        ["--kernel", "backward"],
        ["--dtype", "float64"],
        ["--rounds", "0"],
        ["--length", "many"],
        ["--dry-run", "--static"],
    ],
)
def test_wrong_arguments_say_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments])
    assert stopped.value.code == 2
    assert "usage: fastattn tune" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_has_candidates(kernel: str, arch: str, dtype: torch.dtype) -> None:
    for dim in tuning.DIMS:
        found = candidates(Case(kernel, dim, dtype, True, False), arch)
        assert found
        assert len(set(found)) == len(found)
        for config in found:
            assert min(config.block_q, config.block_k) >= 16
            if kernel in ("forward", "dq"):
                streamed = 2 * config.stages * config.block_k * dim * dtype.itemsize
                assert streamed <= tuning.shared_memory(arch)


KERNEL = Kernel("_forward", "sm_86", 128, 0, 0, 64 * 1024, 0, 128, 1, 1000, {"HMMA": 64})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"spills": 3}, "spills (3 instructions, 0 bytes)"),
        ({"stack": 16}, "spills (0 instructions, 16 bytes)"),
        ({"shared_memory": 100 * 1024}, "takes 102400 of 101376 bytes of shared memory"),
        ({"shared_memory": 100 * 1024, "target": "sm_80"}, ""),
        ({"tensor_memory": 1024}, "takes 1024 of 512 columns of tensor memory"),
    ],
)
def test_what_will_not_do_is_ruled_out(changes: dict[str, object], reason: str) -> None:
    assert ruled_out(KERNEL._replace(**changes)) == reason  # type: ignore[arg-type]


def test_a_candidate_says_what_came_of_it() -> None:
    found = Compiled(Config(64, 32, 4, 2), (KERNEL,), "causal: spills")
    expected = "block_q 64 block_k 32 warps 4 stages 2: causal: spills (128 registers, 64 KiB, 1 at once)"
    assert str(found) == expected


def test_results_are_held_against_the_default_s() -> None:
    row = torch.tensor([3.0, 4.0])
    infinite = torch.tensor([float("-inf"), 4.0])
    assert difference([row, infinite], [row, infinite]) == 0.0
    assert difference([row], [row + torch.tensor([0.0, 1.0])]) == pytest.approx(1 / 34**0.5)
    assert difference([infinite], [row]) == float("inf")
    assert difference([torch.tensor([float("nan"), 4.0])], [infinite]) == float("inf")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")
def test_measures_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    case = Case("forward", 64, torch.float16, True, False)
    arch = tuning.architecture(device)
    default = tuning.config("forward", arch, 64, torch.float16, True, False)
    from fastattn.testing.cases import Sizes

    outcome = measure(case, default, [Config(64, 32, 4, 2)], Sizes(2, 4, 4, 512, 512), device, 3)
    assert {timing.config for timing in outcome.timings} == {default, Config(64, 32, 4, 2)}
    assert all(timing.milliseconds > 0 for timing in outcome.timings)
