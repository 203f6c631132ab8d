"""torch's own attention in a graph: `scaled_dot_product_attention` and `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn.compiler
from fastattn.compiler.backend import backend

B, H, L, D = 2, 4, 11, 8
SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def compiled(call: Any) -> Any:
    return torch.compile(call, backend=partial(backend, then="eager"), fullgraph=True)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check(call: Any, given: list[Tensor]) -> None:
    ours, theirs = compiled(call)(*given), call(*given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


FOUR = [(B, H, L, D)] * 3
CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], str]] = {
    "plain": (SDPA, FOUR, "no mask"),
    "causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True, scale=0.3), FOUR, "causal"),
    "causal_top_left": (
        lambda q, k, v: SDPA(q, k, v, is_causal=True),
        [(B, H, L, D), (B, H, L + 4, D), (B, H, L + 4, D)],
        "causal",
    ),
    "causal_tensor": (
        lambda q, k, v: SDPA(q, k, v, attn_mask=torch.ones(L, L, dtype=torch.bool).tril()),
        FOUR,
        "causal",
    ),
    "window": (
        lambda q, k, v: SDPA(q, k, v, attn_mask=torch.ones(L, L).tril().triu(-3).log()),
        FOUR,
        "window of 3 before and 0 behind",
    ),
    "bias": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), [*FOUR, (H, L, L)], "bias"),
    "three_dimensions": (SDPA, [(B, L, D)] * 3, "no mask"),
    "five_dimensions": (SDPA, [(B, 3, H, L, D)] * 3, "no mask"),
    "grouped": (
        lambda q, k, v: SDPA(q, k, v, enable_gqa=True),
        [(B, H, L, D), (B, 2, L, D), (B, 2, L, D)],
        "no mask",
    ),
    "broadcast_heads": (SDPA, [(B, H, L, D), (B, 1, L, D), (B, 1, L, D)], "no mask"),
    "other_width": (SDPA, [(B, H, L, D), (B, H, L, D), (B, H, L, 5)], "no mask"),
}


@pytest.mark.parametrize("name", CALLS)
def test_sdpa(name: str) -> None:
    call, shapes, words = CALLS[name]
    check(call, tensors(*shapes))
    (record,) = fastattn.compiler.report().records
    assert record.rewritten, record.reason
    assert record.mask == words


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights_not_used": {"need_weights": True},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(L), "is_causal": True},
    "bool": {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(2)},
    "per_head": {"attn_mask": torch.randn(B * H, L, L)},
    "padding": {"key_padding_mask": torch.arange(L)[None] >= torch.tensor([[L], [L - 3]])},
    "both": {
        "key_padding_mask": torch.where(torch.arange(L)[None] >= torch.tensor([[L], [4]]), -torch.inf, 0.0),
        "attn_mask": torch.randn(L, L),
    },
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(name: str, batch_first: bool) -> None:
    model = nn.MultiheadAttention(H * D, H, batch_first=batch_first)
    given = {"need_weights": False, **MASKS[name]}
    x = torch.randn((B, L, H * D) if batch_first else (L, B, H * D), requires_grad=True)
    check(lambda x: model(x, x, x, **given)[0], [x])
    (record,) = fastattn.compiler.report().records
    assert record.rewritten, record.reason


@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention_across(bias: bool) -> None:
    model = nn.MultiheadAttention(H * D, H, bias=bias)
    check(lambda q, k: model(q, k, k, need_weights=False)[0], tensors((L, B, H * D), (L + 3, B, H * D)))
    assert fastattn.compiler.report().rewritten == 1


@pytest.mark.parametrize(
    ("made", "asked", "reason"),
    [
        ({"add_bias_kv": True}, {"need_weights": False}, "bias_k is given"),
        ({"add_zero_attn": True}, {"need_weights": False}, "add_zero_attn is given"),
    ],
)
def test_multihead_attention_that_is_left(made: Any, asked: Any, reason: str) -> None:
    model = nn.MultiheadAttention(H * D, H, **made)
    check(lambda x: model(x, x, x, **asked)[0], tensors((L, B, H * D)))
    assert reason in str(fastattn.compiler.report())


def test_weights_that_are_asked_for() -> None:
    model = nn.MultiheadAttention(H * D, H)
    x = torch.randn(L, B, H * D)
    for ours, theirs in zip(compiled(model)(x, x, x), model(x, x, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert "the weights are asked for" in str(fastattn.compiler.report())
