"""The benchmarks' own parts: rows, peers, options. What is measured is measured elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import peers, rows
from fastattn.cli import main
from fastattn.gpu_check.oracle import Truth, results
from fastattn.gpu_check.peers import Case, Inputs

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = rows.start_run("attention", folder=tmp_path)
    written = file.add(
        {
            "op": "attention",
            "pass": "both",
            "length": 4096,
            "dropout": 0.0,
            "extra": rows.extra(window=512, bias="alibi"),
            "implementation": "fastattn",
            "status": "ok",
            "p50_ms": 1.25,
            "ceiling": "fma",
        }
    )
    file.close()
    (read,) = rows.read(file.path)
    assert read["schema"] == rows.SCHEMA and read["length"] == 4096 and read["p50_ms"] == 1.25
    assert read["extra"] == {"window": 512, "bias": "alibi"} and read["heads"] is None
    assert read["ceiling"] == "fma" and read["threads"] == torch.get_num_threads()
    assert rows.case_of(read) == rows.case_of(written)
    again = rows.start_run("attention", folder=tmp_path)
    again.close()
    assert again.path.stem == f"{file.path.stem}-2"


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("schema,op\n1,attention\n")
    with pytest.raises(ValueError, match="expected rows of schema 2, got 1"):
        rows.read(path)


def test_columns_are_documented() -> None:
    text = (ROOT / "bench/results/README.md").read_text()
    section = text.partition("## Tidy rows")[2].partition("\n## ")[0]
    assert [name for name in rows.COLUMNS if f"`{name}`" not in section] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, peer in peers.PEERS.items() for kind in peer.can if "cpu" in peer.forward],
)
def test_peers_compute_attention(name: str, kind: str) -> None:
    """Uncompiled; what is compiled is held to float64 again before it is timed."""
    case = Case(kind, 1, 2, 32, 16, dtype=torch.float32, window=8, count=2, dropout=0.0)
    inputs, peer = Inputs(case, CPU, compiles=False), peers.PEERS[name]
    attention = peer.make(inputs, "cpu")
    for training in (False, True) if "cpu" in peer.backward else (False,):
        Truth(inputs).check(results(attention, inputs, training))


def test_peers_are_chosen_by_name() -> None:
    assert list(peers.chosen("naive,sdpa math", "cpu")) == ["fastattn", "naive", "sdpa math"]
    assert set(peers.chosen("all", "cpu")) == set(peers.PEERS)
    with pytest.raises(ValueError, match=r"expected peers among .*; got nobody"):
        peers.chosen("nobody", "cpu")


def test_help_has_the_options(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of this very run
        monkeypatch.delenv(name)
    assert main(["bench", "--help"]) == 0
    text = capfd.readouterr().out
    options = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
    assert {"--op", "--pass", "--dtype", "--length", "--head-dim", "--mask", "--peers", "--device"} < options
    assert len(options) == 13, "the benchmarks' own options, and none of pytest's"


def test_an_operation_that_is_not_there(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    assert main(["bench", "--op", "nonsense"]) != 0
    assert re.search("--op: expected some of .*rotary; got nonsense", capfd.readouterr().err)


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    """The command end to end: what is left out, tidy rows, a file that `pytest-benchmark compare` reads."""
    words = ["bench", "--op", "attention,rotary", "--mask", "none", "--length", "48", "--peers", "naive"]
    words += ["--pass", "both", "--no-memory", "--seconds", "0.01", "--rows", str(tmp_path)]
    words += ["-k", "test_peers or test_rotary", "--benchmark-json", str(tmp_path / "saved.json")]
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout  # of rotary's none is of this length
    assert re.search(r"attention both 48 none: fastattn \S+ ms, naive \S+ ms \(\d+\.\d\dx\)", done.stdout)
    (path,) = tmp_path.glob("*-attention-rotary.csv")
    found = rows.read(path)
    assert [row["implementation"] for row in found if row["op"] == "ceiling"] == ["fma", "copy"]
    timed = [row for row in found if row["op"] == "attention"]
    assert [row["implementation"] for row in timed] == ["fastattn", "naive"]
    for row in timed:
        assert row["status"] == "ok" and row["pass"] == "both" and row["mask"] == "none"
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["error_of_budget"] <= 1
        assert row["gflops"] == pytest.approx(row["flops"] / row["p50_ms"] / 1e6, abs=0.01)
        assert row["kernel"] and row["share_of_ceiling"] > 0
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["machine_info"]["fastattn"]["torch"] == str(torch.__version__)
    assert saved["benchmarks"][0]["stats"]["median"] > 0
