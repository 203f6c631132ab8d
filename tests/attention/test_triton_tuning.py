"""The tuning table: every kernel has a row everywhere, the most specific is taken, a wrong line is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.tuning import Config, Row, config

ARCHITECTURES = (
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "sm_121",
    "gfx942",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADER = ",".join(tuning.COLUMNS)


def row(block_q: int, kernel: str = "forward", arch: str = "sm_80", **case: str) -> Row:
    named = {name: case.get(name, "any") for name in ("dtype", "causal", "rich")}
    return Row(kernel, arch, 64, **named, config=Config(block_q, 32, 4, 2), source="static")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of the test's own in the place of the package's."""
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.csv")
    tuning.forget()
    yield tmp_path / "tuning.csv"
    tuning.forget()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_case_has_a_row(kernel: str, arch: str) -> None:
    for dim in tuning.DIMS:
        for dtype in DTYPES:
            for causal in (False, True):
                for rich in (False, True):
                    found = config(kernel, arch, dim, dtype, causal, rich)
                    assert min(found.block_q, found.block_k) >= 16, "tl.dot takes no less"
                    assert found.warps in (1, 2, 4, 8, 16)
                    assert 1 <= found.stages <= 5


def test_the_package_s_table_is_in_its_order(tmp_path: Path) -> None:
    rows = tuning.read(tuning.TABLE)
    assert len({row[:6] for row in rows}) == len(rows), "a case has two rows"
    tuning.write(rows, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == tuning.TABLE.read_text()


def test_the_most_specific_row_is_taken(table: Path) -> None:
    tuning.write([row(16), row(32, causal="yes"), row(64, rich="yes"), row(128, dtype="float32")], table)
    half, single = torch.float16, torch.float32
    assert config("forward", "sm_80", 64, half, False, False).block_q == 16
    assert config("forward", "sm_80", 64, half, True, False).block_q == 32
    assert config("forward", "sm_80", 64, half, True, True).block_q == 64
    assert config("forward", "sm_80", 64, single, True, True).block_q == 128


def test_sixteen_bit_dtypes_share_rows(table: Path) -> None:
    tuning.write([row(16), row(32, dtype="bfloat16"), row(64, rich="yes"), row(128, dtype="float32")], table)
    for dtype in (torch.bfloat16, torch.float16):
        assert config("forward", "sm_80", 64, dtype, False, True).block_q == 32
    tuning.write([row(32, dtype="bfloat16"), row(64, dtype="float16"), row(16)], table)
    assert config("forward", "sm_80", 64, torch.float16, False, False).block_q == 64
    assert config("forward", "sm_80", 64, torch.float32, False, False).block_q == 16


def test_an_architecture_without_a_row_takes_the_nearest_one_s(table: Path) -> None:
    tuning.write(
        [
            row(16, arch="sm_86"),
            row(32, arch="sm_90"),
            row(64, arch="gfx942"),
            row(128, arch="sm_89", rich="yes"),
        ],
        table,
    )
    expected = {"sm_86": 16, "sm_89": 16, "sm_120": 16, "sm_75": 16, "sm_90": 32, "sm_110": 32, "sm_999": 32}
    for arch, block_q in {**expected, "gfx950": 64, "gfx1100": 64}.items():
        assert config("forward", arch, 64, torch.float16, True, False).block_q == block_q, arch
    assert config("forward", "sm_89", 64, torch.float16, True, True).block_q == 128
    with pytest.raises(
        ValueError, match=r"arch: expected one that tuning.csv has forward rows for, got 'sm_80'"
    ):
        config("forward", "sm_80", 64, torch.float16, True, False)


def test_a_relative_s_rows_fit_its_shared_memory() -> None:
    for arch in (*ARCHITECTURES, "sm_110", "sm_130", "gfx90a", "gfx1100"):
        assert tuning.shared_memory(arch) >= min(
            tuning.shared_memory(name) for name in tuning.relatives(arch)[1:] or [arch]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "backward"}, "kernel: expected one of .*'dkdv'.* got 'backward'"),
        ({"dim": 48}, "dim: expected one of .*64.* got 48"),
        ({"arch": "hopper"}, "arch: expected 'sm_<number>' or 'gfx<number>', got 'hopper'"),
        ({"arch": "sm_x"}, "arch: expected .* got 'sm_x'"),
    ],
)
def test_wrong_cases_are_told(changes: dict[str, object], message: str) -> None:
    case: dict[str, object] = {"kernel": "forward", "arch": "sm_80", "dim": 64} | changes
    with pytest.raises(ValueError, match=message):
        config(**case, dtype=torch.float16, causal=True, rich=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("backward,sm_80,64,any,any,any,128,64,4,3,static", "tuning.csv:2: kernel: expected one of"),
        ("forward,sm_80,63,any,any,any,128,64,4,3,static", "tuning.csv:2: dim: expected one of"),
        (
            "forward,sm_80,64,any,maybe,any,128,64,4,3,static",
            "causal: expected 'any', 'yes' or 'no', got 'maybe'",
        ),
        ("forward,sm_80,64,any,any,any,96,64,4,3,static", "block_q: expected a power of two, got 96"),
        ("forward,sm_80,64,any,any,any,128,64,4,0,static", "stages: expected 1 or more, got 0"),
        ("forward,sm_80,64,any,any,any,128,64", "tuning.csv:2: "),
    ],
)
def test_a_wrong_line_is_told(table: Path, line: str, message: str) -> None:
    table.write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        tuning.read(table)


def test_missing_columns_are_told(table: Path) -> None:
    table.write_text("kernel,arch\nforward,sm_80\n")
    with pytest.raises(ValueError, match=r"expected columns \['kernel', .* got \['kernel', 'arch'\]"):
        tuning.read(table)


def test_newer_rows_take_the_place_of_the_same_case(table: Path) -> None:
    older, newer = [row(16), row(32, rich="yes")], [row(64, rich="yes"), row(128, rich="no")]
    tuning.write(tuning.merged(older, newer), table)
    assert [found.config.block_q for found in tuning.read(table)] == [16, 128, 64]


def test_what_is_written_counts_at_once(table: Path) -> None:
    tuning.write([row(16)], table)
    assert config("forward", "sm_80", 64, torch.float16, True, True).block_q == 16
    tuning.write([row(32)], table)
    assert config("forward", "sm_80", 64, torch.float16, True, True).block_q == 32


def test_forced_takes_the_place_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = Config(16, 16, 1, 1)
    monkeypatch.setitem(tuning.forced, "forward", forced)
    monkeypatch.setattr(tuning, "forced_architecture", "sm_90")
    assert config("forward", "sm_80", 64, torch.float16, True, True) == forced
    assert config("dq", "sm_80", 64, torch.float16, True, True) != forced
    assert tuning.architecture(torch.device("cpu")) == "sm_90"
