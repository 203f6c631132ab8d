"""bert_padding, layers.rotary and modules.mha of the flash_attn door."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from fastattn.integrations.flash_attn import bert_padding, mha, rotary
from tests.integrations import flash_attn_oracle as oracle
from tests.integrations.flash_attn_oracle import assert_close

SIGNATURES = {
    bert_padding.unpad_input: "(hidden_states, attention_mask, unused_mask=None)",
    bert_padding.pad_input: "(hidden_states, indices, batch, seqlen)",
    bert_padding.unpad_input_for_concatenated_sequences: "(hidden_states, attention_mask_in_length)",
    bert_padding.index_first_axis: "(input, indices)",
    bert_padding.index_put_first_axis: "(values, indices, first_axis_dim)",
    rotary.apply_rotary_emb: "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, "
    "cu_seqlens=None, max_seqlen=None)",
    rotary.apply_rotary_emb_qkv_: "(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, "
    "seqlen_offsets=0, num_heads_q=None)",
    rotary.apply_rotary_emb_kv_: "(kv, cos, sin, interleaved=False, seqlen_offsets=0)",
    rotary.apply_rotary: "(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, "
    "interleaved=False, inplace=False, conjugate=False)",
    rotary.RotaryEmbedding: "(dim, base=10000.0, interleaved=False, scale_base=None, device=None)",
    rotary.RotaryEmbedding.forward: "(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, "
    "num_heads_q=None)",
    mha.FlashSelfAttention: "(causal=False, softmax_scale=None, attention_dropout=0.0, "
    "window_size=(-1, -1), alibi_slopes=None, deterministic=False)",
    mha.FlashSelfAttention.forward: "(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None)",
    mha.FlashCrossAttention: "(causal=False, softmax_scale=None, attention_dropout=0.0, "
    "alibi_slopes=None, window_size=(-1, -1), deterministic=False)",
    mha.FlashCrossAttention.forward: "(self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, "
    "cu_seqlens_k=None, max_seqlen_k=None)",
    mha.get_alibi_slopes: "(nheads)",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature_is_flash_attns(function: object) -> None:
    given = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    found = str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert found == SIGNATURES[function]


@pytest.mark.parametrize("rest", [(), (4,), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_unpad_and_pad(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    x = torch.randn(3, 4, *rest, dtype=torch.float64, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 7]
    assert type(longest) is int and longest == 4
    assert used.dtype == torch.int32 and used.tolist() == [3, 0, 4]
    padded = bert_padding.pad_input(tokens, indices, 3, 4)
    # transformers makes int32 indices of its own.
    assert torch.equal(bert_padding.pad_input(tokens, indices.int(), 3, 4), padded)
    assert torch.equal(padded, x * mask.view(3, 4, *[1] * len(rest)))
    (gradient,) = torch.autograd.grad((padded * 3).sum(), x)
    assert torch.equal(gradient, (3.0 * mask.double()).view(3, 4, *[1] * len(rest)).expand_as(x))


def test_unpad_with_places_that_are_not_used() -> None:
    mask, unused = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 0]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(torch.randn(1, 4, 2), mask, unused)
    assert len(tokens) == 3 and indices.tolist() == [0, 1, 2] and cu_seqlens.tolist() == [0, 3]
    assert longest == 3 and used.tolist() == [2]


def test_unpad_of_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6


def test_index_first_axis_adds_up_gradients() -> None:
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    found, residual = bert_padding.index_first_axis_residual(x, torch.tensor([2, 2, 0]))
    assert torch.equal(residual, x)
    (gradient,) = torch.autograd.grad(found.sum() + residual.sum(), x)
    assert gradient[:, 0].tolist() == [2.0, 1.0, 3.0, 1.0]


def tables(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([7, 0])], ids=str)
def test_rotary(offsets: int | Tensor, interleaved: bool, inplace: bool) -> None:
    leaf = torch.randn(2, 9, 3, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(20, 5)
    start = torch.as_tensor(offsets).expand(2)
    exact = oracle.rotated(leaf, cos, sin, start[:, None] + torch.arange(9), interleaved)
    x = leaf * 1
    found = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    assert (found is x) == inplace
    assert_close(found, exact)
    dout = torch.randn_like(exact)
    assert_close(*(torch.autograd.grad(y, leaf, dout)[0] for y in (found, exact)))
    back = rotary.apply_rotary(found.detach(), cos, sin, offsets, interleaved=interleaved, conjugate=True)
    assert_close(back, leaf)


def test_rotary_of_packed_sequences() -> None:
    x = torch.randn(11, 3, 16, dtype=torch.float64)
    cos, sin = tables(20, 8)
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    found = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=2, cu_seqlens=cu_seqlens, max_seqlen=7)
    position = torch.cat((torch.arange(4), torch.arange(7))) + 2
    assert_close(found, oracle.rotated(x[None], cos, sin, position[None], False)[0])


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("layout", ["qkv", "heads", "q, kv"])
def test_rotary_embedding(layout: str, scale_base: float | None) -> None:
    module = rotary.RotaryEmbedding(8, scale_base=scale_base)
    qkv = torch.randn(2, 5, 3, 4, 16)
    x = qkv.clone()
    if layout == "qkv":
        found = module(x, seqlen_offset=2)
        assert found is x
    elif layout == "heads":
        x = x.flatten(2, 3)
        found = module(x, seqlen_offset=2, num_heads_q=4)
        assert found is x
        found = found.unflatten(2, (3, 4))
    else:
        q, kv = x[:, :, 0].clone(), x[:, :, 1:].clone()
        q, kv = module(q, kv, seqlen_offset=2)
        found = torch.cat((q[:, :, None], kv), 2)
    angle = torch.outer(torch.arange(7.0), 10_000.0 ** -(torch.arange(0, 8, 2) / 8))
    position = (torch.arange(5) + 2).expand(2, 5)
    scale = torch.ones(7, 1)
    if scale_base is not None:
        base = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
        scale = base ** ((torch.arange(7) - 7 // 2) / scale_base)[:, None]
    q = oracle.rotated(qkv[:, :, 0], angle.cos() * scale, angle.sin() * scale, position, False)
    k = oracle.rotated(qkv[:, :, 1], angle.cos() / scale, angle.sin() / scale, position, False)
    torch.testing.assert_close(found, torch.stack((q, k, qkv[:, :, 2]), 2), atol=1e-5, rtol=1e-5)
    assert not module.state_dict()


def test_rotary_embedding_in_a_model() -> None:
    """q and k are views of a projection: the rotation in place has its gradient, in half precision too."""
    weight = torch.randn(48, 16, dtype=torch.bfloat16, requires_grad=True)
    module = rotary.RotaryEmbedding(8).to(torch.bfloat16)
    qkv = (torch.randn(2, 5, 16, dtype=torch.bfloat16) @ weight.t()).view(2, 5, 3, 2, 8)
    module(qkv).float().square().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0
    # A frequency rounded to bfloat16 would be off by whole turns here.
    far = module(torch.ones(1, 1, 3, 1, 8, dtype=torch.bfloat16), seqlen_offset=4095)
    want = math.cos(4095 * 10_000**-0.25) - math.sin(4095 * 10_000**-0.25)
    assert abs(float(far[0, 0, 0, 0, 1]) - want) < 0.02


def test_rotary_embedding_with_offsets_of_each_sequence() -> None:
    module, q = rotary.RotaryEmbedding(8), torch.randn(2, 1, 3, 4, 8)
    with pytest.raises(ValueError, match="max_seqlen"):
        module(q, seqlen_offset=torch.tensor([1, 5]))
    found = module(q.clone(), seqlen_offset=torch.tensor([1, 5]), max_seqlen=8)
    for b, start in enumerate((1, 5)):
        assert torch.equal(found[b], module(q[b : b + 1].clone(), seqlen_offset=start)[0])


def test_rotary_errors() -> None:
    cos, sin = tables(4, 4)
    with pytest.raises(ValueError, match="positions"):
        rotary.apply_rotary_emb(torch.ones(1, 5, 1, 8), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q"):
        rotary.apply_rotary_emb_qkv_(torch.ones(1, 3, 6, 8), cos, sin)
    with pytest.raises(ValueError, match="num_heads_k"):
        rotary.apply_rotary_emb_qkv_(torch.ones(1, 3, 7, 8), cos, sin, num_heads_q=4)
    with pytest.raises(ValueError, match="kv"):
        rotary.apply_rotary_emb_kv_(torch.ones(1, 3, 3, 2, 8), cos, sin)


def test_alibi_slopes() -> None:
    assert mha.get_alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert mha.get_alibi_slopes(12) == [2.0**-n for n in range(1, 9)] + [
        2.0**-n for n in (0.5, 1.5, 2.5, 3.5)
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_modules(packed: bool, training: bool) -> None:
    slopes = torch.rand(4, dtype=torch.float32)
    options = {"causal": True, "attention_dropout": 0.5, "window_size": (6, 0), "alibi_slopes": slopes}
    own, cross = mha.FlashSelfAttention(**options), mha.FlashCrossAttention(**options)
    qkv = torch.randn(*(11, 3, 4, 16) if packed else (2, 11, 3, 4, 16))
    q, kv = qkv.select(-3, 0), qkv.narrow(-3, 1, 2)
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    where = {"cu_seqlens": bounds, "max_seqlen": 7} if packed else {}
    k_where = {"cu_seqlens_k": bounds, "max_seqlen_k": 7} if packed else {}
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(own.train(training)(qkv, **where))
        torch.manual_seed(0)
        found.append(cross.train(training)(q, kv, **where, **k_where))
    assert all(torch.equal(x, found[0]) for x in found)
    parts = (slice(0, 4), slice(4, 11)) if packed else (slice(0, 1), slice(1, 2))
    exact = torch.cat(
        [
            oracle.attention(
                *(x[None] if packed else x for x in qkv[part].unbind(-3)),
                causal=True,
                window_size=(6, 0),
                alibi_slopes=slopes,
            )[0].flatten(0, 1)
            for part in parts
        ]
    )
    same = torch.isclose(found[0].flatten(0, -3).double(), exact, atol=1e-5).all()
    assert bool(same) != training
    assert not own.state_dict()
    assert torch.equal(own.eval()(qkv, causal=False, **where), own(qkv, causal=False, **where))


def test_module_errors() -> None:
    qkv, bounds = torch.randn(11, 3, 4, 16), torch.tensor([0, 4, 11])
    with pytest.raises(ValueError, match="max_seqlen"):
        mha.FlashSelfAttention()(qkv, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        mha.FlashCrossAttention()(qkv[:, 0], qkv[:, 1:], cu_seqlens=bounds, max_seqlen=7)
