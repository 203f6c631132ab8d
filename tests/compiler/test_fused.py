"""What the pass fuses besides attention: spellings that it must find, look-alikes it must leave, models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn.compiler
from fastattn.compiler.backend import backend
from fastattn.compiler.fused import matches
from tests.compiler.models import LENGTH, MODELS, arguments, output, without_dropout

WIDTH, HIDDEN, VOCABULARY = 16, 24, 50


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()
    monkeypatch.setattr(matches, "_FEW", 0)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=partial(backend, then="aot_eager"), **options)


def done() -> dict[str, int]:
    found: dict[str, int] = {}
    for one in fastattn.compiler.report().fusions:
        if one.rewritten:
            found[one.kind] = found.get(one.kind, 0) + 1
    return found


def reasons() -> str:
    return "; ".join(one.reason for one in fastattn.compiler.report().fusions if not one.rewritten)


def same_results(module: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Outputs, the gradients of all inputs and parameters, compiled and not."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    run = compiled(module, **options)

    def results(call: Any) -> list[Tensor]:
        found = call(*leaves)
        outs = [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]
        total = sum(
            (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outs if x.requires_grad
        )
        wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        return [*outs, *(torch.zeros(1) if g is None else g for g in grads)]

    for ours, theirs in zip(results(run), results(module), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max().clamp(min=1))
        )


class Layers(nn.Module):
    """Linear layers for `body`, which is given them and x."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.body(self, x, *rest)


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


MLPS: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda m, x: m.out(F.gelu(m.a(x))),
    "module": lambda m, x: m.out(nn.GELU(approximate="tanh")(m.a(x))),
    "written out": lambda m, x: m.out(new_gelu(m.a(x))),
    "by erf": lambda m, x: m.out((u := m.a(x)) * 0.5 * (1.0 + torch.erf(u / math.sqrt(2.0)))),
    "silu written out": lambda m, x: m.out((u := m.a(x)) * torch.sigmoid(u)),
    "relu": lambda m, x: m.out(m.a(x).relu()),
    "relu squared": lambda m, x: m.out(F.relu(m.a(x)) ** 2),
    "swiglu": lambda m, x: m.out(F.silu(m.a(x)) * m.b(x)),
    "geglu, other order": lambda m, x: m.out(m.b(x) * F.gelu(m.a(x))),
    "views between": lambda m, x: m.out(F.gelu(m.a(x).view(-1, HIDDEN)).view(2, -1, HIDDEN)),
    "addmm": lambda m, x: torch.addmm(
        m.out.bias, F.gelu(torch.addmm(m.a.bias, x.view(-1, WIDTH), m.a.weight.t())), m.out.weight.t()
    ),
    "dropout of nothing": lambda m, x: m.out(F.dropout(F.gelu(m.a(x)), 0.0)),
}


@pytest.mark.parametrize("name", MLPS)
def test_spellings_of_an_mlp(name: str) -> None:
    same_results(Layers(MLPS[name]), torch.randn(2, 5, WIDTH), fullgraph=True)
    assert done().get("MLP") == 1, fastattn.compiler.report()


NOT_MLPS: dict[str, Callable[..., Any]] = {
    "another gelu": lambda m, x: m.out((u := m.a(x)) * torch.sigmoid(1.702 * u)),
    "nearly relu": lambda m, x: m.out(F.relu(m.a(x)) * 1.0001),
    "hidden returned": lambda m, x: (m.out(h := F.gelu(m.a(x))), h),
    "input of the activation returned": lambda m, x: (m.out(F.gelu(u := m.a(x))), u),
    "of different tensors": lambda m, x: m.out(F.silu(m.a(x)) * m.b(x * 2)),
    "three factors": lambda m, x: m.out(F.silu(m.a(x)) * m.b(x) * m.b(x + 1)),
    "the other clamped": lambda m, x: m.out(F.silu(m.a(x)) * m.b(x).clamp(-7, 7)),
    "relu of what is clamped": lambda m, x: m.out(F.relu(m.a(x).clamp(max=20))),
    "clamped far away": lambda m, x: m.out((F.relu(u := m.a(x)) - F.relu(u - 2e4)) * 1.0),
    "another gradient at 0": lambda m, x: m.out(0.5 * ((u := m.a(x * 0) * 0) + u.abs())),
    "no gradient at 0": lambda m, x: m.out(0.5 * ((u := m.a(x)) + (u * u).sqrt())),
    "a gate for all": lambda m, x: m.out(F.silu(m.a(x)) * F.linear(x, m.b.weight[:1])),
    "a gate from one": lambda m, x: m.out(m.a(x) * F.silu(F.linear(x, m.b.weight[:1]))),
}


@pytest.mark.parametrize("name", NOT_MLPS)
def test_look_alikes_of_an_mlp(name: str) -> None:
    same_results(Layers(NOT_MLPS[name]), 40 * torch.randn(2, 5, WIDTH))
    assert "MLP" not in done()
    assert reasons()


def test_an_mlp_with_dropout_inside_is_left() -> None:
    module = Layers(lambda m, x: m.out(F.dropout(F.gelu(m.a(x)), 0.5, m.training)))
    compiled(module)(torch.randn(3, WIDTH))
    assert "MLP" not in done()
    assert "dropout is between" in reasons()
    module.eval()
    same_results(module, torch.randn(3, WIDTH))
    assert done()["MLP"] == 1


def test_an_mlp_whose_gradient_stops_half_way_is_left() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = F.gelu(m.a(x))
        return m.out(h)

    same_results(Layers(body), torch.randn(3, WIDTH))
    assert "MLP" not in done()


NORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "sum and norm": (lambda m, x, r: (m.norm(x + r), x), "dropout + add + layer norm"),
    "the sum goes on": (lambda m, x, r: m.norm(z := r + x) + z, "dropout + add + layer norm"),
    "dropout of nothing": (lambda m, x, r: m.norm(r + F.dropout(x, 0.0)), "dropout + add + layer norm"),
    "norm alone": (lambda m, x, r: m.norm(x * 2), ""),
    "broadcast": (lambda m, x, r: m.norm(x + r[:1]), ""),
    "a factor": (lambda m, x, r: m.norm(torch.add(x, r, alpha=2)), ""),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    body, kind = NORMS[name]
    same_results(Layers(body), torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH))
    assert done() == ({kind: 1} if kind else {}), fastattn.compiler.report()


def test_a_norm_of_what_is_written_into_is_left() -> None:
    same_results(Layers(lambda m, x: m.norm((x * 1).add_(1))), torch.randn(2, 5, WIDTH))
    assert not done()
    assert "written into" in reasons()


def test_dropout_before_a_norm_drops_its_share() -> None:
    module = Layers(lambda m, x, r: (m.norm(z := r + F.dropout(x, 0.25)), z))
    x = torch.ones(64, 128, WIDTH)
    out, z = compiled(module)(x, torch.zeros_like(x))
    assert done() == {"dropout + add + layer norm": 1}
    assert set(z.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float((z == 0).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / x.numel())
    torch.testing.assert_close(out, module.norm(z))


def test_dropout_that_others_see_is_kept() -> None:
    module = Layers(lambda m, x, r: (m.norm(r + (d := F.dropout(x, 0.5))), d))
    out, dropped = compiled(module)(torch.randn(8, WIDTH), torch.randn(8, WIDTH) * 0)
    assert done() == {"dropout + add + layer norm": 1}
    assert torch.any(dropped == 0)
    torch.testing.assert_close(out, module.norm(dropped))


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "plain": (lambda m, x, y: F.cross_entropy(m.head(x), y), "linear + cross entropy"),
    "views and a cast": (
        lambda m, x, y: F.cross_entropy(m.head(x[None]).float().view(-1, VOCABULARY), y.view(-1)),
        "linear + cross entropy",
    ),
    "options": (
        lambda m, x, y: F.cross_entropy(m.head(x), y, ignore_index=3, reduction="sum", label_smoothing=0.1),
        "linear + cross entropy",
    ),
    "each": (lambda m, x, y: F.cross_entropy(m.head(x), y, reduction="none"), "linear + cross entropy"),
    "logits returned": (
        lambda m, x, y: (F.cross_entropy(z := m.head(x), y), z),
        "cross entropy",
    ),
    "shifted": (lambda m, x, y: F.cross_entropy(m.head(x)[1:], y[1:]), "cross entropy"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    body, kind = LOSSES[name]
    same_results(Layers(body), torch.randn(7, WIDTH), torch.randint(VOCABULARY, (7,)))
    assert done().get(kind) == 1, fastattn.compiler.report()
    if name == "logits returned":
        assert "its logits are used elsewhere, or returned" in reasons()


NOT_LOSSES: dict[str, Callable[..., Any]] = {
    "class weights": lambda m, x, y: F.cross_entropy(m.head(x), y, weight=torch.ones(VOCABULARY)),
    "probabilities": lambda m, x, y: F.cross_entropy(m.head(x), F.one_hot(y, VOCABULARY).float()),
    "more dimensions": lambda m, x, y: F.cross_entropy(
        m.head(x).view(7, 5, 10), y[:, None].expand(7, 10) % 5
    ),
}


@pytest.mark.parametrize("name", NOT_LOSSES)
def test_other_losses(name: str) -> None:
    same_results(Layers(NOT_LOSSES[name]), torch.randn(7, WIDTH), torch.randint(VOCABULARY, (7,)))
    assert not {"cross entropy", "linear + cross entropy"} & set(done())
    assert reasons()


def test_a_loss_of_half_precision_keeps_its_dtype() -> None:
    module = Layers(lambda m, x, y: F.cross_entropy(m.head(x), y)).bfloat16()
    x, y = torch.randn(7, WIDTH).bfloat16(), torch.randint(VOCABULARY, (7,))
    found = compiled(module)(x, y)
    assert done() == {"linear + cross entropy": 1}
    torch.testing.assert_close(found, module(x, y))


def test_an_mlp_before_a_loss_leaves_it_its_layer() -> None:
    module = Layers(lambda m, x, y: F.cross_entropy(m.out(F.gelu(m.a(x))), y))
    same_results(module, torch.randn(7, WIDTH), torch.randint(WIDTH, (7,)))
    assert done() == {"linear + cross entropy": 1, "linear": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, torch.ones(5, WIDTH), torch.ones(1)),
        lambda x: torch.addmm(torch.ones(1), x, torch.ones(WIDTH, 5)),
    ],
)
def test_a_bias_that_is_broadcast_is_left(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(compiled(call)(x), call(x))
    assert not done()
    assert "broadcast" in reasons()


def test_what_failed_leaves_nothing_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no layout")

    monkeypatch.setattr(matches, "as_it_lay", fails)
    graphs = []

    def look(graph: Any, given: Any) -> Any:
        backend(graph, given, then="eager")
        graphs.append(str(graph.graph))
        return graph

    torch.compile(Layers(lambda m, x: m.out(F.gelu(m.a(x)))), backend=look)(torch.randn(3, WIDTH))
    assert "unexpected RuntimeError: no layout" in reasons()
    assert "rewritten" not in graphs[0]


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "linear": torch.func.vmap(lambda t: F.linear(t, torch.ones(8, WIDTH))),
    "gradient": torch.func.grad(lambda t: F.linear(t, torch.ones(8, WIDTH)).pow(3).sum()),
    "loss": torch.func.vmap(lambda t: F.cross_entropy(t, torch.arange(3))),
    "norm": torch.func.vmap(lambda t: F.layer_norm(t + 1 + t, (WIDTH,))),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_is_inside_a_transform_is_left(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        return TRANSFORMED[name](x * 1)

    x = torch.randn(4, 3, WIDTH)
    torch.testing.assert_close(compiled(f)(x), f(x))
    assert not done()
    assert "functorch" in reasons()


def test_sums_and_norms_lie_as_they_did() -> None:
    def f(x: Tensor, r: Tensor) -> Any:
        z = x.transpose(1, 2) + r.transpose(1, 2)
        return F.layer_norm(z, (WIDTH,)), z, z.transpose(1, 2).view(2, -1)

    given = torch.randn(2, WIDTH, 5), torch.randn(2, WIDTH, 5)
    for a, b in zip(compiled(f)(*given), f(*given), strict=True):
        torch.testing.assert_close(a, b, check_stride=True)
    assert done() == {"dropout + add + layer norm": 1}


def test_tensors_of_subclasses_are_left() -> None:
    module = Layers(lambda m, x: m.out(F.gelu(m.a(x))))
    given = [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    nested = torch.nested.nested_tensor(given, layout=torch.jagged)
    found = compiled(module)(nested)
    torch.testing.assert_close(found.values(), module(nested).values())
    assert not done()
    assert "subclass" in reasons()


def test_writes_to_what_is_given_by_name() -> None:
    def f(x: Tensor) -> Tensor:
        return F.relu(input=x * 1, inplace=True)

    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(compiled(f)(x), f(x))


def test_linear_layers_of_float32_under_autocast_say_why_they_are_left() -> None:
    module = Layers(lambda m, x: m.a(x) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(module)(torch.randn(3, WIDTH))
    assert not done()
    assert "autocast" in reasons()


def test_what_is_no_mlp_is_not_reported() -> None:
    same_results(Layers(lambda m, x: m.a(x * m.norm.weight)), torch.randn(3, WIDTH))
    assert done() == {"linear": 1}
    assert not reasons()


def test_linear_layers_and_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Layers(lambda m, x: m.a(x) + 1)
    same_results(module, torch.randn(3, WIDTH))
    assert done() == {"linear": 1}
    monkeypatch.setattr(matches, "_FEW", 1 << 22)
    torch._dynamo.reset()
    fastattn.compiler.reset_report()
    module = Layers(lambda m, x, y: F.cross_entropy(m.out(F.gelu(m.a(x))) + 1, y))
    compiled(module)(torch.randn(3, WIDTH), torch.randint(WIDTH, (3,)))
    assert done() == {}
    assert not reasons()


def test_what_is_written_into_is_left() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        u = m.a(x)
        u += 1
        return m.out(F.gelu(u))

    same_results(Layers(body), torch.randn(3, WIDTH))
    assert "MLP" not in done()


HITS = {
    "gpt2": {"MLP": 2, "dropout + add + layer norm": 4},
    "bert": {"MLP": 2, "dropout + add + layer norm": 4},
    "llama": {"MLP": 2},
}


@pytest.mark.parametrize("name", HITS)
def test_models(name: str) -> None:
    pytest.importorskip("transformers")
    model = without_dropout(MODELS[name][0]()).train()
    given = arguments(name, LENGTH)
    run = compiled(model, fullgraph=True, dynamic=True)
    weights = torch.linspace(-1, 1, output(model(*given[0], **given[1])).numel())

    def results(call: Any) -> list[Tensor]:
        model.zero_grad()
        out = output(call(*given[0], **given[1]))
        (out.flatten() * weights).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        return [out.detach(), *grads]

    for a, b in zip(results(run), results(model), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5 * float(b.abs().max().clamp(min=1)))
    found = done()
    assert {kind: found.get(kind) for kind in HITS[name]} == HITS[name], fastattn.compiler.report()
