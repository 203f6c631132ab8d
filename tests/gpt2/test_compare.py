"""`fastattn compare gpt2`: its options, and real processes on a tiny model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.gpt2 import compare
from fastattn.gpt2.compare import process as process_module
from fastattn.gpt2.compare.process import OutOfMemory, OutOfTime, Worker, WorkerFailed, resident_bytes
from fastattn.gpt2.compare.progress import Progress
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, Implementation, Settings, settings_of

NAMES = ("standard", "sdpa", "attention", "fastattn")  # compiling takes most of a minute
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_ids(tmp_path / "text.bin", "Attention is a weighted mean of values. " * 400)


def write_ids(path: Path, text: str) -> Path:
    """Bytes as a nanoGPT file of ids, which needs no cache."""
    path.write_bytes(torch.tensor(list(text.encode()), dtype=torch.uint16).numpy().tobytes())
    return path


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def parse(*words: str | Path) -> Settings:
    return settings_of(parsed(*words))


def plain(text: Path) -> list[str | Path]:
    words: list[str | Path] = ["--size", "2x2x32", "--context", "63", "--steps", "2", "--no-sweep"]
    return [*words, "--device", "cpu", "--data", text, "--tokenizer", "bytes"]


def tiny(text: Path, *words: str | Path) -> Settings:
    return parse(*plain(text), *words)


def test_a_comparison_writes_a_whole_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    settings = tiny(text, "--sweep", "32,63,127", "--implementations", ",".join(NAMES))
    status = compare.compare(settings, folder)
    result = json.loads((folder / "result.json").read_text())
    assert status == 0, result["implementations"]

    for name in ("report.md", "speed.png", "memory.png", "loss.png"):
        assert (folder / name).stat().st_size > 1000
    assert set(result) == {
        *("schema", "started", "seconds", "interrupted", "settings", "model", "data", "machine", "versions"),
        *(
            "baseline",
            "ours",
            "budget",
            "implementations",
            "train",
            "parity",
            "sweep",
            "notes",
            "samples",
            "verdict",
        ),
    }
    assert result["versions"]["torch"] == torch.__version__
    assert result["data"]["train_tokens"] > 1000
    assert list(result["train"]) == list(NAMES)

    # every sample is there: 2 steps with and 2 without dropout, and the sweep's other two contexts
    assert len(result["samples"]) == 4 * (2 + 2 + 2)
    assert all(s["loss"] > 0 and s["ms"] > 0 and s["peak_bytes"] > 0 for s in result["samples"])
    # with dropout torch's sdpa on a CPU is the one that holds the L×L matrix
    kernels = {name: row["kernel"] for name, row in result["implementations"].items()}
    assert kernels["sdpa"] == "sdpa:math" and "sdpa" not in kernels["standard"]
    assert kernels["fastattn"] == kernels["attention"] == "fastattn_cpu::attention_forward"
    assert "torch's sdpa ran sdpa:math" in result["verdict"] and "dropout 0.1" in result["verdict"].lower()
    weights = {row["model"]["weights"] for row in result["implementations"].values()}
    assert len(weights) == 1
    assert result["parity"]["passed"] is True
    assert max(result["parity"]["largest"].values()) <= 1e-5
    assert result["parity"]["steps"] == 2

    # the report's numbers are the result's
    report = (folder / "report.md").read_text()
    assert result["verdict"] in report
    for name, row in result["train"].items():
        line = next(line for line in report.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:4] == [f"{row[key]:,.0f}" for key in ("median_ms", "min_ms", "max_ms")]
        assert cells[6] == f"{row['peak_bytes'] / 1e9:.2f}"
        assert cells[8] == f"{row['speedup']:.2f}×"
    assert [(row["context"], row["implementation"], row["status"]) for row in result["sweep"]] == [
        (context, name, "measured") for context in (32, 63, 127) for name in NAMES
    ]
    cell = f"{result['sweep'][0]['ms']:,.0f} ms, {result['sweep'][0]['peak_bytes'] / 1e9:.2f} GB"
    printed = capsys.readouterr().out
    for words in (cell, f"{result['parity']['largest']['fastattn']:.1e}", "largest loss difference"):
        assert words in report and words in printed


def test_one_implementation_failing_leaves_the_rest(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Implementation("no_such_attention", "one that is not registered")
    monkeypatch.setitem(IMPLEMENTATIONS, "standard", broken)
    assert compare.compare(tiny(text, "--implementations", "standard,fastattn"), tmp_path) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["implementations"]["standard"]["status"] == "failed"
    assert "no_such_attention" in result["implementations"]["standard"]["reason"]
    assert result["train"]["fastattn"]["steps"] == 1
    assert "no_such_attention" in (tmp_path / "report.md").read_text()
    assert "No comparison" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_compiled_trains_like_the_rest(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    words = ["--size", "1x1x16", "--dropout", "0", "--steps", "3", "--implementations", "compiled,fastattn"]
    assert compare.compare(tiny(text, *words), tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["implementations"]["compiled"]["status"] == "measured"
    assert result["baseline"] == "compiled" and result["parity"]["largest"]["fastattn"] <= 1e-5
    assert result["parity"]["steps"] == 3
    first, *later = (s["ms"] for s in result["samples"] if s["implementation"] == "compiled")
    assert max(later) < first / 3, "compiled once"


def test_the_watchdog_kills_a_child_at_its_limit(text: Path, tmp_path: Path) -> None:
    settings = tiny(text)
    with Session(settings, Progress(["standard"])) as session:
        worker = Worker(settings.worker_spec("standard", session.config, None), tmp_path / "log")
        worker.send({"do": "build", "context": 1500, "dropout": 0.1})
        assert worker.wait()["parameters"] > 10_000
        resident = worker.resident()
        assert resident > 50e6

        # an L×L matrix is 18 MB here, and several are kept
        torch.save({"x": torch.ones(1, 1, 1500).long(), "y": torch.ones(1, 1, 1500).long()}, tmp_path / "b")
        step = {"do": "step", "batches": str(tmp_path / "b"), "index": 0}
        worker.send(step)
        answer = worker.wait(limit=resident + int(2e9))
        assert answer["peak_bytes"] > resident + 4 * 18e6

        torch.save(
            {"x": torch.ones(1, 64, 1500).long(), "y": torch.ones(1, 64, 1500).long()}, tmp_path / "b64"
        )
        worker.send({**step, "batches": str(tmp_path / "b64")})
        with pytest.raises(OutOfMemory, match=r"stopped at .* GB, its limit"):
            worker.wait(limit=resident + int(4e8))
        assert resident_bytes(worker.pid) == 0


def test_a_child_that_dies_or_is_late_is_told_apart(text: Path, tmp_path: Path) -> None:
    spec = {"attention": "eager", "device": "cpu", "dtype": "no_such_dtype"}
    worker = Worker(spec, tmp_path / "log")
    worker.send({"do": "build", "context": 8, "dropout": 0.0})
    with pytest.raises(OutOfTime):
        worker.wait(deadline=0.0)
    assert resident_bytes(worker.pid) == 0

    worker = Worker(spec, tmp_path / "log")
    worker.send({"do": "build", "context": 8, "dropout": 0.0})
    with pytest.raises(WorkerFailed, match="no_such_dtype"):
        worker.wait()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="ended with status -9"):
        worker.wait()
    worker.close()


def test_ctrl_c_ends_the_children_and_leaves_a_report(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastattn", "compare", "gpt2", "--size", "1x1x8", "--context", "32"]
    command += ["--steps", "20000", "--tokenizer", "bytes", "--data", str(text), "--device", "cpu"]
    command += ["--implementations", "standard,fastattn"]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stderr is not None
        for line in parent.stderr:
            if "step 3/" in line:
                break
        children = _children(parent.pid)
        assert len(children) == 2
        parent.send_signal(signal.SIGINT)
        parent.communicate(timeout=120)
    assert parent.returncode == 130
    assert all(resident_bytes(child) == 0 for child in children)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["interrupted"] is True
    assert result["samples"]
    assert "Interrupted" in (tmp_path / "out" / "report.md").read_text()


def _children(pid: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(word) for word in found.stdout.split()]


def test_memory_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("1000000")
    (group / "memory.usage_in_bytes").write_text("400000")
    (group / "memory.stat").write_text("cache 5\ntotal_inactive_file 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    lines = "9:name=systemd:/\n4:memory:/\n0::/\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path: lines if str(path) == "/proc/self/cgroup" else read(path)
    )
    assert process_module._control_group_rooms(tmp_path) == [700_000]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps: expected at least 2"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--dropout", "1"], r"--dropout: expected a probability in \[0, 1\)"),
        (["--memory-budget", "0"], "--memory-budget: expected more than 0"),
        (["--device", "mps"], "--device: expected cpu, cuda or cuda:N, got 'mps'"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
        (["--implementations", "flash"], r"--implementations: expected some of .* got \['flash'\]"),
        (["--implementations", "fastattn"], "--implementations: expected two or more of"),
        (["--implementations", "standard,sdpa"], "--implementations: expected attention or fastattn among"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_options_are_read_as_the_help_says() -> None:
    settings = parse("--sweep", "512,2k", "--memory-budget", "20", "--device", "cpu")
    assert settings.contexts == (512, 2048)
    assert settings.memory_budget == 20_000_000_000
    assert parse("--quick").time_budget == pytest.approx(102)
    assert parse().time_budget == 660
    assert parse("--steps", "5").time_budget is None
    assert parse("--no-sweep").contexts == ()
    assert parse("--context", "2k").contexts[:3] == (1024, 2048, 4096)
    assert parse().implementations == tuple(IMPLEMENTATIONS)
    assert "compiled" not in parse("--quick").implementations + parse("--context", "2k").implementations
    assert parse("--implementations", "fastattn,sdpa").implementations == ("sdpa", "fastattn")
    assert replace(parse(), size="gpt2-xl").title() == "GPT-2 1558M"
    with pytest.raises(ValueError, match="size: expected one of"):
        parse("--size", "huge").model_config(257)
    with pytest.raises(SystemExit):
        parse("--context", "2m")


def test_a_wrong_size_or_text_ends_with_a_message(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--size", "huge"], ["--data", "/no/such/file"], ["--context", "1000k"]):
        assert compare.run(parsed(*plain(text), *words, "--output", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert (
        "size: expected one of" in error and "/no/such/file" in error and "context: expected at most" in error
    )
    assert not (tmp_path / "out").exists()
