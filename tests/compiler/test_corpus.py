"""The kept graphs are found as they are, and are what dynamo makes of the models today."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path

import pytest
import torch

import fastattn.compiler
from fastattn.compiler.backend import backend
from tests.compiler.corpus import FOLDER, GRAPHS, loaded, made
from tests.compiler.models import MODELS

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def test_every_graph_is_kept() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(GRAPHS)


@pytest.mark.parametrize("name", GRAPHS)
def test_kept_graph_is_found(name: str) -> None:
    call, inputs = loaded((FOLDER / f"{name}.txt").read_text())
    compiled = torch.compile(call, backend=partial(backend, then="eager"), dynamic=False)
    compiled(*inputs)
    found = fastattn.compiler.report()
    assert (found.rewritten, found.seen) == (MODELS[GRAPHS[name][0]][1],) * 2, found


@pytest.mark.parametrize("name", ["gpt2_padded", "nano", "vit"])
def test_graph_of_today(name: str) -> None:
    path: Path = FOLDER / f"{name}.txt"
    kept, today = path.read_text(), made(name)
    if kept != today:
        changed = "\n".join(
            difflib.unified_diff(kept.split("\n"), today.split("\n"), "kept", "today", lineterm="")
        )
        pytest.fail(f"{changed}\nIf all sites are still found: python -m tests.compiler.corpus")
