"""`merge_attention`: partial results over disjoint keys are together the result over all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.merge import merge_attention


def qkv(length: int = 33, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 5, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def parts(
    q: Tensor, k: Tensor, v: Tensor, cuts: list[int], keep: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """`attention` over the keys between each two of `cuts`."""
    found = [
        fastattn.attention(
            q, k[:, :, a:b], v[:, :, a:b], mask=keep[..., a:b], return_lse=True, backend="reference"
        )
        for a, b in pairwise(cuts)
    ]
    return [out for out, _ in found], [lse for _, lse in found]


def holed(length: int = 33) -> Tensor:
    """Causal, with rows that are empty in some parts, and one that is empty in all."""
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    keep[20, :11] = False
    keep[7] = False
    return keep


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("cuts", [[0, 33], [0, 1, 33], [0, 11, 11, 22, 33], [0, 32, 33]], ids=str)
def test_parts_make_the_whole(cuts: list[int], stacked: bool) -> None:
    """Values and all gradients, those through lse included."""
    results = []
    for whole in (True, False):
        q, k, v = qkv()
        outs, lses = parts(q, k, v, [0, 33] if whole else cuts, holed())
        if whole:
            out, lse = outs[0], lses[0]
        elif stacked:
            out, lse = merge_attention(torch.stack(outs), torch.stack(lses))
        else:
            out, lse = merge_attention(outs, lses)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        (out.sin().sum() + finite.square().sum()).backward()
        results.append([out.detach(), lse.detach(), q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert (results[1][0][:, :, 7] == 0).all() and (results[1][1][:, :, 7] == float("-inf")).all()
    assert all(x.isfinite().all() for x in results[1][2:])


def test_merging_one_by_one_is_merging_at_once() -> None:
    """As ring attention does."""
    outs, lses = parts(*qkv(), [0, 4, 20, 21, 33], holed())
    out, lse = outs[0], lses[0]
    for one_out, one_lse in zip(outs[1:], lses[1:], strict=True):
        out, lse = merge_attention((out, one_out), (lse, one_lse))
    for a, b in zip((out, lse), merge_attention(outs, lses), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(1)
    outs = torch.randn(3, 2, 4, 5, generator=g, dtype=torch.float64)
    lses = torch.randn(3, 2, 4, generator=g, dtype=torch.float64) * 3
    lses[1, 0] = lses[:, 1, 2] = float("-inf")
    finite = lses.isfinite()

    def call(outs: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_attention(outs, lses.masked_scatter(finite, some))
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    inputs = (outs.requires_grad_(), lses[finite].requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_an_empty_part_has_no_part_in_it() -> None:
    """Whatever its out holds (kernels leave it unwritten), and whatever gradient reaches its lse."""
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    nothing, never = torch.full_like(out, float("nan")).requires_grad_(), torch.full_like(lse, float("-inf"))
    never.requires_grad_()
    merged, total = merge_attention([nothing, out, nothing], [never, lse, never])
    assert torch.equal(merged, out)
    torch.testing.assert_close(total, lse)
    (merged.square().sum() + total.exp().sum()).backward()
    assert (nothing.grad == 0).all() and (never.grad == 0).all()

    merged, total = merge_attention([nothing, nothing], [never, never])
    assert (merged == 0).all() and (total == float("-inf")).all()
    nothing.grad = never.grad = None
    (merged.sum() + torch.logaddexp(total, total).exp().sum()).backward()
    assert (nothing.grad == 0).all() and (never.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_summed_in_float32(dtype: torch.dtype) -> None:
    """64 equal parts: one rounding in all, not one a part."""
    outs = torch.randn(64, 2, 5, 8).to(dtype)
    lses = torch.randn(64, 2, 5)
    out, lse = merge_attention(outs, lses)
    want, want_lse = merge_attention(outs.double(), lses.double())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, want.to(dtype)) or (out - want).abs().max() <= torch.finfo(dtype).eps
    torch.testing.assert_close(lse, want_lse.float())


def test_far_apart_log_sum_exps_do_not_overflow() -> None:
    lses = torch.tensor([[-3e4], [2e4], [2e4]]).requires_grad_()
    out, lse = merge_attention(torch.tensor([[[1.0]], [[2.0]], [[4.0]]]), lses)
    assert out.item() == 3.0 and lse.item() == pytest.approx(2e4 + 0.6931, abs=2e-3)
    (out + lse).sum().backward()
    torch.testing.assert_close(lses.grad, torch.tensor([[0.0], [0.0], [1.0]]))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    outs, lses = parts(*qkv(), [0, 9, 33], holed())
    outs, lses = [x.detach() for x in outs], [x.detach() for x in lses]
    compiled = torch.compile(merge_attention, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(outs, lses), merge_attention(outs, lses), strict=True):
        torch.testing.assert_close(a, b)


def test_errors() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"as many outs as lses, at least one, got 0 and 0"):
        merge_attention([], [])
    with pytest.raises(ValueError, match=r"got 2 and 1"):
        merge_attention([out, out], [lse])
    with pytest.raises(ValueError, match=r"outs: expected one shape, got \[\[2, 3, 4\], \[2, 3, 5\]\]"):
        merge_attention([out, torch.zeros(2, 3, 5)], [lse, lse])
    with pytest.raises(ValueError, match=r"lses: expected outs' shape without .*\[2, 3\], got \[3, 2\]"):
        merge_attention([out], [lse.T])
    with pytest.raises(TypeError, match=r"outs: expected one floating dtype"):
        merge_attention([out, out.half()], [lse, lse])
    with pytest.raises(TypeError, match=r"lses: expected one floating dtype"):
        merge_attention([out], [lse.long()])
