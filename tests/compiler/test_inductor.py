"""The pass in front of Inductor: its options, its caches in a second process, and stances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.compiler
from tests.compiler.models import NanoBlock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def step(call: Any, model: NanoBlock, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["backend", "pass"])
def test_training_step(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no pass is run on what Inductor has
    model, x = NanoBlock().train(), torch.randn(2, 12, 32)
    given: dict[str, Any] = {"backend": "fastattn", "options": {"max_fusion_size": 32}}
    if how == "pass":
        given = {"options": {"pre_grad_custom_pass": fastattn.compiler.attention_pass()}}
    compiled = torch.compile(model, fullgraph=True, **given)
    for ours, theirs in zip(step(compiled, model, x), step(model, model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fastattn.compiler.report().rewritten == 1


TWICE = """
import json, torch
import fastattn.compiler
from torch._dynamo.utils import counters
from tests.compiler.models import NanoBlock
found = []
for how in (
    {"backend": "fastattn"},
    {"options": {"pre_grad_custom_pass": fastattn.compiler.attention_pass()}},
):
    torch._dynamo.reset()
    fastattn.compiler.reset_report()
    counters.clear()
    torch.manual_seed(0)
    model, x = NanoBlock(0.1).train(), torch.randn(2, 12, 32)
    torch.compile(model, fullgraph=True, **how)(x).sum().backward()
    cache = [counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss", "bypass")]
    found.append([*cache, fastattn.compiler.report().rewritten])
print(json.dumps(found))
"""


def test_second_process_hits_the_caches(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TWICE],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout))
    # Hits, misses, bypasses, sites. Inductor runs no pass on what it has; the backend looks first.
    assert found[0] == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert found[1] == [[1, 0, 0, 1], [1, 0, 0, 0]]


def test_stances() -> None:
    model, x = NanoBlock().eval(), torch.randn(2, 12, 32)
    compiled = torch.compile(model, backend="fastattn", options={"then": "eager"})
    naive = model(x)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compiled(x), naive)
    assert fastattn.compiler.report().seen == 0
    with torch.compiler.set_stance(skip_guard_eval_unsafe=False):
        torch.testing.assert_close(compiled(x), naive)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), naive)
    assert fastattn.compiler.report().rewritten == 1


def test_key_names_the_sources() -> None:
    first, second = fastattn.compiler.attention_pass(), fastattn.compiler.attention_pass()
    assert first.uuid() == second.uuid()
    assert first.uuid().startswith("fastattn-")
