"""`fastattn.mlp`, forward and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _backends
from fastattn.ops.activations import FUNCTIONS, NAMES
from fastattn.ops.philox import drop_threshold, dropout_keep
from fastattn.testing import assert_within_budget, force_isa, operation_errors, present_isas

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = present_isas()
TRITON = not _backends.unavailable("triton")
WHERE = ["reference", *(f"cpu-{isa}" for isa in ISAS), *(["triton"] if TRITON else [])]
KERNELS = [where for where in WHERE if where != "reference"]
needs_library = pytest.mark.skipif(not ISAS, reason="no C++ library")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    if isa:
        with force_isa(isa):
            yield name
    else:
        yield name


def layers(rows: int, width: int, hidden: int, dtype: torch.dtype, gated: bool) -> dict[str, Tensor | None]:
    scale = width**-0.5
    return {
        "x": torch.randn(rows, width).to(dtype),
        "w1": (torch.randn(hidden, width) * scale).to(dtype),
        "b1": torch.randn(hidden).to(dtype),
        "w2": (torch.randn(width + 3, hidden) * hidden**-0.5).to(dtype),
        "b2": torch.randn(width + 3).to(dtype),
        "gate": (torch.randn(hidden, width) * scale).to(dtype) if gated else None,
        "gate_bias": torch.randn(hidden).to(dtype) if gated else None,
        "residual": torch.randn(rows, width + 3).to(dtype),
    }


def given_of(inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if x is not None}


def plain(activation: str, dropout: float = 0.0, seed: int = 0) -> Callable[..., Tensor]:
    """The equation with every intermediate in the inputs' dtype."""

    def run(
        x: Any, w1: Any, b1: Any, w2: Any, b2: Any, residual: Any, gate: Any = None, gate_bias: Any = None
    ) -> Tensor:
        u, f = x @ w1.t() + b1, FUNCTIONS[activation]
        h = f(u) if gate is None else f(x @ gate.t() + gate_bias) * u
        out = h @ w2.t() + b2
        if dropout:
            keep = dropout_keep(torch.tensor([seed]), dropout, (1, 1, *out.shape))[0, 0]
            out = out * keep * (65536 / (65536 - drop_threshold(dropout)))
        return out + residual

    return run


def ours(activation: str, backend: str, **options: Any) -> Callable[..., Tensor]:
    def run(
        x: Any, w1: Any, b1: Any, w2: Any, b2: Any, residual: Any, gate: Any = None, gate_bias: Any = None
    ) -> Tensor:
        third = None if gate is None else (gate, gate_bias)
        own = {"gate": third, "residual": residual, "backend": backend, **options}
        return fastattn.mlp(x, w1, b1, w2, b2, activation, **own)

    return run


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("backend", WHERE, indirect=True)
def test_every_activation(backend: str, activation: str, gated: bool) -> None:
    inputs = layers(17, 20, 33, torch.float32, gated)
    errors = operation_errors(ours(activation, backend), plain(activation), inputs)
    assert len(errors) == (9 if gated else 7)
    assert_within_budget(errors)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", WHERE, indirect=True)
def test_every_dtype_with_dropout(backend: str, dtype: torch.dtype, gated: bool) -> None:
    inputs = layers(19, 24, 70, dtype, gated)
    run = ours("gelu_tanh", backend, dropout=0.3, seed=5)
    assert_within_budget(operation_errors(run, plain("gelu_tanh", 0.3, 5), inputs))


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in ISAS], indirect=True)
def test_sizes_beyond_a_block(backend: str) -> None:
    inputs = layers(257, 100, 1601, torch.float32, True)
    assert_within_budget(operation_errors(ours("silu", backend), plain("silu"), inputs))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_recomputing_gives_the_same_and_keeps_less(backend: str) -> None:
    inputs = given_of(layers(9, 8, 20, torch.float32, True))
    found = []
    for recompute in (False, True):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        saved: list[list[int]] = []

        def note(x: Tensor, saved: list[list[int]] = saved) -> Tensor:
            saved.append(list(x.shape))
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = ours("gelu", backend, recompute=recompute)(**leaves)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves.values())])
        assert saved.count([9, 20]) == (0 if recompute else 2)
    # What keeps it on a GPU is another product than what makes it again.
    close = 1e-5 if backend == "triton" else 0.0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=close, rtol=close)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_only_the_gradients_asked_for(backend: str) -> None:
    given = given_of(layers(5, 4, 6, torch.float32, False))
    full = {k: v.clone().requires_grad_() for k, v in given.items()}
    run = ours("gelu", backend)
    run(**full).sum().backward()
    for name, leaf in full.items():
        some = {k: v.clone().requires_grad_(k == name) for k, v in given.items()}
        run(**some).sum().backward()
        assert torch.equal(some[name].grad, leaf.grad), name
        assert all(x.grad is None for k, x in some.items() if k != name)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_weights_stored_as_in_by_out(backend: str) -> None:
    x = torch.randn(5, 6)
    weights = torch.randn(6, 9, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    w1, w2 = weights
    out = fastattn.mlp(x, w1.t(), None, w2.t(), None, "relu", backend=backend)
    found = torch.autograd.grad(out.square().sum(), weights)
    expected = torch.autograd.grad((torch.relu(x @ w1) @ w2).square().sum(), weights)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_inputs(isa: str) -> None:
    large = [-torch.inf, -1e15, -200.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 200.0, 1e15, torch.inf, torch.nan]
    x, one = torch.tensor(large), torch.ones(1, 1)
    for name in NAMES:
        with force_isa(isa):
            found = fastattn.mlp(x[:, None], one, None, one, None, name, backend="cpu")[:, 0]
        expected = FUNCTIONS[name](x.double()).float()
        finite = x.isfinite()
        torch.testing.assert_close(found[finite], expected[finite], atol=2e-6, rtol=2e-6)
        assert found[-1].isnan(), name
        assert found[-2] == torch.inf, name


@pytest.mark.skipif(not TRITON, reason="no triton")
def test_the_triton_kernels_products_of_each_layout() -> None:
    from fastattn.ops.linear.triton import gemm

    a, b = torch.randn(70, 37), torch.randn(37, 65)
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            torch.testing.assert_close(gemm(left, right, torch.empty(70, 65)), a @ b, atol=1e-4, rtol=1e-4)


@needs_library
def test_opcheck() -> None:
    given = layers(6, 4, 8, torch.float32, True)
    residual = given.pop("residual")
    some, seed = list(given.values()), torch.tensor([3])
    options = (seed, 0.2, "gelu")
    torch.library.opcheck(torch.ops.fastattn.mlp_forward, (*some, residual, *options, True, "cpu"))
    dout, u, g = torch.randn(6, 7), torch.randn(6, 8), torch.randn(6, 8)
    torch.library.opcheck(torch.ops.fastattn.mlp_backward, (dout, *some, u, g, *options, 127, "cpu"))


@needs_library
def test_compiled_whole_for_any_length() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    module = fastattn.nn.MLP(8, 12, activation="gelu_tanh", dropout=0.1)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor) -> Tensor:
        return module(x, seed=7).square().mean()

    run = torch.compile(loss, fullgraph=True, backend=counted, dynamic=True)
    frames = set()
    for length in (3, 9, 17):
        x = torch.randn(2, length, 8)
        found = torch.autograd.grad(run(x), list(module.parameters()))
        expected = torch.autograd.grad(loss(x), list(module.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        frames.add(counted.frame_count)
    assert len(frames) == 1


def test_reference_gradcheck() -> None:
    inputs = given_of(layers(3, 4, 5, torch.float32, True))
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def run(dropout: float) -> Callable[..., Tensor]:
        function = ours("silu", "reference", dropout=dropout, seed=1)
        return lambda *xs: function(**dict(zip(inputs, xs, strict=True)))

    assert torch.autograd.gradcheck(run(0.2), leaves)
    assert torch.autograd.gradgradcheck(run(0.0), leaves)


@needs_library
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    w1, w2 = torch.randn(5, 4), torch.randn(4, 5)
    (grad,) = torch.autograd.grad(fastattn.mlp(x, w1, None, w2, None).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@needs_library
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_counted(recompute: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = fastattn.nn.MLP(8, 12, gated=True, recompute=recompute)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(6, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == (3 * 3 + 2 * recompute) * 2 * 6 * 8 * 12


@needs_library
def test_a_residual_keeps_its_digits_under_autocast() -> None:
    x, w1, w2 = torch.randn(3, 4), torch.randn(6, 4), torch.zeros(4, 6)
    residual = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastattn.mlp(x, w1, None, w2, None, residual=residual), residual)


@needs_library
def test_without_a_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.ops.mlp import library

    kept = []
    monkeypatch.setattr(library.MLP, "apply", lambda *a: kept.append(not a[-2]) or (a[0], None, None))
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    fastattn.mlp(x, w, None, w, None)
    with torch.no_grad():
        fastattn.mlp(x, w, None, w, None)
    assert kept == [True, False]


def test_autocast() -> None:
    module = fastattn.nn.MLP(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "tanh"}, r"activation: expected one of .*relu2.*, got 'tanh'"),
        ({"w2": torch.ones(4, 7)}, r"w2: expected \[out_features, 6\].*got \[4, 7\]"),
        ({"gate": torch.ones(5, 4)}, r"gate: expected w1's \[6, 4\], got \[5, 4\]"),
        ({"residual": torch.ones(2, 4)}, r"residual: expected torch.float32 \[3, 4\], got .* \[2, 4\]"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"gate": (None, torch.ones(6))}, "gate: expected a weight with its bias, got None"),
    ],
)
def test_errors(change: dict[str, Any], said: str) -> None:
    given = {"x": torch.ones(3, 4), "w1": torch.ones(6, 4), "b1": None, "w2": torch.ones(4, 6), "b2": None}
    with pytest.raises(ValueError, match=said):
        fastattn.mlp(**{**given, **change})


def test_explain() -> None:
    x, w1, w2 = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (6, 4), (4, 6)))
    assert fastattn.explain(fastattn.mlp, x, w1, None, w2, None).backend == "reference"
