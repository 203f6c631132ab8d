"""A step of AdamW over GPT-2's parameters, with clipping and without: ours against torch's fused one.

Each run adds a row an implementation to bench/results/adamw.csv.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.side_by_side import CLOCK, keep, time_in_turns

BLOCK = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
BLOCK += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
SHAPES = [(50257, 768), (1024, 768), *12 * BLOCK, (768,), (768,)]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """GPT-2 124M's, with gradients."""
    g = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in SHAPES]
    for p in found:
        p.grad = torch.randn(p.shape, generator=g).to(dtype)
    return found


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_step(benchmark: Any, max_norm: float | None) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = fastattn.optim.AdamW(ours, max_norm=max_norm)
    fused = torch.optim.AdamW(theirs, fused=True)

    def torch_step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm, foreach=True)
        fused.step()

    optimizer.step()
    torch_step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    columns = {"dtype": "float32", "parameters": sum(p.numel() for p in ours), "max_norm": max_norm}
    keep(
        "adamw.csv",
        benchmark,
        columns,
        time_in_turns({"fastattn": optimizer.step, "torch": torch_step}, 10.0),
    )
