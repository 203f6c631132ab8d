"""Attention with a cache against a loop over rows in float64: storage × dtype × rotary × mask × bias."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.kv_cache import KVCache, Rotary, attention_with_kv_cache
from fastattn.testing import force_isa, present_isas
from tests.attention.cases import device_of, here, interpreted

BACKENDS = list(dict.fromkeys(name.partition("-")[0] for name in here()))
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
        self.slopes = torch.rand(heads) if case.alibi else torch.zeros(heads)
        self.added = torch.randn(1, heads, 1, self.cache.capacity) if case.dense else None
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

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        """out and lse, where the backend's device is; the cache here is as that one then is."""
        case, cache, device = self.case, self.cache, device_of(backend)
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        moved = KVCache(**{field.name: move(getattr(cache, field.name)) for field in fields(cache)})
        bias = fastattn.Bias()
        if case.alibi:
            bias = bias + fastattn.alibi(move(self.slopes))
        if case.dense:
            bias = bias + move(self.added)
        found = attention_with_kv_cache(
            move(self.q),
            moved,
            move(self.k),
            move(self.v),
            rotary=None if self.rotary is None else Rotary(*(move(x) for x in self.rotary)),
            mask=MASKS[case.mask][0](),
            bias=bias,
            softcap=case.softcap,
            sinks=move(self.sinks),
            return_lse=True,
            backend=backend,
        )
        assert isinstance(found, tuple)
        if device != "cpu":
            cache.k.copy_(moved.k)
            cache.v.copy_(moved.v)
        return found[0].cpu(), found[1].cpu()

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


@pytest.mark.parametrize(
    ("number", "case", "backend"),
    [
        pytest.param(i, case, backend, id=f"{case}-{backend}")
        for i, case in enumerate(drawn(90))
        for backend in BACKENDS
        # Every storage, dtype, mask and bias is among these.
        if not interpreted(backend) or i % 4 == 1
    ],
)
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


def long_cache(storage: torch.dtype, page_size: int | None, lengths: Tensor, capacity: int) -> KVCache:
    """Of two heads of 24 and 17. What holds no key is NaN, or the largest int8; pages without keys are -1."""
    batch, scale = lengths.shape[0], None
    rows, slots = (batch, capacity) if page_size is None else (batch * capacity // page_size, page_size)
    stored = []
    for dim in (24, 17):
        x = torch.randn(rows, 2, slots, dim)
        stored.append((x * 40).to(storage) if storage == torch.int8 else x.to(storage))
    if storage in QUANTISED:
        scale = torch.rand(batch, 2) * (0.03 if storage == torch.int8 else 1.0)
    table = None
    if page_size is not None:
        table = torch.randperm(rows).view(batch, -1).to(torch.int32)
        table[torch.arange(0, capacity, page_size) >= lengths[:, None]] = -1
    cache = KVCache(*stored, lengths, table, k_scale=scale, v_scale=None if scale is None else 1.3 * scale)
    empty = torch.arange(capacity) >= lengths[:, None]
    for x in stored:
        view = x.view(torch.uint8) if storage == torch.float8_e4m3fn else x
        fill = 127 if storage in QUANTISED else float("nan")  # 127 is e4m3's NaN
        for b, i in empty.nonzero().tolist():
            if page_size is None:
                view[b, :, i] = fill
            elif table[b, i // page_size] >= 0:
                view[table[b, i // page_size], :, i % page_size] = fill
    return cache


LONG = [(s, n) for s in (torch.float32, torch.bfloat16, *QUANTISED) for n in (None, 16, 10)]


@pytest.mark.parametrize(
    ("backend", "storage", "page_size"),
    [
        (name, *long)
        for name in BACKENDS
        for long in LONG[:: 2 if interpreted(name) else 1]
        if name != "reference"
    ],
    ids=str,
)
def test_keys_split_over_programs_or_threads(
    backend: str, storage: torch.dtype, page_size: int | None
) -> None:
    """Caches of hundreds of keys; some splits hold none, and a window begins late; grouped heads."""
    lengths = torch.tensor([640, 3, 300])
    cache = long_cache(storage, page_size, lengths, 640)
    dtype = storage if storage.is_floating_point and storage not in QUANTISED else torch.float32
    q = torch.randn(3, 6, 2, 24).to(dtype)
    slopes, sinks = torch.rand(6) * 0.1, torch.randn(6)

    def run(backend: str) -> list[Tensor]:
        device = device_of(backend)
        moved = KVCache(
            *(x.to(device) if x is not None else None for x in (cache.k, cache.v, lengths)),
            *(x.to(device) if x is not None else None for x in (cache.block_table, None, None)),
            *(x.to(device) if x is not None else None for x in (cache.k_scale, cache.v_scale)),
        )
        options = {"bias": fastattn.alibi(slopes.to(device)), "sinks": sinks.to(device), "softcap": 4.0}
        found = []
        for mask, some in ((fastattn.causal(), {}), (fastattn.sliding_window(150, 0), options)):
            found += attention_with_kv_cache(
                q.to(device), moved, mask=mask, return_lse=True, backend=backend, **some
            )
        return [x.cpu() for x in found]

    tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for found, want in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(found, want, **tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
def test_a_step_on_a_gpu_does_not_wait_for_it() -> None:
    cache = long_cache(torch.bfloat16, 16, torch.tensor([600, 3, 300]), 640)
    cache = KVCache(cache.k.cuda(), cache.v.cuda(), cache.lengths.cuda(), cache.block_table.clamp(0).cuda())
    q, k, v = (torch.randn(3, n, 1, d).bfloat16().cuda() for n, d in ((6, 24), (2, 24), (2, 17)))
    attention_with_kv_cache(q, cache, k, v, mask=fastattn.causal())  # what is loaded at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_with_kv_cache(q, cache, k, v, mask=fastattn.causal())
    finally:
        torch.cuda.set_sync_debug_mode("default")
