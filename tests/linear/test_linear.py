"""`fastattn.linear` and the products under it, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import _backends
from fastattn.ops.linear import cpu, measured
from fastattn.ops.linear.epilogues import ADD
from fastattn.testing import assert_within_budget, force_isa, operation_errors, present_isas

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SHAPES = [(1, 1, 1), (63, 100, 257), (1, 257, 63), (100, 1, 5), (257, 63, 1600), (13, 33, 769), (5, 3000, 7)]
needs_library = pytest.mark.skipif(bool(_backends.unavailable("cpu")), reason="no C++ library")


@pytest.fixture(params=present_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with force_isa(request.param):
        yield request.param


def matrix(rows: int, columns: int, by_columns: bool, dtype: torch.dtype) -> Tensor:
    x = torch.randn((columns, rows) if by_columns else (rows, columns)).to(dtype)
    return x.t() if by_columns else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_layout(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    for a_turned in (False, True):
        for b_turned in (False, True):
            a, b = matrix(m, k, a_turned, dtype), matrix(k, n, b_turned, dtype)
            bias = torch.randn(n).to(dtype)
            exact = a.double() @ b.double()
            out = cpu.gemm(a, b, torch.empty(m, n, dtype=dtype), bias=bias)
            rounding = torch.finfo(dtype).eps * (exact + bias).abs().max() + 1e-5 * k**0.5
            assert (out.double() - exact - bias.double()).abs().max() <= rounding
            added = cpu.gemm(a, b, torch.ones(m, n), epilogue=ADD)
            assert (added.double() - exact - 1).abs().max() <= 1e-5 * k**0.5


@needs_library
def test_a_product_over_nothing_is_the_bias() -> None:
    bias = torch.randn(5)
    out = cpu.gemm(torch.empty(3, 0), torch.empty(0, 5), torch.empty(3, 5), bias=bias)
    assert torch.equal(out, bias.expand(3, 5))
    assert cpu.gemm(torch.empty(0, 4), torch.empty(4, 5), torch.empty(0, 5)).numel() == 0


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_sums_on_any_number_of_threads(threads: int) -> None:
    a, b = torch.randn(301, 900), torch.randn(900, 500)
    before = torch.get_num_threads()
    once = cpu.gemm(a, b, torch.empty(301, 500))
    torch.set_num_threads(threads)
    try:
        again = cpu.gemm(a, b, torch.empty(301, 500))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, again)


BACKENDS = ["reference", *(["cpu"] if not _backends.unavailable("cpu") else [])]
if not _backends.unavailable("triton"):
    BACKENDS.append("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_GEMM", "ours")  # not whichever is faster
    inputs = {
        "x": torch.randn(2, 37, 50).to(dtype),
        "weight": torch.randn(23, 50).to(dtype),
        "bias": torch.randn(23).to(dtype),
    }
    errors = operation_errors(
        lambda x, weight, bias: fastattn.linear(x, weight, bias, backend=backend), F.linear, inputs
    )
    assert [e.name for e in errors] == ["out", "dx", "dweight", "dbias"]
    assert_within_budget(errors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_stored_as_in_by_out_keeps_its_layout(backend: str) -> None:
    weight = torch.randn(7, 5, requires_grad=True)
    x = torch.randn(4, 7)
    fastattn.linear(x, weight.t(), backend=backend).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    torch.testing.assert_close(weight.grad, 2 * x.t() @ (x @ weight.detach()))


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "reference"])
def test_nothing_to_multiply(backend: str) -> None:
    x, weight = torch.ones(2, 3, 0), torch.ones(4, 0)
    assert torch.equal(fastattn.linear(x, weight, torch.ones(4), backend=backend), torch.ones(2, 3, 4))
    assert fastattn.linear(torch.ones(2, 0, 3), torch.ones(4, 3), backend=backend).shape == (2, 0, 4)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "reference"])
def test_only_the_gradients_asked_for(backend: str) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    fastattn.linear(x, weight, torch.zeros(5), backend=backend).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


@needs_library
def test_second_derivatives() -> None:
    inputs = [torch.randn(s, requires_grad=True) for s in ((3, 4), (5, 4), (5,))]

    def penalty(function: object) -> list[Tensor]:
        out = function(*inputs)  # type: ignore[operator]
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    ours = penalty(lambda *a: fastattn.linear(*a, backend="cpu"))
    for found, expected in zip(ours, penalty(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_reference_gradcheck() -> None:
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(fastattn.linear, inputs)


@needs_library
def test_opcheck() -> None:
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    torch.library.opcheck(torch.ops.fastattn.linear_forward, (x, weight, bias, "cpu"))
    for wanted in (1, 2, 7):
        torch.library.opcheck(
            torch.ops.fastattn.linear_backward, (torch.randn(6, 5), x, weight, wanted, "cpu")
        )


@needs_library
def test_compiled_whole_for_any_length() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    weight, bias = torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x: fastattn.linear(x, weight, bias).sum(), fullgraph=True, backend=counted, dynamic=True
    )
    for length in (3, 9, 17):
        x = torch.randn(2, length, 8)
        (grad,) = torch.autograd.grad(run(x), weight)
        torch.testing.assert_close(grad, x.sum((0, 1)).expand(5, 8))
    assert counted.frame_count == 1


@needs_library
def test_vmap_and_grad() -> None:
    x, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    found = torch.func.vmap(lambda x: fastattn.linear(x, weight, backend="cpu"))(x)
    torch.testing.assert_close(found, F.linear(x, weight))


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.linear(torch.randn(3, 4), torch.randn(5, 4), torch.randn(5))
    assert out.dtype == torch.bfloat16


def test_nn_linear_drops_in() -> None:
    theirs = torch.nn.Linear(6, 3)
    ours = fastattn.nn.Linear(6, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@needs_library
def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        fastattn.linear(x, weight, backend="cpu").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 4 * 5


@needs_library
def test_explain_says_whose_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.delenv("FASTATTN_GEMM", raising=False)
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    x, weight = torch.randn(64, 192), torch.randn(192, 192)
    found = fastattn.explain(fastattn.linear, x, weight)
    assert found.backend == "cpu"
    assert "measured to be faster at the first use" in str(found)
    fastattn.linear(x, weight)
    assert "torch's speed for [64, 192] @ [192, 192]" in str(fastattn.explain(fastattn.linear, x, weight))
    monkeypatch.setenv("FASTATTN_GEMM", "torch")
    assert "torch's: FASTATTN_GEMM=torch" in str(fastattn.explain(fastattn.linear, x, weight))
    monkeypatch.setenv("FASTATTN_GEMM", "mine")
    with pytest.raises(ValueError, match=r"FASTATTN_GEMM: expected one of .* got 'mine'"):
        fastattn.linear(x, weight)


@needs_library
@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)], ids=["ours", "torch"])
def test_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float]) -> None:
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.delenv("FASTATTN_GEMM", raising=False)
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    ours, theirs = seconds
    monkeypatch.setattr(measured, "_seconds", lambda run, *rest: theirs if run is measured._torch else ours)
    called = []
    monkeypatch.setattr(cpu, "gemm", lambda a, b, out, **_: called.append("ours") or torch.mm(a, b, out=out))
    x, weight = torch.randn(64, 192), torch.randn(192, 192)
    torch.testing.assert_close(fastattn.linear(x, weight), F.linear(x, weight))
    assert bool(called) == (ours < theirs)


@needs_library
def test_few_operations_are_left_to_torch() -> None:
    x, weight = torch.randn(1, 64), torch.randn(64, 64)
    found = fastattn.explain(fastattn.linear, x, weight)
    assert found.backend == "reference"
    assert "fewer than 4194304 operations" in str(found)
    assert fastattn.explain(fastattn.linear, x, weight, backend="cpu").backend == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), r"weight: expected \[out_features, 3\] .* got \[4, 5\]"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"bias of weight: expected \[4\], got \[3\]"),
        ((torch.ones(2, 3), torch.ones(4, 3).half()), r"weight: expected torch.float32 on cpu, .*float16"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64)), "x: expected float32"),
    ],
)
def test_errors(arguments: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastattn.linear(*arguments)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        fastattn.linear(torch.ones(2, 3), [[1.0]])  # type: ignore[arg-type]
