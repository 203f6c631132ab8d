"""Attention with a cache against a loop over rows in float64: storage × dtype × rotary × mask × bias."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.kv_cache import KVCache, Rotary, attention_with_kv_cache
from fastattn.testing import force_isa, present_isas

BACKENDS = ["reference", *(["cpu"] if present_isas() else [])]
QUANTISED = (torch.int8, torch.float8_e4m3fn)


# For each mask: whether the query at position p sees the key at position j (of a sequence that has both).
MASKS: dict[str, tuple[Callable[[], object], Callable[[int, int], bool]]] = {
    "none": (lambda: None, lambda p, j: True),
    "causal": (fastattn.causal, lambda p, j: j <= p),
    "window": (lambda: fastattn.sliding_window(4, 0), lambda p, j: p - 4 <= j <= p),
    "both sides": (lambda: fastattn.sliding_window(2, 1, align="top_left"), lambda p, j: p - 2 <= j <= p + 1),
    "prefix": (lambda: fastattn.causal() | fastattn.prefix(2), lambda p, j: j <= p or j < 2),
    "chunks": (
        lambda: fastattn.causal() & fastattn.chunked(5),
        lambda p, j: j <= p and j // 5 == p // 5,
    ),
}


@dataclass(frozen=True)
class Case:
    """One problem; see `KVCache` and `attention_with_kv_cache`."""

    storage: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    rotary: str
    mask: str
    q_length: int
    new: int | None
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 5)
    lengths: tuple[int, ...] = (13, 0, 6)
    left_padding: bool = False
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    dense: bool = False
    per_head: bool = True

    def __str__(self) -> str:
        flags = [n for n in ("left_padding", "softcap", "sinks", "alibi", "dense") if getattr(self, n)]
        name, cache = (str(t).removeprefix("torch.") for t in (self.dtype, self.cache_dtype))
        parts = (self.storage, name, cache, f"rotary {self.rotary}", self.mask, f"{self.q_length}+{self.new}")
        return ", ".join((*parts, *flags))


def drawn(count: int) -> list[Case]:
    pick = random.Random(3)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    cases = []
    for i in range(count):
        dtype = floats[i % 3] if i % 4 else torch.float32
        new = pick.choice((None, 1, 1, 3, 7))
        cases.append(
            Case(
                storage=("rows", "indexed", "pages of 1", "pages of 4", "pages of 7")[i % 5],
                dtype=dtype,
                cache_dtype=pick.choice((dtype, dtype, torch.float32, torch.bfloat16, *QUANTISED)),
                rotary=pick.choice(("none", "half", "interleaved", "partial")),
                mask=pick.choice(list(MASKS)),
                # Where there is rotary every query is to have a position.
                q_length=new or 1,
                new=new,
                lengths=pick.choice(((13, 0, 6), (1, 20, 2))) if new else (13, 1, 6),
                heads=pick.choice(((4, 2), (3, 3), (6, 1))),
                dims=pick.choice(((8, 5), (17, 17), (6, 9))),
                left_padding=pick.random() < 0.3,
                softcap=pick.choice((None, None, 2.0)),
                sinks=pick.random() < 0.3,
                alibi=pick.random() < 0.3,
                dense=pick.random() < 0.2,
                per_head=pick.random() < 0.7,
            )
        )
    return cases


class Problem:
    """The case's tensors. Slots that hold no key are NaN, or the largest int8."""

    def __init__(self, case: Case) -> None:
        self.case = case
        (heads, kv_heads), (dim, v_dim), batch = case.heads, case.dims, len(case.lengths)
        self.q = torch.randn(batch, heads, case.q_length, dim).to(case.dtype)
        self.k = self.v = None
        if case.new:
            self.k = torch.randn(batch, kv_heads, case.new, dim).to(case.dtype)
            self.v = torch.randn(batch, kv_heads, case.new, v_dim).to(case.dtype)
        self.totals = [n + (case.new or 0) for n in case.lengths]
        capacity, kind = 32, case.storage
        self.page_size = int(kind.removeprefix("pages of ")) if kind.startswith("pages") else capacity
        table = index = None
        rows = batch
        if kind.startswith("pages"):
            count = -(-capacity // self.page_size)
            rows = batch * count + 2
            table = torch.randperm(rows)[: batch * count].view(batch, count).to(torch.int32)
            for b, total in enumerate(self.totals):  # of pages without keys nothing is to be read
                table[b, -(-total // self.page_size) :] = random.choice((-1, 9999))
        elif kind == "indexed":
            rows = batch + 3
            index = torch.randperm(rows)[:batch].to(torch.int32)
        scales = [None, None]
        if case.cache_dtype in QUANTISED:
            shape = (batch, kv_heads) if case.per_head else (1,)
            high = 0.03 if case.cache_dtype == torch.int8 else 0.6  # some new keys are out of the range
            scales = [torch.rand(shape) * high / 2 + high / 2 for _ in range(2)]
        stored = [self._empty(rows, kv_heads, d) for d in (dim, v_dim)]
        self.cache = KVCache(
            *stored,
            lengths=torch.tensor(case.lengths, dtype=torch.int32),
            block_table=table,
            batch_index=index,
            left_padding=torch.tensor([3, 0, 4]) if case.left_padding else None,
            k_scale=scales[0],
            v_scale=scales[1],
        )
        for b, n in enumerate(case.lengths):
            for j in range(n):
                row, slot = self.slot(b, j)
                for x in stored:
                    x[row, :, slot] = self._some(x.shape[1], x.shape[3])
        half = {"none": 0, "partial": dim // 4}.get(case.rotary, dim // 2)
        angle = torch.arange(40.0)[:, None] * 5.0 ** -torch.arange(half)
        self.rotary = Rotary(angle.cos(), angle.sin(), case.rotary == "interleaved") if half else None
        self.bias: object = None
        self.slopes = torch.rand(heads) if case.alibi else torch.zeros(heads)
        self.added = torch.randn(1, heads, 1, self.cache.capacity) if case.dense else None
        if case.alibi:
            self.bias = fastattn.alibi(self.slopes)
        if case.dense:
            self.bias = self.added if self.bias is None else self.bias + self.added
        self.sinks = torch.randn(heads) if case.sinks else None

    def _empty(self, rows: int, heads: int, dim: int) -> Tensor:
        shape = (rows, heads, self.page_size, dim)
        if self.case.cache_dtype == torch.int8:
            return torch.full(shape, 127, dtype=torch.int8)
        return torch.full(shape, float("nan")).to(self.case.cache_dtype)

    def _some(self, heads: int, dim: int) -> Tensor:
        if self.case.cache_dtype == torch.int8:
            return torch.randint(-128, 128, (heads, dim)).to(torch.int8)
        return torch.randn(heads, dim).to(self.case.cache_dtype)

    def slot(self, b: int, j: int) -> tuple[int, int]:
        if self.cache.block_table is not None:
            return int(self.cache.block_table[b, j // self.page_size]), j % self.page_size
        return (b if self.cache.batch_index is None else int(self.cache.batch_index[b])), j

    def stored(self, b: int, j: int) -> tuple[Tensor, Tensor]:
        """Key and value j of sequence b in float64, ``[H_kv, D]``."""
        row, slot = self.slot(b, j)
        found = []
        for x, scale in ((self.cache.k, self.cache.k_scale), (self.cache.v, self.cache.v_scale)):
            own = x[row, :, slot].double()
            if scale is not None:
                own = own * (scale[b] if scale.dim() == 2 else scale)[:, None].double()
            found.append(own)
        return found[0], found[1]

    def run(self, backend: str | None = None) -> tuple[Tensor, Tensor]:
        case = self.case
        found = attention_with_kv_cache(
            self.q,
            self.cache,
            self.k,
            self.v,
            rotary=self.rotary,
            mask=MASKS[case.mask][0](),
            bias=self.bias,
            softcap=case.softcap,
            sinks=self.sinks,
            return_lse=True,
            backend=backend,
        )
        assert isinstance(found, tuple)
        return found

    def loop(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out and lse row by row, from what is in the cache now, every step in `dtype`."""
        case = self.case
        out = torch.zeros(*self.q.shape[:3], case.dims[1], dtype=dtype)
        lse = torch.empty(self.q.shape[:3], dtype=dtype)
        group = case.heads[0] // case.heads[1]
        for b, total in enumerate(self.totals):
            left = int(self.cache.left_padding[b]) if self.cache.left_padding is not None else 0
            for i in range(case.q_length):
                p = total - case.q_length + i
                seen = [j for j in range(left, total) if MASKS[case.mask][1](p, j)]
                rows = [self.stored(b, j) for j in seen]
                for h in range(case.heads[0]):
                    query = turned(self.q[b, h, i].to(dtype), p, self.rotary)
                    scores = torch.empty(len(seen), dtype=dtype)
                    for n, j in enumerate(seen):
                        score = (query * rows[n][0][h // group].to(dtype)).sum() / case.dims[0] ** 0.5
                        if case.softcap:
                            score = case.softcap * torch.tanh(score / case.softcap)
                        score = score - self.slopes[h].to(dtype) * abs(p - j)
                        if self.added is not None:
                            score = score + self.added[0, h, 0, j].to(dtype)
                        scores[n] = score
                    sink = [] if self.sinks is None else [self.sinks[h : h + 1].to(dtype)]
                    logits = torch.cat((scores, *sink))
                    lse[b, h, i] = torch.logsumexp(logits, 0) if len(logits) else float("-inf")
                    if seen:
                        weights = torch.softmax(logits, 0)[: len(seen)]
                        out[b, h, i] = weights @ torch.stack([v[h // group].to(dtype) for _, v in rows])
        return out, lse


def turned(x: Tensor, p: int, rotary: Rotary | None) -> Tensor:
    """A vector ``[D]`` at position p, pair by pair."""
    if rotary is None:
        return x
    out, half = x.clone(), rotary.cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, half + i)
        c, s = rotary.cos[p, i].to(x.dtype), rotary.sin[p, i].to(x.dtype)
        out[a], out[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
    return out


def check_appended(problem: Problem, before: tuple[Tensor, Tensor]) -> None:
    """New keys are where they belong, as near as the cache's dtype allows; nothing else has been touched."""
    case, cache = problem.case, problem.cache
    touched = torch.zeros(cache.k.shape[0], cache.k.shape[2], dtype=torch.bool)
    for b, n in enumerate(case.lengths):
        for i in range(case.new or 0):
            touched[problem.slot(b, n + i)] = True
            assert problem.k is not None and problem.v is not None
            for x, own, scale, rotary in (
                (problem.k, problem.stored(b, n + i)[0], cache.k_scale, problem.rotary),
                (problem.v, problem.stored(b, n + i)[1], cache.v_scale, None),
            ):
                want = torch.stack([turned(row, n + i, rotary) for row in x[b, :, i].double()])
                slack = 2 * torch.finfo(case.dtype).eps * want.abs().clamp(min=1)  # rotary's own rounding
                if case.cache_dtype in QUANTISED:
                    unit = (scale[b] if scale.dim() == 2 else scale)[:, None].double()
                    low, high = (-128, 127) if case.cache_dtype == torch.int8 else (-448, 448)
                    want = want.clamp(low * unit, high * unit)
                    # Half a step: of integers, or of e4m3's three bits of mantissa and its least number.
                    integer = case.cache_dtype == torch.int8
                    slack = slack + (0.5 * unit if integer else (want.abs() / 16).clamp(min=unit * 2**-10))
                else:
                    slack = slack + torch.finfo(case.cache_dtype).eps * want.abs()
                assert bool(((own - want).abs() <= slack).all())
    for now, then in ((cache.k, before[0]), (cache.v, before[1])):
        same = now.view(torch.uint8) == then.view(torch.uint8)
        assert bool(same.transpose(1, 2)[~touched].all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("number", "case"), [pytest.param(i, c, id=str(c)) for i, c in enumerate(drawn(90))])
def test_against_a_loop(number: int, case: Case, backend: str) -> None:
    """Each case on one of the instruction sets, in turn."""
    problem = Problem(case)
    before = problem.cache.k.clone(), problem.cache.v.clone()
    isas = present_isas()
    with force_isa(isas[number % len(isas)]) if backend == "cpu" else nullcontext():
        out, lse = problem.run(backend)
    check_appended(problem, before)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    exact, plain = problem.loop(torch.float64), problem.loop(case.dtype)
    for found, right, same_dtype in zip((out, lse), exact, plain, strict=True):
        finite = right.isfinite()
        assert torch.equal(found.double()[~finite], right[~finite])
        error = (found.double() - right)[finite].abs().max()
        scale = right[finite].abs().max().clamp(min=1)
        band = (torch.finfo(found.dtype).eps + 32 * torch.finfo(torch.float32).eps) * scale
        assert error <= 2 * (same_dtype.double() - right)[finite].abs().max() + band
