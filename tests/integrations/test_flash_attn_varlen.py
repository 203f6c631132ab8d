"""flash_attn_varlen_func, packed forms and pages included, against plain PyTorch sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn.integrations.flash_attn as door
from tests.integrations import flash_attn_oracle as oracle
from tests.integrations.flash_attn_oracle import assert_close

# Queries and keys of each sequence: as many, fewer, more, none.
LENGTHS = [(9, 9), (1, 17), (12, 5), (0, 4), (6, 0), (23, 23)]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(
    lengths: list[tuple[int, int]] = LENGTHS, extra: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], tuple[Tensor, Tensor, int, int]]:
    """q, k and v, `extra` places longer than their sequences, and what says where those are."""
    q_lengths, k_lengths = (list(x) for x in zip(*lengths, strict=True))
    totals = (sum(q_lengths) + extra, sum(k_lengths) + extra)
    shapes = (totals[0], 4, 16), (totals[1], 2, 16), (totals[1], 2, 16)
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return leaves, (cumulative(q_lengths), cumulative(k_lengths), max(q_lengths), max(k_lengths))


def by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[tuple[int, int]],
    slopes: Tensor | None = None,
    pattern: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Each sequence by itself through the oracle; what is behind the last is 0."""
    outs, lses, q_at, k_at = [], [], 0, 0
    for n, (q_length, k_length) in enumerate(lengths):
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[n]
        dropped = None if pattern is None else pattern[n : n + 1, :, :q_length, :k_length] < 0
        keys = slice(k_at, k_at + k_length)
        out, lse, _ = oracle.attention(
            q[None, q_at : q_at + q_length],
            k[None, keys],
            v[None, keys],
            alibi_slopes=own,
            dropped=dropped,
            **options,  # type: ignore[arg-type]
        )
        outs.append(out[0])
        lses.append(lse[0])
        q_at, k_at = q_at + q_length, k_at + k_length
    rest = q[q_at:].shape[0]
    outs.append(outs[0].new_zeros((rest, *outs[0].shape[1:])))
    lses.append(lses[0].new_full((lses[0].shape[0], rest), -torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def check(found: tuple[Tensor, ...], exact: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    assert_close(found[0], exact[0], "out")
    assert_close(found[1], exact[1], "lse")
    dout, dlse = torch.randn_like(exact[0]), torch.randn_like(exact[1])

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return (out.double() * dout).sum() + torch.where(lse.isinf(), 0.0, lse.double() * dlse).sum()

    ours, right = (torch.autograd.grad(loss(*x[:2]), leaves) for x in (found, exact))
    for a, b in zip(ours, right, strict=True):
        assert_close(a, b, "gradient")


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "causal window, softcap": {"causal": True, "window_size": (4, 0), "softcap": 1.5},
    "alibi": {"alibi": 1},
    "causal alibi by sequence": {"alibi": 2, "causal": True},
    "alibi by sequence in a window": {"alibi": 2, "window_size": (4, 4), "softmax_scale": 0.3},
}


@pytest.mark.parametrize(
    "extra, dtype", [(0, torch.float64), (3, torch.float64), (3, torch.float32)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case: str, extra: int, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    leaves, where = inputs(extra=extra, dtype=dtype)
    slopes = None
    alibi = options.pop("alibi", 0)
    if alibi:
        shape = (4,) if alibi == 1 else (len(LENGTHS), 4)
        slopes = torch.rand(shape, dtype=dtype).requires_grad_()
    found = door.flash_attn_varlen_func(
        *leaves, *where, **options, alibi_slopes=slopes, return_attn_probs=True
    )
    total = leaves[0].shape[0]
    assert found[0].shape == (total, 4, 16) and found[1].shape == (4, total) and found[2].numel() == 0
    exact = by_sequence(*leaves, LENGTHS, slopes, **options)
    check(found, exact, leaves if slopes is None else [*leaves, slopes])


@pytest.mark.parametrize("alibi", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dropout_and_its_pattern(dtype: torch.dtype, alibi: int) -> None:
    leaves, where = inputs(dtype=dtype)
    slopes = torch.rand(len(LENGTHS), 4, dtype=dtype) if alibi else None
    options = {"dropout_p": 0.25, "causal": True}
    found = door.flash_attn_varlen_func(
        *leaves, *where, **options, alibi_slopes=slopes, return_attn_probs=True
    )
    pattern = found[2]
    assert pattern.shape == (len(LENGTHS), 4, where[2], where[3])
    for n, (q_length, k_length) in enumerate(LENGTHS):
        own = pattern[n, :, :q_length, :k_length]
        assert pattern[n].count_nonzero() == own.count_nonzero()
        seen = oracle.visible(q_length, k_length, True, (-1, -1)).any(-1)
        assert_close(own.abs().sum(-1)[:, seen], torch.ones(4, int(seen.sum())))
    assert 0.2 < float((pattern < 0).sum() / (pattern != 0).sum()) < 0.3
    check(found, by_sequence(*leaves, LENGTHS, slopes, pattern, **options), leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_packed_tensors(dropout_p: float) -> None:
    bounds = cumulative([7, 0, 14])
    qkv = torch.randn(21, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    options = {"dropout_p": dropout_p, "causal": True}
    torch.manual_seed(1)
    want = door.flash_attn_varlen_func(*qkv.unbind(1), bounds, bounds, 14, 14, **options)
    (gradient,) = torch.autograd.grad(want.square().sum(), qkv)
    torch.manual_seed(1)
    found = door.flash_attn_varlen_qkvpacked_func(qkv, bounds, 14, **options)
    assert torch.equal(found, want)
    assert torch.equal(torch.autograd.grad(found.square().sum(), qkv)[0], gradient)
    torch.manual_seed(1)
    found = door.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], bounds, bounds, 14, 14, **options)
    assert torch.equal(found, want)
    assert torch.equal(torch.autograd.grad(found.square().sum(), qkv)[0], gradient)


def test_longest_as_tensors() -> None:
    leaves, (cu_q, cu_k, q_longest, k_longest) = inputs()
    slopes = torch.rand(len(LENGTHS), 4)
    want = door.flash_attn_varlen_func(*leaves, cu_q, cu_k, q_longest, k_longest, alibi_slopes=slopes)
    longest = torch.tensor(q_longest), torch.tensor(k_longest)
    found = door.flash_attn_varlen_func(*leaves, cu_q, cu_k, *longest, alibi_slopes=slopes)
    assert torch.equal(found, want)


@pytest.mark.parametrize("short", ["q", "k"])
@pytest.mark.parametrize("slopes, dropout_p", [((len(LENGTHS), 4), 0.0), ((4,), 0.5)], ids=str)
def test_a_longest_that_is_not_drops_nothing_in_silence(
    slopes: tuple[int, ...], dropout_p: float, short: str
) -> None:
    leaves, (cu_q, cu_k, q_longest, k_longest) = inputs()
    longest = (q_longest - 1, k_longest) if short == "q" else (q_longest, k_longest - 1)
    options = {"dropout_p": dropout_p, "alibi_slopes": torch.rand(slopes), "return_attn_probs": True}
    with pytest.raises(RuntimeError, match="max_seqlen"):
        door.flash_attn_varlen_func(*leaves, cu_q, cu_k, *longest, **options)


def pages(x: Tensor, lengths: list[int], size: int, columns: int) -> tuple[Tensor, Tensor]:
    """x ``(total, H, D)`` in shuffled pages full of NaN elsewhere, and the table that finds them."""
    count = len(lengths) * columns
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5)).view(len(lengths), columns)
    store = torch.full((count + 2, size, *x.shape[1:]), torch.nan, dtype=x.dtype)
    at = 0
    for row, length in zip(order, lengths, strict=True):
        for j in range(length):
            store[row[j // size], j % size] = x[at + j].detach()
        at += length
    return store, order.to(torch.int32)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("one_query", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pages(dtype: torch.dtype, one_query: bool, size: int) -> None:
    k_lengths = [9, 17, 5, 0, 23]
    q_lengths = [1, 1, 1, 0, 1] if one_query else [9, 3, 8, 2, 1]
    lengths = list(zip(q_lengths, k_lengths, strict=True))
    (q, k, v), where = inputs(lengths, dtype=dtype)
    k_pages, table = pages(k, k_lengths, size, 6)
    v_pages, _ = pages(v, k_lengths, size, 6)
    options = {"causal": True, "window_size": (11, 0), "softcap": 2.0}
    with torch.no_grad():
        found = door.flash_attn_varlen_func(
            q, k_pages, v_pages, *where, **options, return_attn_probs=True, block_table=table
        )
    exact = by_sequence(q, k, v, lengths, **options)
    assert_close(found[0], exact[0], "out")
    assert_close(found[1], exact[1], "lse")


@pytest.mark.parametrize("one_query", [False, True], ids=["prefill", "decode"])
def test_gradients_through_pages(one_query: bool) -> None:
    k_lengths = [9, 17]
    lengths = list(zip([1, 1] if one_query else [5, 3], k_lengths, strict=True))
    (q, k, v), where = inputs(lengths)
    k_pages, table = pages(k, k_lengths, 4, 6)
    v_pages, _ = pages(v, k_lengths, 4, 6)
    k_pages.requires_grad_()
    found = door.flash_attn_varlen_func(q, k_pages, v_pages, *where, causal=True, block_table=table)
    exact, _ = by_sequence(q, k, v, lengths, causal=True)
    dq, dk_pages = torch.autograd.grad(found.square().sum(), (q, k_pages))
    right_dq, dk = torch.autograd.grad(exact.square().sum(), (q, k))
    assert_close(dq, right_dq, "dq")
    expected, _ = pages(dk, k_lengths, 4, 6)
    assert_close(dk_pages, expected.nan_to_num(0.0), "dk")


@pytest.mark.parametrize("one_query", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("wrong", ["too long", "no such page"])
def test_pages_that_are_not_there(one_query: bool, wrong: str) -> None:
    q_lengths = [1, 1] if one_query else [5, 3]
    store = torch.zeros(6, 4, 2, 16)
    table = torch.tensor([[0, 1, 2], [3, 4, 9 if wrong == "no such page" else 5]], dtype=torch.int32)
    k_lengths = [12, 13 if wrong == "too long" else 12]
    where = cumulative(q_lengths), cumulative(k_lengths), max(q_lengths), 13
    q = torch.randn(sum(q_lengths), 4, 16)
    with pytest.raises(RuntimeError, match="block_table"):
        door.flash_attn_varlen_func(q, store, store, *where, block_table=table)


@pytest.mark.parametrize(
    "bounds, error, says",
    [
        ((torch.tensor([0.0, 5.0]), torch.tensor([0, 5])), TypeError, "cu_seqlens"),
        ((torch.tensor([0, 5]), torch.tensor([0, 2, 5])), ValueError, "same number of sequences"),
        ((torch.tensor([0]), torch.tensor([0])), ValueError, "cu_seqlens"),
        ((torch.tensor([0, 6]), torch.tensor([0, 5])), ValueError, "cu_seqlens"),
        ((torch.tensor([0, 5, 3]), torch.tensor([0, 5, 5])), ValueError, "cu_seqlens"),
    ],
)
def test_errors(bounds: tuple[Tensor, Tensor], error: type[Exception], says: str) -> None:
    q = torch.randn(5, 4, 16)
    with pytest.raises(error, match=says):
        door.flash_attn_varlen_func(q, q, q, *bounds, 5, 5)


def test_error_of_a_padded_q() -> None:
    q, bounds = torch.randn(5, 4, 16), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"q: expected \(total, nheads, headdim\)"):
        door.flash_attn_varlen_func(q[None], q, q, bounds, bounds, 5, 5)


def test_compiles_to_one_graph_for_all_lengths() -> None:
    frames = 0

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        nonlocal frames
        frames += 1
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor) -> Tensor:
        out = door.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ([5, 9, 7], [20, 3, 11], [1, 1, 30]):
        leaves, (cu_q, _, longest, _) = inputs([(n, n) for n in lengths])
        given = *leaves, cu_q, torch.tensor(longest)
        want, found = step(*given), compiled(*given)
        assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (found, want)), strict=True):
            assert_close(a, b)
    assert frames == 1


def test_pages_compile_and_are_still_checked() -> None:
    def step(q: Tensor, store: Tensor, cu_q: Tensor, cu_k: Tensor, table: Tensor) -> Tensor:
        return door.flash_attn_varlen_func(q, store, store, cu_q, cu_k, 3, 12, causal=True, block_table=table)

    q, store, table = torch.randn(5, 4, 8), torch.randn(6, 4, 2, 8), torch.arange(6).view(2, 3).int()
    given = q, store, cumulative([2, 3])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    fits = cumulative([9, 7])
    assert_close(compiled(*given, fits, table), step(*given, fits, table))
    with pytest.raises(RuntimeError, match="block_table"):
        compiled(*given, cumulative([13, 7]), table)


@pytest.mark.parametrize("alibi", [1, 2])
def test_explain_tells_the_kernel(alibi: int) -> None:
    leaves, (cu_q, cu_k, q_longest, k_longest) = inputs()
    where = cu_q, cu_k, q_longest, k_longest
    q, k, v = (x.detach() for x in leaves)
    slopes = torch.rand(4) if alibi == 1 else torch.rand(len(LENGTHS), 4)
    found = door.explain(door.flash_attn_varlen_func, q, k, v, *where, alibi_slopes=slopes)
    assert found.backend == "reference"
    kv = torch.stack((k, v), 1)
    assert door.explain(door.flash_attn_varlen_kvpacked_func, q, kv, *where).backend == "reference"
    qkv = torch.stack((q, q, q), 1)
    found = door.explain(door.flash_attn_varlen_qkvpacked_func, qkv, cu_q, q_longest, causal=True)
    assert found.backend == "reference"
