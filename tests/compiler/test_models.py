"""Whole models: every attention is replaced, with the same outputs and gradients, for any length at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn.compiler
from fastattn.compiler.backend import backend
from tests.compiler.models import LENGTH, MODELS, arguments, gpt2, output, without_dropout

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def results(call: Any, model: nn.Module, given: Any) -> list[Tensor]:
    model.zero_grad()
    out = output(call(*given[0], **given[1]))
    if model.training:
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach(), *grads]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_site(name: str, train: bool) -> None:
    make, sites, takes_padding = MODELS[name]
    model = without_dropout(make()).train(train)
    for padding in ("", "left") if takes_padding else ("",):
        torch._dynamo.reset()
        fastattn.compiler.reset_report()
        with torch.set_grad_enabled(train):
            compiled = torch.compile(model, backend=partial(backend, then="eager"), fullgraph=True)
            given = arguments(name, LENGTH, padding)
            close(results(compiled, model, given), results(model, model, given))
        found = fastattn.compiler.report()
        wanted = 0 if name == "encoder_layer" and not train else sites  # torch's own fused layer
        assert (found.rewritten, found.seen) == (wanted, wanted), found


@pytest.mark.parametrize(
    ("name", "padding"), [("gpt2", ""), ("gemma", "left"), ("nano", ""), ("encoder_layer", "")]
)
def test_dynamic_lengths_compile_once(name: str, padding: str) -> None:
    make, sites, _ = MODELS[name]
    model = without_dropout(make()).train()
    compiled = torch.compile(model, backend=partial(backend, then="aot_eager"), dynamic=True)
    for length in (LENGTH, 14):
        given = arguments(name, length, padding)
        close(results(compiled, model, given), results(model, model, given))
    found = fastattn.compiler.report()
    assert (found.rewritten, found.seen) == (sites, sites), found


def squares(call: Any, given: Any) -> int:
    """How many tensors of L × L numbers are kept for backward."""
    kept: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output(call(*given[0], **given[1]))
    return sum(shape[-2:] == (LENGTH, LENGTH) for shape in kept if len(shape) > 1)


@pytest.mark.parametrize("name", ["gpt2", "bert", "x_transformer"])
def test_no_square_is_kept_for_backward(name: str) -> None:
    model = MODELS[name][0]().train()
    given = arguments(name, LENGTH)
    compiled = torch.compile(model, backend=partial(backend, then="aot_eager"), fullgraph=True)
    assert squares(model, given) > 0
    assert squares(compiled, given) == 0


def test_probabilities_that_are_asked_for() -> None:
    model = gpt2().eval()
    given = arguments("gpt2", LENGTH)
    compiled = torch.compile(model, backend=partial(backend, then="eager"))
    out = compiled(*given[0], **given[1], output_attentions=True)
    assert len(out.attentions) == 2
    found = fastattn.compiler.report()
    assert found.rewritten == 0
    assert "the probabilities have another user" in str(found)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_autocast(name: str) -> None:
    model = without_dropout(MODELS[name][0]()).train()
    given = arguments(name, LENGTH, "right")
    compiled = torch.compile(model, backend=partial(backend, then="aot_eager"))
    exact = output(model(*given[0], **given[1]))
    with torch.autocast("cpu", torch.bfloat16):
        naive, ours = output(model(*given[0], **given[1])), output(compiled(*given[0], **given[1]))
    assert fastattn.compiler.report().rewritten == 2
    assert ours.dtype == naive.dtype
    assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max()


def test_bfloat16() -> None:
    model = without_dropout(MODELS["llama"][0]()).train()
    given = arguments("llama", LENGTH)
    exact = output(model(*given[0], **given[1]))
    model = model.bfloat16()
    compiled = torch.compile(model, backend=partial(backend, then="aot_eager"))
    naive, ours = (output(call(*given[0], **given[1])) for call in (model, compiled))
    assert fastattn.compiler.report().rewritten == 2
    assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max()


def test_activation_checkpointing() -> None:
    """The regions of a checkpoint are rewritten too; dropout drops the same when it is computed again."""
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = arguments("gpt2", LENGTH)
    compiled = torch.compile(model, backend=partial(backend, then="aot_eager"), fullgraph=True)
    weight = model.h[1].attn.c_attn.weight
    direction = torch.randn_like(weight)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return output(compiled(*given[0], **given[1])).square().sum()

    model.zero_grad()
    loss().backward()
    slope = float((weight.grad * direction).sum())
    found = fastattn.compiler.report()
    assert (found.rewritten, found.seen) == (2, 2), found
    assert {record.mask for record in found.records} == {"causal"}
    with torch.no_grad():
        values = []
        for step in (1e-2, -1e-2):
            weight += step * direction
            values.append(float(loss()))
            weight -= step * direction
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=0.05)


def test_graph_break_is_named() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODELS["nano"][0]()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner[0](x)
            torch._dynamo.graph_break()
            return self.inner[1](y)

    found = fastattn.compiler.explain_model(Broken(), torch.randn(2, LENGTH, 32))
    assert found.rewritten == 2
    assert len(found.graph_breaks) == 1
    assert "graph break, 1 ×" in str(found)
