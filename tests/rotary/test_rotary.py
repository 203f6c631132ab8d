"""Rotary embedding against a loop over positions and pairs in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.rotary import rotary

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tables(rows: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * 3.0 ** -torch.arange(half, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(row: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One vector [D], one pair of its dimensions after the other."""
    out, half = row.double().clone(), cos.shape[0]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        c, s = float(cos[i]), float(sin[i])
        out[a] = float(row[a]) * c - float(row[b]) * s
        out[b] = float(row[a]) * s + float(row[b]) * c
    return out


def by_rows(x: Tensor, cos: Tensor, sin: Tensor, positions: list[list[int]], interleaved: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        p = positions[b][i]
        out[b, h, i] = turned(x[b, h, i], cos[p], sin[p], interleaved)
    return out


def close(found: Tensor, want: Tensor) -> None:
    """One rounding to the dtype, and of a product and a sum before it in float32."""
    assert found.shape == want.shape
    wide = torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps
    band = (torch.finfo(found.dtype).eps + 8 * wide) * want.abs().clamp(min=1)
    assert bool(((found.double() - want).abs() <= band).all())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "half"), [(8, 4), (7, 2), (10, 1), (5, 2)])
def test_against_a_loop(dim: int, half: int, dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, dim).to(dtype)
    cos, sin = tables(20, half, dtype)
    for start, positions in (
        (0, [[0, 1, 2, 3, 4]] * 2),
        (15, [[15, 16, 17, 18, 19]] * 2),
        (torch.tensor([3, 11], dtype=torch.int32), [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]]),
    ):
        found = rotary(x, cos, sin, start=start, interleaved=interleaved)
        assert found.dtype == dtype
        close(found, by_rows(x, cos, sin, positions, interleaved))
    ids = torch.tensor([[7, 0, 7, 19, 2], [1, 2, 3, 0, 1]])
    close(
        rotary(x, cos, sin, positions=ids, interleaved=interleaved),
        by_rows(x, cos, sin, ids.tolist(), interleaved),
    )
    close(
        rotary(x, cos, sin, positions=ids[:1], interleaved=interleaved),
        by_rows(x, cos, sin, ids[:1].tolist() * 2, interleaved),
    )


def test_dimensions_behind_the_tables_pass_through() -> None:
    x = torch.randn(1, 2, 6, 9).to(torch.bfloat16)
    found = rotary(x, *tables(6, 3), interleaved=True)
    assert torch.equal(found[..., 6:], x[..., 6:])
    assert not torch.equal(found[..., :6], x[..., :6])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 4, torch.tensor([2, 0, 9, 1])], ids=["0", "4", "each"])
def test_packed(start: int | Tensor, interleaved: bool) -> None:
    cu = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    x, (cos, sin) = torch.randn(9, 2, 8), tables(16, 3, torch.float32)
    found = rotary(x, cos, sin, cu_seqlens=cu, start=start, interleaved=interleaved)
    for n in range(4):
        first, end = int(cu[n]), int(cu[n + 1])
        own = int(start[n]) if isinstance(start, Tensor) else start
        alone = x[None, first:end].transpose(1, 2)
        want = rotary(alone, cos, sin, start=own, interleaved=interleaved)[0].transpose(0, 1)
        assert torch.equal(found[first:end], want)


def test_packed_what_is_behind_the_last_sequence_is_left() -> None:
    x = torch.randn(7, 2, 8)
    found = rotary(x, *tables(5, 4), cu_seqlens=torch.tensor([0, 2, 4]), start=torch.tensor([1, 2]))
    assert torch.equal(found[4:], x[4:])
    assert not torch.equal(found[:4], x[:4])


def test_packed_by_positions() -> None:
    cu, ids = torch.tensor([0, 3, 7]), torch.tensor([0, 1, 2, 0, 1, 2, 3])
    x, (cos, sin) = torch.randn(7, 2, 8), tables(5, 4)
    assert torch.equal(rotary(x, cos, sin, positions=ids), rotary(x, cos, sin, cu_seqlens=cu))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    x = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.requires_grad_() for t in tables(9, 2))
    start = torch.tensor([0, 5])

    def f(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary(x, cos, sin, start=start, interleaved=interleaved)

    assert torch.autograd.gradcheck(f, (x, cos, sin))
    assert torch.autograd.gradgradcheck(f, (x, cos, sin))


def test_scores_go_by_the_distance_of_positions() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    cos, sin = tables(64, 4)
    scores = [
        float((rotary(q, cos, sin, start=p) * rotary(k, cos, sin, start=p - 5)).sum()) for p in (5, 17, 63)
    ]
    assert math.isclose(scores[0], scores[1], abs_tol=1e-9)
    assert math.isclose(scores[0], scores[2], abs_tol=1e-9)


def test_a_view_of_heads_last_memory() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    cos, sin = tables(5, 4)
    assert torch.equal(rotary(x, cos, sin), rotary(x.contiguous(), cos, sin))


def test_nothing_to_rotate() -> None:
    cos, sin = tables(3, 2)
    assert rotary(torch.empty(2, 1, 0, 4), cos, sin, start=torch.tensor([0, 9])).shape == (2, 1, 0, 4)
    assert rotary(torch.empty(0, 1, 4), cos, sin, cu_seqlens=torch.tensor([0])).shape == (0, 1, 4)


def test_backward_keeps_only_the_angles() -> None:
    """x itself, the largest thing here, is not held for backward."""
    x, (cos, sin) = torch.randn(1, 8, 64, 32, requires_grad=True), tables(64, 16, torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        rotary(x, cos, sin)
    assert saved
    assert max(saved) <= cos.numel()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_without_recompiling(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    cos, sin = tables(80, 4, torch.float32)

    def f(x: Tensor, start: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(x, cos, sin, start=start), rotary(x[0].transpose(0, 1), cos, sin, cu_seqlens=cu)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for length, first in ((6, 0), (13, 40), (33, 7)):
        x, start = torch.randn(2, 3, length, 8), torch.tensor([first, 9])
        cu = torch.tensor([0, 4, length])
        for found, want in zip(compiled(x, start, cu), f(x, start, cu), strict=True):
            torch.testing.assert_close(found, want)
    assert counter.frame_count == 1


def test_vmap() -> None:
    x, start = torch.randn(3, 2, 2, 5, 8), torch.tensor([[0, 1], [4, 2], [3, 3]])
    cos, sin = tables(9, 4)
    found = torch.vmap(lambda x, s: rotary(x, cos, sin, start=s))(x, start)
    want = torch.stack([rotary(x[i], cos, sin, start=start[i]) for i in range(3)])
    assert torch.equal(found, want)


X, COS = torch.zeros(2, 3, 5, 8), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, COS, COS), {"start": 5}, ValueError, "from 0 to 8 .cos has 9 rows., got start 5 and 5"),
        ((X, COS, COS), {"start": -1}, ValueError, "got start -1"),
        ((X, COS, COS), {"start": torch.tensor([0, 5])}, ValueError, "got 0 to 9"),
        ((X, COS, COS), {"start": torch.tensor([0, -2])}, ValueError, "got -2 to 4"),
        (
            (X, COS, COS),
            {"start": torch.tensor([0])},
            ValueError,
            "start=.*expected shape .B. = .2., got .1.",
        ),
        ((X, COS, COS), {"start": torch.tensor([0.0, 1.0])}, TypeError, "integer tensor, got torch.float32"),
        ((X, COS, COS[:5]), {}, ValueError, "one shape"),
        ((X, COS[0], COS[0]), {}, ValueError, "one shape"),
        ((X[..., :6], COS, COS), {}, ValueError, "expected 1 to 3 columns .* got 4"),
        ((X[0], COS, COS), {}, ValueError, "or .T, H, D. with cu_seqlens"),
        ((X, COS, COS), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens .* with x"),
        ((X[0], COS, COS), {"cu_seqlens": torch.tensor([0.0])}, TypeError, "cu_seqlens=.*integer"),
        ((X[0], COS[:2], COS[:2]), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "got 0 to 2"),
        ((X, COS, COS), {"positions": torch.zeros(3, 5).long()}, ValueError, "batch of 2 or 1, got 3"),
        ((X, COS, COS), {"positions": torch.zeros(2, 4).long()}, ValueError, "L = 5, got"),
        ((X, COS, COS), {"positions": torch.zeros(1, 5).long(), "start": 1}, ValueError, "not both"),
        ((X.long(), COS, COS), {}, TypeError, "floating dtype, got torch.int64"),
        ((X, COS.bool(), COS), {}, TypeError, "cos.*floating dtype, got torch.bool"),
        ((X, None, COS), {}, TypeError, "cos.*expected a tensor, got NoneType"),
        ((X, COS.to("meta"), COS), {}, ValueError, "x's device cpu, got meta"),
    ],
)
def test_errors(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rotary(*arguments, **options)


def test_tables_that_grew_in_inference_mode_train() -> None:
    module = fastattn.nn.RotaryEmbedding(8, max_length=4)
    with torch.inference_mode():
        module(torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8))
    q = torch.randn(1, 1, 10, 8, requires_grad=True)
    module(q, q)[0].sum().backward()


def test_gradients_of_each_sample_by_positions() -> None:
    cos, sin = tables(9, 4, torch.float32)
    x, positions = torch.randn(3, 1, 2, 5, 8), torch.randint(9, (3, 1, 5))

    def loss(x: Tensor, positions: Tensor) -> Tensor:
        return rotary(x, cos, sin, positions=positions).pow(3).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x, positions)
    want = torch.stack([torch.func.grad(loss)(a, b) for a, b in zip(x, positions, strict=True)])
    torch.testing.assert_close(found, want)
