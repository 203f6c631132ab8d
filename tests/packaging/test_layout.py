"""What keeps the code readable: short files and signatures, tests and benchmarks for each operation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 600
MAX_PARAMETERS = 12
# The whole operation in one call, and what takes the same arguments.
WHOLE = ("attention", "attention_backward", "explain")
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu"}
OPERATIONS = sorted(
    path.name for path in (ROOT / "fastattn/ops").iterdir() if (path / "__init__.py").is_file()
)


def sources() -> Iterator[Path]:
    for folder in ("fastattn", "csrc", "tests", "bench"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in sources()}
    assert len(lengths) > 20
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def speaks_to_people(path: Path) -> bool:
    """Whether its signatures are its own: an operation's other files have the op's schema, integrations the
    signatures of those they stand in for."""
    parts = path.relative_to(ROOT / "fastattn").parts
    if parts[0] == "ops":
        return parts[-1] in ("__init__.py", "api.py", "masks.py", "biases.py", "varlen.py", "statistics.py")
    return parts[0] != "integrations"


def test_signatures_are_short() -> None:
    long = {}
    for path in (ROOT / "fastattn").rglob("*.py"):
        if not speaks_to_people(path):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if (node.name.startswith("_") and node.name != "__init__") or node.name in WHOLE:
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = count
    assert not long


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", ["csrc", "tests", "bench"])
def test_every_operation_has_its_places(operation: str, place: str) -> None:
    folder = ROOT / place / operation
    pattern = "*.cpp" if place == "csrc" else "test_*.py"
    room = ROOT / "fastattn/ops" / operation
    # One that is composed of others' kernels has none of its own.
    if place == "csrc" and (not (room / "cpu.py").exists() or (room / "composed.py").exists()):
        assert not folder.exists()
    else:
        assert list(folder.glob(pattern)), f"expected {pattern} in {folder}"
