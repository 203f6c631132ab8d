"""flash_attn_with_kvcache against plain PyTorch: appending, rotating, paging, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn.integrations.flash_attn as door
from tests.integrations import flash_attn_oracle as oracle
from tests.integrations.flash_attn_oracle import assert_close

BATCH, HEADS, KV_HEADS, DIM, CAPACITY = 3, 4, 2, 16, 40


class Case:
    """Queries, new keys and a cache that is NaN where it holds nothing, in one of the three forms."""

    def __init__(
        self, form: str, q_length: int, new: int, page_size: int = 8, dtype: torch.dtype = torch.float64
    ) -> None:
        self.lengths = torch.tensor([0, 13, 29], dtype=torch.int32)
        self.q = torch.randn(BATCH, q_length, HEADS, DIM, dtype=dtype)
        shape = (BATCH, new, KV_HEADS, DIM)
        self.new = [torch.randn(shape, dtype=dtype) if new else None for _ in range(2)]
        self.old = [torch.randn(BATCH, CAPACITY, KV_HEADS, DIM, dtype=dtype) for _ in range(2)]
        unused = torch.arange(CAPACITY) >= self.lengths[:, None]
        for x in self.old:
            x[unused] = torch.nan
        self.where: dict[str, Tensor] = {}
        if form == "rows":
            self.caches = [x.clone() for x in self.old]
        elif form == "indexed":
            self.where["cache_batch_idx"] = torch.tensor([4, 0, 2], dtype=torch.int32)
            self.caches = [x.new_full((5, *x.shape[1:]), torch.nan) for x in self.old]
            for cache, x in zip(self.caches, self.old, strict=True):
                cache[self.where["cache_batch_idx"].long()] = x
        else:
            columns = CAPACITY // page_size
            table = torch.randperm(BATCH * columns + 3)[: BATCH * columns].view(BATCH, columns)
            self.where["block_table"] = table.to(torch.int32)
            self.caches = [
                x.new_full((BATCH * columns + 3, page_size, *x.shape[2:]), torch.nan) for x in self.old
            ]
            for cache, x in zip(self.caches, self.old, strict=True):
                cache[table] = x.unflatten(1, (columns, page_size))

    def stored(self) -> list[Tensor]:
        """What the caches hold for each sequence, ``(BATCH, CAPACITY, KV_HEADS, DIM)``."""
        if "block_table" in self.where:
            return [cache[self.where["block_table"].long()].flatten(1, 2) for cache in self.caches]
        rows = self.where.get("cache_batch_idx", torch.arange(BATCH)).long()
        return [cache[rows] for cache in self.caches]

    def check(
        self,
        rotary: tuple[Tensor, Tensor, bool] | None = None,
        leftpad: Tensor | None = None,
        slopes: Tensor | None = None,
        **options: object,
    ) -> None:
        """One step of ours, and of the oracle on the concatenation."""
        given = dict(options)
        if rotary is not None:
            given |= dict(
                zip(("rotary_cos", "rotary_sin", "rotary_interleaved"), rotary, strict=True)  # type: ignore[arg-type]
            )
        before = self.lengths.clone()
        out, lse = door.flash_attn_with_kvcache(
            self.q,
            *self.caches,
            *self.new,
            cache_seqlens=self.lengths,
            cache_leftpad=leftpad,
            alibi_slopes=slopes,
            **given,
            **self.where,
            return_softmax_lse=True,
        )
        assert torch.equal(self.lengths, before)
        q, (k, v) = self.q, self.new
        if rotary is not None:
            start = self.lengths.long()
            window = options.get("window_size", (-1, -1))
            together = not options.get("causal") and all(size < 0 or size >= CAPACITY for size in window)  # type: ignore[attr-defined]
            own = torch.zeros(q.shape[1]) if together else torch.arange(q.shape[1])
            q = oracle.rotated(q, *rotary[:2], start[:, None] + own.long(), rotary[2])
            k = oracle.rotated(k, *rotary[:2], start[:, None] + torch.arange(k.shape[1]), rotary[2])
        for b, length in enumerate(self.lengths.tolist()):
            keys, values = (x[b, :length] for x in self.old)
            if k is not None:
                keys, values = torch.cat((keys, k[b])), torch.cat((values, v[b]))
            for found, want in zip(self.stored(), (keys, values), strict=True):
                assert_close(found[b, : len(want)], want, "cache")
                assert found[b, len(want) :].isnan().all()
            first = 0 if leftpad is None else int(leftpad[b])
            own_slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            exact = oracle.attention(
                q[b, None], keys[None, first:], values[None, first:], alibi_slopes=own_slopes, **options
            )
            assert_close(out[b, None], exact[0], "out")
            assert_close(lse[b, None], exact[1], "lse")


def tables(half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(CAPACITY, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("q_length, new", [(1, 1), (4, 4), (1, 0), (3, 5), (6, 2)], ids=str)
@pytest.mark.parametrize("form", ["rows", "indexed", "pages"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (5, 1), "softcap": 2.0}, {"causal": True, "softmax_scale": 0.3}],
    ids=str,
)
def test_steps(form: str, q_length: int, new: int, options: dict[str, object]) -> None:
    # float64 is the reference backend's; float32 the kernels' where there are any.
    for dtype in (torch.float64, torch.float32):
        Case(form, q_length, new, dtype=dtype).check(**options)


@pytest.mark.parametrize("half, interleaved", [(8, True), (3, False)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (9, 0)},
        {"window_size": (CAPACITY, CAPACITY + 3)},
        {"window_size": (-1, CAPACITY)},
        {"window_size": (CAPACITY - 1, CAPACITY)},
    ],
    ids=str,
)
@pytest.mark.parametrize("q_length, new", [(1, 1), (4, 4), (3, 5)], ids=str)
def test_rotary(q_length: int, new: int, options: dict[str, object], half: int, interleaved: bool) -> None:
    Case("pages", q_length, new).check((*tables(half), interleaved), **options)


def test_rotary_is_interleaved_by_default() -> None:
    found = []
    for given in ({}, {"rotary_interleaved": True}):
        torch.manual_seed(0)
        case, (cos, sin) = Case("rows", 1, 1), tables(8)
        where = {"cache_seqlens": case.lengths, "rotary_cos": cos, "rotary_sin": sin}
        found.append(door.flash_attn_with_kvcache(case.q, *case.caches, *case.new, **where, **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["rows", "indexed", "pages"])
def test_left_padding(form: str) -> None:
    leftpad = torch.tensor([0, 5, 29], dtype=torch.int32)
    rotary = (*tables(4), False)
    Case(form, 2, 2).check(rotary, leftpad, causal=True)


@pytest.mark.parametrize("shape", [(HEADS,), (BATCH, HEADS)], ids=str)
def test_alibi(shape: tuple[int, ...]) -> None:
    slopes = torch.rand(shape)
    Case("pages", 3, 3, dtype=torch.float32).check(slopes=slopes, causal=True)
    Case("pages", 3, 3).check(slopes=slopes.double(), causal=True)


@pytest.mark.parametrize("page_size", [1, 5, 40])
def test_any_page_size(page_size: int) -> None:
    Case("pages", 1, 1, page_size).check()


def test_one_length_for_all_and_the_whole_cache() -> None:
    q = torch.randn(2, 3, 4, 8)
    k_cache, v_cache = torch.randn(2, 2, 20, 4, 8)
    want = door.flash_attn_func(q, k_cache[:, :11], v_cache[:, :11], causal=True)
    found = door.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=11, causal=True)
    assert_close(found, want.double())
    want = door.flash_attn_func(q, k_cache, v_cache, causal=True)
    for splits in (0, 1, 7):
        found = door.flash_attn_with_kvcache(q, k_cache, v_cache, causal=True, num_splits=splits)
        assert_close(found, want.double())


def test_generation_is_the_whole_sequence() -> None:
    q, k, v = torch.randn(3, 2, 12, 4, 8)
    k_cache, v_cache = torch.full((2, 2, 16, 4, 8), torch.nan)
    steps = []
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, 12)):
        part = slice(start, stop)
        steps.append(
            door.flash_attn_with_kvcache(
                q[:, part], k_cache, v_cache, k[:, part], v[:, part], cache_seqlens=start, causal=True
            )
        )
    assert_close(torch.cat(steps, 1), door.flash_attn_func(q, k, v, causal=True).double())


@pytest.mark.parametrize("form, says", [("pages", "block_table"), ("rows", "40")])
def test_an_overflow_raises_and_writes_nothing(form: str, says: str) -> None:
    case = Case(form, 1, 1)
    case.lengths[1] = CAPACITY
    before = [x.clone() for x in case.caches]
    with pytest.raises(RuntimeError, match=says):
        door.flash_attn_with_kvcache(
            case.q, *case.caches, *case.new, cache_seqlens=case.lengths, **case.where
        )
    for x, y in zip(case.caches, before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"v": None}, "k, v: expected both"),
        ({"cache_seqlens": None}, "cache_seqlens: expected with k"),
        ({"rotary_cos": torch.ones(40, 4)}, "rotary_cos, rotary_sin: expected both"),
        (
            {"k": None, "v": None, "rotary_cos": torch.ones(40, 4), "rotary_sin": torch.ones(40, 4)},
            "rotary_cos: expected with new keys",
        ),
        ({"q": torch.ones(3, 4, 16)}, "q: expected"),
    ],
)
def test_errors(change: dict[str, object], says: str) -> None:
    case = Case("rows", 1, 1)
    given = {"q": case.q, "k_cache": case.caches[0], "v_cache": case.caches[1]}
    given |= {"k": case.new[0], "v": case.new[1], "cache_seqlens": case.lengths}
    with pytest.raises(ValueError, match=says):
        door.flash_attn_with_kvcache(**(given | change))


def test_a_gradient_raises() -> None:
    case = Case("rows", 1, 1)
    case.q.requires_grad_()
    out = door.flash_attn_with_kvcache(case.q, *case.caches, *case.new, cache_seqlens=case.lengths)
    with pytest.raises(RuntimeError, match="no gradient"):
        out.sum().backward()


def test_compiles_to_one_graph() -> None:
    case, (cos, sin) = Case("pages", 1, 1), tables(8)

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        found = door.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, lengths, block_table=case.where["block_table"], causal=True
        )
        assert isinstance(found, Tensor)
        return found

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    caches = [x.clone() for x in case.caches]
    want = step(case.q, *case.new, case.lengths, *case.caches)
    assert_close(compiled(case.q, *case.new, case.lengths, *caches), want)
    for x, y in zip(caches, case.caches, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_explain_tells_the_kernel_and_appends_nothing() -> None:
    case = Case("pages", 1, 1)
    before = [x.clone() for x in case.caches]
    found = door.explain(
        door.flash_attn_with_kvcache,
        case.q,
        *case.caches,
        *case.new,
        cache_seqlens=case.lengths,
        causal=True,
        **case.where,
    )
    assert found.backend == "reference"
    for x, y in zip(case.caches, before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
