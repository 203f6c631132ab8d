"""Packed sequences and jagged nested tensors against each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.varlen import nested_attention, varlen_attention
from fastattn.testing import present_isas

# Nested tensors are a prototype, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
BACKENDS = ["reference", *(["cpu"] if present_isas() else [])]
LENGTHS = (5, 0, 1, 37, 12)
K_LENGTHS = (7, 3, 1, 20, 0)


def cu(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(q_lengths: tuple[int, ...] = LENGTHS, k_lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    shapes = ((sum(q_lengths), 4, 8), (sum(k_lengths), 2, 8), (sum(k_lengths), 2, 5))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def alone(x: Tensor, bounds: Tensor, n: int) -> Tensor:
    return x[int(bounds[n]) : int(bounds[n + 1])].transpose(0, 1)[None]


OPTIONS: dict[str, Any] = {
    "plain": {},
    "causal": {"mask": fastattn.causal()},
    "top left": {"mask": fastattn.causal("top_left")},
    "window": {"mask": fastattn.sliding_window(3, 1), "softcap": 1.5},
    "prefix": {"mask": fastattn.causal() | fastattn.prefix(2), "scale": 0.4},
    "alibi": {"bias": fastattn.alibi(torch.linspace(0.1, 1, 4)), "sinks": torch.linspace(-1, 1, 4)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k_lengths", [None, K_LENGTHS], ids=["self", "cross"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_as_it_is_alone(name: str, k_lengths: tuple[int, ...] | None, backend: str) -> None:
    options = OPTIONS[name]
    q, k, v = leaves = packed(k_lengths=k_lengths or LENGTHS)
    cu_q, cu_k = cu(LENGTHS), cu(k_lengths or LENGTHS)
    found = varlen_attention(
        q, k, v, cu_q, None if k_lengths is None else cu_k, return_lse=True, backend=backend, **options
    )
    outs, lses = [], []
    for n in range(len(LENGTHS)):
        each = (alone(q, cu_q, n), alone(k, cu_k, n), alone(v, cu_k, n))
        out, lse = fastattn.attention(*each, return_lse=True, backend=backend, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    want = torch.cat(outs), torch.cat(lses, 1)
    assert found[0].shape == (sum(LENGTHS), 4, 5)
    assert found[1].shape == (4, sum(LENGTHS))
    torch.testing.assert_close(found, want)

    dout, dlse = torch.randn_like(want[0]), torch.randn_like(want[1])
    grads = []
    for out, lse in (found, want):
        loss = (out * dout).sum() + torch.where(lse.isinf(), 0.0, lse * dlse).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_behind_the_last_sequence(backend: str) -> None:
    q, k, v = packed()
    out, lse = varlen_attention(q, k, v, cu((5, 4)), return_lse=True, backend=backend)
    assert bool((out[9:] == 0).all())
    assert bool((lse[:, 9:] == float("-inf")).all())
    assert bool(lse[:, :9].isfinite().all())
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool((x.grad[9:] == 0).all())


def test_without_lse_and_with_int64_bounds() -> None:
    q, k, v = packed()
    out = varlen_attention(q, k, v, cu(LENGTHS, torch.int64))
    assert torch.equal(out, varlen_attention(q, k, v, cu(LENGTHS), return_lse=True)[0])


def test_out_is_contiguous_where_heads_are_merged() -> None:
    out = varlen_attention(*packed(), cu(LENGTHS))
    if "cpu" in BACKENDS:
        assert out.is_contiguous()
    assert out.flatten(1).shape == (sum(LENGTHS), 20)


def test_compile_without_recompiling() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, mask=fastattn.causal())

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    frames = 0
    for lengths in ((4, 9), (20, 3), (1, 40)):
        leaves = packed(lengths, lengths)
        results = [(g(*leaves, cu(lengths)), leaves) for g in (f, compiled)]
        torch.testing.assert_close(results[0][0], results[1][0])
        grads = [torch.autograd.grad(out.sin().sum(), x) for out, x in results]
        torch.testing.assert_close(*grads)
        # Dynamo may begin its first frame anew.
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def jagged(lengths: tuple[int, ...], heads: int, dim: int) -> tuple[Tensor, list[Tensor]]:
    parts = [torch.randn(n, heads, dim) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True), parts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cross", [False, True])
def test_nested(cross: bool, backend: str) -> None:
    k_lengths = tuple(n + 2 for n in LENGTHS) if cross else LENGTHS
    (q, q_parts), (k, k_parts), (v, v_parts) = (
        jagged(LENGTHS, 4, 8),
        jagged(k_lengths, 2, 8),
        jagged(k_lengths, 2, 5),
    )
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = nested_attention(*turned, mask=fastattn.causal(), return_lse=True, backend=backend)
    for x in (out, lse):
        assert x.is_nested
        assert x.size(0) == len(LENGTHS)
        assert x.size(1) == 4
    found, losses = list(zip(out.transpose(1, 2).unbind(), lse.transpose(1, 2).unbind(), strict=True)), []
    torch.autograd.backward(out.values().sin().sum() + lse.values().nan_to_num(neginf=0).sum())
    for n, one in enumerate(zip(q_parts, k_parts, v_parts, strict=True)):
        each = [x.transpose(0, 1)[None].detach().requires_grad_() for x in one]
        want, want_lse = fastattn.attention(*each, mask=fastattn.causal(), return_lse=True, backend=backend)
        torch.testing.assert_close(found[n], (want[0].transpose(0, 1), want_lse[0].transpose(0, 1)))
        (want.sin().sum() + want_lse.sum()).backward()
        losses.append([x.grad[0].transpose(0, 1) for x in each])
    for i, x in enumerate((q, k, v)):
        got = x.grad.unbind()
        for n, want in enumerate(losses):
            torch.testing.assert_close(got[n], want[i], atol=2e-5, rtol=2e-5)


def test_nested_like_sdpa() -> None:
    (q, _), (k, _), (v, _) = (jagged((4, 9), 2, 8) for _ in range(3))
    turned = [q.transpose(1, 2)]
    for x in (k, v):
        same = torch.nested.nested_tensor_from_jagged(x.values(), q.offsets(), min_seqlen=4, max_seqlen=9)
        turned.append(same.transpose(1, 2))
    want = torch.nn.functional.scaled_dot_product_attention(*turned)
    found = nested_attention(*turned)
    torch.testing.assert_close(found.values(), want.values())
    assert (found + turned[0]).shape == turned[0].shape  # one and the same ragged dimension


def test_nested_with_holes() -> None:
    x = torch.randn(2, 6, 2, 8)
    holed = torch.nested.narrow(x, 1, torch.tensor([1, 0]), torch.tensor([3, 4]), layout=torch.jagged)
    found = nested_attention(*(holed.transpose(1, 2) for _ in range(3)))
    for got, part in zip(found.transpose(1, 2).unbind(), (x[0, 1:4], x[1, :4]), strict=True):
        own = part.transpose(0, 1)[None]
        torch.testing.assert_close(got, fastattn.attention(own, own, own)[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 9, 4, 8)}, ValueError, r"varlen_attention\(q\): expected \[total, heads"),
        ({"q": None}, TypeError, r"varlen_attention\(q\): expected a tensor, got NoneType"),
        ({"cu_seqlens_q": [0, 9]}, TypeError, "cu_seqlens.*expected an integer tensor, got list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 9.0])}, TypeError, "expected an integer tensor"),
        ({"cu_seqlens_q": torch.tensor([[0, 9]])}, ValueError, "one dimension"),
        ({"cu_seqlens_q": torch.tensor([0, 10])}, ValueError, "from 0 to at most 9"),
        ({"cu_seqlens_q": torch.tensor([0, 7, 5])}, ValueError, "do not decrease"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 9])}, ValueError, "of one shape"),
        ({"q_start": 3}, TypeError, "expected no q_start"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = packed((9,), (9,))
    with pytest.raises(error, match=message):
        varlen_attention(**({"q": q, "k": k, "v": v, "cu_seqlens_q": torch.tensor([0, 9])} | change))


def test_nested_errors() -> None:
    x = jagged((3, 4), 2, 8)[0]
    turned = x.transpose(1, 2)
    with pytest.raises(ValueError, match="transposed"):
        nested_attention(x, x, x)
    with pytest.raises(TypeError, match=r"k: .* got torch.strided, nested: False"):
        nested_attention(turned, torch.zeros(2, 2, 4, 8), turned)
    for mixed in ((torch.zeros(2, 2, 4, 8), turned, turned), (turned, torch.zeros(2, 2, 4, 8), turned)):
        with pytest.raises(
            TypeError, match=r"expected q, k and v nested .* got torch.strided, nested: False"
        ):
            fastattn.attention(*mixed)
    with pytest.raises(TypeError, match=r"layout=torch.jagged, got torch.strided, nested: True"):
        old = torch.nested.nested_tensor([torch.zeros(2, 3, 8)], layout=torch.strided)
        nested_attention(old, old, old)
    with pytest.raises(ValueError, match=r"k, v: .* same lengths, got offsets \[0, 3, 7\] and \[0, 4, 7\]"):
        nested_attention(turned, turned, jagged((4, 3), 2, 8)[0].transpose(1, 2))
    with pytest.raises(ValueError, match="one batch, got 2, 3 and 3 sequences"):
        other = jagged((1, 2, 3), 2, 8)[0].transpose(1, 2)
        nested_attention(turned, other, other)
