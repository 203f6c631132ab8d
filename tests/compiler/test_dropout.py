"""Dropout is the graph's own, drawn anew at every call, with the mean and variance of the naive code's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.compiler
from fastattn.compiler.backend import backend


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def naive(q: Tensor, k: Tensor, v: Tensor, p: float, training: bool = True) -> Tensor:
    probs = ((q @ k.mT) * 0.25).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e9).softmax(-1)
    return F.dropout(probs, p=p, training=training) @ v


def draws(call: object, q: Tensor, k: Tensor, v: Tensor, p: float, times: int) -> Tensor:
    return torch.stack([call(q, k, v, p) for _ in range(times)])  # type: ignore[operator]


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_same_distribution(then: str) -> None:
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    compiled = torch.compile(naive, backend=partial(backend, then=then), fullgraph=True)
    times, p = 600, 0.3
    ours, theirs = (draws(call, q, k, v, p, times) for call in (compiled, naive))
    assert fastattn.compiler.report().rewritten == 1
    assert fastattn.compiler.report().records[0].dropout == p
    exact = naive(q, k, v, 0.0)
    spread = theirs.std(0).mean() / times**0.5
    assert (ours.mean(0) - exact).abs().mean() < 2 * spread
    assert (ours.std(0) / theirs.std(0)).mean() == pytest.approx(1, abs=0.03)
    assert len({float(x.sum()) for x in ours}) > times // 2  # another draw at each call


def test_torch_generator_decides() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    compiled = torch.compile(naive, backend=partial(backend, then="aot_eager"), fullgraph=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(compiled(q, k, v, 0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_forward_and_backward_drop_the_same() -> None:
    q, k = (torch.randn(1, 2, 9, 8) for _ in range(2))
    v = torch.eye(9)[None, None].expand(1, 2, 9, 9).clone().requires_grad_()
    compiled = torch.compile(naive, backend=partial(backend, then="aot_eager"), fullgraph=True)
    probs = compiled(q, k, v, 0.5)  # with values of one, the dropped probabilities themselves
    (grad,) = torch.autograd.grad(probs, v, torch.ones_like(probs))
    torch.testing.assert_close(grad, probs.sum(2)[..., None].expand_as(grad))


def test_no_dropout_in_evaluation() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    compiled = torch.compile(naive, backend=partial(backend, then="eager"), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, 0.5, False), naive(q, k, v, 0.0))
    assert fastattn.compiler.report().records[0].dropout == 0
