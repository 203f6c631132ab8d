"""The norms, forward and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import _backends
from fastattn.ops.philox import dropout_keep
from fastattn.testing import assert_within_budget, force_isa, operation_errors, present_isas

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 63), (2, 100), (5, 257), (9, 768)]
# Triton's interpreter takes its time.
FEW_SHAPES = [(3, 63), (2, 257)]
DROPOUT, SEED = 0.25, 77
needs_library = pytest.mark.skipif(bool(_backends.unavailable("cpu")), reason="no C++ library")
KERNELS = [name for name in ("cpu", "triton") if not _backends.unavailable(name)]
BACKENDS = ["reference", *KERNELS]


@pytest.fixture(
    params=["reference", *(f"cpu-{isa}" for isa in present_isas()), *(x for x in KERNELS if x != "cpu")]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
    else:
        with force_isa(isa):
            yield name


def plain_norm(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """As a model writes it: float32 inside, or float64."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    centered = wide if rms else wide - wide.mean(-1, keepdim=True)
    out = centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        out = out * weight
    return (out if bias is None else out + bias).to(z.dtype)


def inputs_of(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> dict[str, Tensor | None]:
    return {
        "x": (2 * torch.randn(shape) + 0.5).to(dtype),
        "weight": torch.randn(shape[-1]).to(weight_dtype),
        "bias": torch.randn(shape[-1]).to(weight_dtype),
    }


def check_norm(
    backend: str, rms: bool, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    # One element has no variance: roundings would be weighed with 1 / sqrt(eps).
    eps = 1e-5 if shape[-1] > 1 else 1.0
    inputs = inputs_of(shape, dtype, weight_dtype)
    if rms:
        del inputs["bias"]

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if rms:
            return fastattn.rms_norm(x, shape[-1], weight, eps, backend=backend)
        return fastattn.layer_norm(x, shape[-1], weight, bias, eps, backend=backend)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain_norm(x, weight, bias, eps, rms)

    errors = operation_errors(ours, plain, inputs)
    assert [e.name for e in errors] == ["out", "dx", "dweight", *([] if rms else ["dbias"])]
    assert_within_budget(errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_forward_and_gradients(backend: str, rms: bool, dtype: torch.dtype) -> None:
    for shape in FEW_SHAPES if backend == "triton" else SHAPES:
        for weight_dtype in {dtype, torch.float32}:
            check_norm(backend, rms, shape, dtype, weight_dtype)


def check_behind(
    backend: str, rms: bool, shape: tuple[int, ...], dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    inputs = inputs_of(shape, dtype, torch.float32)
    inputs["residual"] = torch.randn(shape).to(residual_dtype)
    if rms:
        del inputs["bias"]
    keep = dropout_keep(torch.tensor([SEED]), DROPOUT, (1, 1, shape[0], shape[1]))[0, 0]

    def ours(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Any:
        options: dict[str, Any] = {"dropout": DROPOUT, "eps": 1e-5, "seed": SEED, "prenorm": True}
        if rms:
            return fastattn.dropout_add_rms_norm(x, residual, weight, **options, backend=backend)
        return fastattn.dropout_add_layer_norm(x, residual, weight, bias, **options, backend=backend)

    def plain(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Any:
        z = residual + torch.where(keep, x / (1 - DROPOUT), 0)
        return plain_norm(z, weight, bias, 1e-5, rms).to(x.dtype), z

    errors = operation_errors(ours, plain, inputs)
    names = ["out", "out1", "dx", "dweight", *([] if rms else ["dbias"]), "dresidual"]
    assert [e.name for e in errors] == names
    assert_within_budget(errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_behind_dropout_and_a_residual(backend: str, rms: bool, dtype: torch.dtype) -> None:
    for shape in FEW_SHAPES if backend == "triton" else SHAPES[1:]:
        for residual_dtype in {dtype, torch.float32}:
            check_behind(backend, rms, shape, dtype, residual_dtype)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_elements_are_dropped_on_every_backend(backend: str) -> None:
    x = torch.ones(3, 2, 300)
    _, z = fastattn.dropout_add_layer_norm(
        x, None, None, None, dropout=0.3, seed=5, prenorm=True, backend=backend
    )
    keep = dropout_keep(torch.tensor([5]), 0.3, (1, 1, 6, 300)).reshape(x.shape)
    assert torch.equal(z != 0, keep)
    close(z[keep], torch.full_like(z[keep], 1 / (1 - round(0.3 * 65536) / 65536)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_is_drawn_from_torchs_generator(backend: str) -> None:
    x = torch.randn(4, 130)

    def run() -> Tensor:
        out: Tensor = fastattn.dropout_add_rms_norm(x, None, None, dropout=0.5, backend=backend)
        return out

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_dimensions_strides_and_no_parameters(backend: str) -> None:
    x = torch.randn(5, 3, 4, 6).transpose(0, 1)[:, ::2]
    close(fastattn.layer_norm(x, (4, 6), backend=backend), F.layer_norm(x, (4, 6)))
    close(fastattn.rms_norm(x, [4, 6], backend=backend), F.rms_norm(x, [4, 6]))
    weight, bias = torch.randn(4, 6), torch.randn(6, 4).t()
    close(
        fastattn.layer_norm(x, (4, 6), weight, bias, backend=backend), F.layer_norm(x, (4, 6), weight, bias)
    )
    close(fastattn.layer_norm(x, (4, 6), None, bias, backend=backend), F.layer_norm(x, (4, 6)) + bias)
    every_other = torch.randn(4, 20)[:, ::2]
    close(fastattn.layer_norm(every_other, 10, backend=backend), F.layer_norm(every_other, (10,)))
    part = torch.randn(4, 20)[:, :10]
    close(fastattn.layer_norm(part, 10, backend=backend), F.layer_norm(part, (10,)))
    found = fastattn.dropout_add_layer_norm(x, x, weight, bias, backend=backend)
    close(found, F.layer_norm(2 * x, (4, 6), weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_nothing_to_normalize(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    out = fastattn.layer_norm(x, shape[-1], weight, backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_on_the_weight(backend: str) -> None:
    x, weight = torch.randn(3, 40), torch.randn(40, requires_grad=True)
    out = fastattn.rms_norm(x, 40, weight, 1e-6, weight_offset=1.0, backend=backend)
    expected = F.rms_norm(x, (40,), 1 + weight, 1e-6)
    close(out, expected)
    close(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norms_epsilon_is_torchs(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 8), 1e-4).to(dtype)
    found, expected = fastattn.rms_norm(x, 8, backend=backend), F.rms_norm(x, (8,))
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_much_larger_than_the_deviation(backend: str) -> None:
    x = torch.randn(4, 500) + 1e4
    exact = F.layer_norm(x.double(), (500,))
    ours, theirs = fastattn.layer_norm(x, 500, backend=backend), F.layer_norm(x, (500,))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_the_residual(backend: str) -> None:
    x, wide, weight = torch.randn(2, 9).bfloat16(), torch.randn(2, 9), torch.ones(9)

    def run(residual: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = fastattn.dropout_add_layer_norm(
            x, residual, weight, None, prenorm=True, residual_dtype=dtype, backend=backend
        )
        return found

    for residual, dtype, expected in (
        (None, None, torch.bfloat16),
        (None, torch.float32, torch.float32),
        (wide, None, torch.float32),
        (wide.bfloat16(), None, torch.bfloat16),
        (wide.bfloat16(), torch.float32, torch.float32),
        (wide.half(), None, torch.float32),
    ):
        out, z = run(residual, dtype)
        assert out.dtype == torch.bfloat16
        assert z.dtype == expected
        # Triton's interpreter rounds to bfloat16 towards zero.
        exact = x.float() + (0 if residual is None else residual.float())
        torch.testing.assert_close(z, exact.to(expected))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_through_the_sum_alone(backend: str) -> None:
    x, residual = (torch.randn(3, 20, requires_grad=True) for _ in range(2))
    _, z = fastattn.dropout_add_layer_norm(x, residual, torch.ones(20), None, prenorm=True, backend=backend)
    z.sum().backward()
    close(x.grad, torch.ones_like(x))
    close(residual.grad, torch.ones_like(x))
    # They must not be one tensor: optimizers and hooks write into gradients.
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("backend", KERNELS)
def test_only_the_gradients_asked_for(backend: str) -> None:
    x, residual = torch.randn(3, 20), torch.randn(3, 20, requires_grad=True)
    weight, bias = torch.ones(20), torch.zeros(20, requires_grad=True)
    out = fastattn.dropout_add_layer_norm(x, residual, weight, bias, dropout=0.2, seed=1, backend=backend)
    out.backward(torch.ones_like(out))
    assert x.grad is None
    assert weight.grad is None
    close(bias.grad, torch.full((20,), 3.0))
    close(residual.grad, torch.zeros(3, 20))


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_sums_on_any_number_of_threads(threads: int) -> None:
    x, dout = torch.randn(3001, 33), torch.randn(3001, 33)
    weight = torch.randn(33, requires_grad=True)

    def gradient() -> Tensor:
        out = fastattn.layer_norm(x, 33, weight, backend="cpu")
        return torch.autograd.grad(out, weight, dout)[0]

    before, once = torch.get_num_threads(), gradient()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(gradient(), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_reference_gradcheck(rms: bool) -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"dropout": 0.4, "seed": 8, "prenorm": True, "eps": 1e-5}

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        if rms:
            return fastattn.dropout_add_rms_norm(x, residual, weight, weight_offset=1.0, **options)
        return fastattn.dropout_add_layer_norm(x, residual, weight, None, **options)

    assert torch.autograd.gradcheck(run, (x, residual, weight))
    assert torch.autograd.gradgradcheck(run, (x, residual, weight))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": fastattn.layer_norm,
    "rms_norm": fastattn.rms_norm,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_few_elements_are_left_to_torch(name: str) -> None:
    few, many = torch.empty(2, 8), torch.empty(1 << 18, 8)
    found = fastattn.explain(OPERATIONS[name], few, 8)
    assert found.backend == "reference"
    if not _backends.unavailable("cpu"):
        assert "torch's own is as fast for fewer than" in found.reasons["cpu"][0]
        assert fastattn.explain(OPERATIONS[name], few, 8, backend="cpu").backend == "cpu"
        assert fastattn.explain(OPERATIONS[name], many, 8).backend == "cpu"
        assert fastattn.explain(fastattn.dropout_add_layer_norm, few, few, None, None).backend == "cpu"
