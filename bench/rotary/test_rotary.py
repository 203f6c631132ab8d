"""Rotary embedding of queries and keys, against how models write it.

``transformers`` is what its Llama does, with the cosines and sines it looks up beforehand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

import fastattn
from bench.contest import CLOCK, Problem, Race, normal
from bench.peers import liger
from fastattn.gpu_check.report import Absent

Two = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case(Problem):
    """q and k ``[batch, heads, length, head_dim]``."""

    op = "rotary"
    batch: int = 1
    heads: int = 12
    kv_heads: int = 12
    length: int = 4096
    head_dim: int = 64

    def race(self, device: torch.device) -> Race:
        shapes = {
            name: (self.batch, heads, self.length, self.head_dim)
            for name, heads in (("q", self.heads), ("k", self.kv_heads))
        }
        position = torch.arange(float(self.length), device=device)[:, None]
        angle = position * 1e4 ** -torch.linspace(0, 1, self.head_dim // 2, device=device)
        cos, sin = angle.cos(), angle.sin()
        wide = [torch.cat((t, t), -1).to(self.dtype)[None] for t in (cos, sin)]

        def ours(q: Tensor, k: Tensor) -> Two:
            return fastattn.rotary(q, cos, sin), fastattn.rotary(k, cos, sin)

        def plain(q: Tensor, k: Tensor) -> Two:
            return turned(q, cos, sin), turned(k, cos, sin)

        def theirs(q: Tensor, k: Tensor) -> Two:
            return apply_rotary_pos_emb()(q, k, *wide)

        def ligers(q: Tensor, k: Tensor) -> Two:
            return liger("liger_rope")(q, k, *wide)

        functions = {"fastattn": ours, "transformers": theirs, "liger": ligers}
        return Race(normal(device, self.dtype, **shapes), functions, plain)

    def bytes(self, which: str, race: Race, outs: Sequence[Tensor]) -> int:
        """What is turned, read and written; its gradient, likewise."""
        return (2 if which == "both" else 1) * 2 * sum(out.nbytes for out in outs)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The equation, in x's dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@cache
def apply_rotary_pos_emb() -> Callable[..., Two]:
    try:
        found = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    except ImportError as error:
        raise Absent(f"transformers is not installed ({error})") from error
    function: Callable[..., Two] = found
    return function


BF16 = torch.bfloat16
CASES = [Case(), Case(dtype=BF16), Case(batch=8, heads=32, kv_heads=8, length=1)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotary(case: Case, compete: Callable[[Problem], None]) -> None:
    compete(case)
