"""The norms under torch's machinery: opcheck, compile, autocast, vmap; the modules; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import _backends

needs_library = pytest.mark.skipif(bool(_backends.unavailable("cpu")), reason="no C++ library")


@needs_library
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_opcheck(dropout: float, rms: bool) -> None:
    x, weight = torch.randn(6, 4), torch.randn(4)
    residual = torch.randn(6, 4) if dropout else None
    seed = torch.tensor([3]) if dropout else None
    rest = (seed, dropout, 1e-5, 0.0, rms, torch.float32, "cpu")
    torch.library.opcheck(torch.ops.fastattn.layer_norm_forward, (x, residual, weight, weight, *rest))
    out, z, mean, rstd = torch.ops.fastattn.layer_norm_forward(x, residual, weight, weight, *rest)
    saved = (x if residual is None else z, weight, mean, rstd, seed, dropout, 0.0, rms)
    for wanted in (15, 4):
        torch.library.opcheck(torch.ops.fastattn.layer_norm_backward, (out, None, *saved, wanted, "cpu"))


@needs_library
def test_compiled_whole_for_any_length() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, seed: Tensor) -> Tensor:
        out, z = fastattn.dropout_add_layer_norm(
            x, x, weight, bias, dropout=0.5, seed=seed, prenorm=True, backend="cpu"
        )
        return fastattn.layer_norm(out + z, 8, weight, backend="cpu").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=counted, dynamic=True)
    frames = 0
    for length in (3, 9, 17):
        x, seed = torch.randn(2, length, 8), torch.tensor([length])
        found, expected = (torch.autograd.grad(f(x, seed), (weight, bias)) for f in (compiled, run))
        torch.testing.assert_close(found, expected)
        # The first compilation may begin anew, once Dynamo knows what it need not keep symbolic.
        frames = frames or counted.frame_count
        assert counted.frame_count == frames


@needs_library
def test_under_autocast_dtypes_stay() -> None:
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out, z = fastattn.dropout_add_layer_norm(
                x, residual, weight, weight, prenorm=True, backend=backend
            )
            assert fastattn.layer_norm(residual, 8, weight, backend=backend).dtype == torch.float32
        assert (out.dtype, z.dtype) == (torch.bfloat16, torch.float32)
        exact = F.layer_norm(x.float() + residual, (8,), weight, weight)
        torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)


@needs_library
def test_vmap_and_per_sample_gradients() -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(8)

    def loss(weight: Tensor, x: Tensor, backend: str) -> Tensor:
        return fastattn.dropout_add_layer_norm(x, x, weight, None, backend=backend).square().sum()

    ours, theirs = (
        torch.vmap(torch.func.grad(lambda w, x, b=b: loss(w, x, b)), (None, 0))(weight, x)
        for b in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, theirs)


@needs_library
def test_a_second_derivative_raises() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    out = fastattn.layer_norm(x, 8, backend="cpu").square().sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative on this backend; backend='reference' has"):
        first.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_module(bias: bool) -> None:
    theirs = torch.nn.LayerNorm((3, 8), eps=1e-3, bias=bias)
    ours = fastattn.nn.LayerNorm((3, 8), eps=1e-3, bias=bias)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_rms_norm_module() -> None:
    theirs, ours = torch.nn.RMSNorm(8), fastattn.nn.RMSNorm(8)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_add_layer_norm_module() -> None:
    norm = fastattn.nn.DropoutAddLayerNorm(8, dropout=0.5, prenorm=True)
    norm.load_state_dict(torch.nn.LayerNorm(8).state_dict())
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    _, z = norm(x, residual)
    assert torch.isclose(z, residual).any()
    out, z = norm.eval()(x, residual)
    torch.testing.assert_close(z, x + residual)
    torch.testing.assert_close(out, F.layer_norm(z, (8,)))
    assert "dropout=0.5, prenorm=True" in repr(norm)
    with pytest.raises(ValueError, match="expected a probability"):
        fastattn.nn.DropoutAddLayerNorm(8, dropout=1.5)
    with pytest.raises(ValueError, match="expected one dimension with elementwise_affine=False"):
        fastattn.nn.DropoutAddLayerNorm((3, 8), elementwise_affine=False)


X, ONES = torch.zeros(2, 8), torch.ones(8)
ADD = fastattn.dropout_add_layer_norm


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: fastattn.layer_norm(3, 8), TypeError, "x: expected a tensor, got int"),
        (lambda: fastattn.layer_norm(X.long(), 8), ValueError, "x: expected float32.*got torch.int64"),
        (lambda: fastattn.layer_norm(X, 7), ValueError, r"x: expected \[..., 7\] to be norm.*got \[2, 8\]"),
        (lambda: fastattn.layer_norm(X, ()), ValueError, "at least one dimension"),
        (lambda: fastattn.layer_norm(X, (1, 2, 8)), ValueError, r"expected \[..., 1, 2, 8\]"),
        (lambda: fastattn.layer_norm(X, 8, ONES[:3]), ValueError, r"weight: expected \[8\], got \[3\]"),
        (lambda: fastattn.layer_norm(X, 8, ONES, ONES[:3]), ValueError, r"bias: expected \[8\], got \[3\]"),
        (lambda: fastattn.layer_norm(X, 8, ONES.half()), ValueError, "weight: expected torch.float32 on cpu"),
        (
            lambda: fastattn.layer_norm(X.half(), 8, ONES.double()),
            ValueError,
            "weight: expected torch.float16 or torch.float32 on cpu, got torch.float64",
        ),
        (lambda: fastattn.rms_norm(X, 8, backend="gpu"), ValueError, "backend: expected one of"),
        (lambda: fastattn.rms_norm(X.double(), 8, backend="cpu"), NotImplementedError, "float64"),
        (lambda: ADD(X, X[:1], ONES, None), ValueError, r"residual: expected \[2, 8\].*got \[1, 8\]"),
        (lambda: ADD(X, X.double(), ONES, None), ValueError, "residual: expected torch.float32 or"),
        (
            lambda: ADD(X, X, ONES, None, residual_dtype=torch.half),
            ValueError,
            "residual_dtype: expected torch.float32 or",
        ),
        (lambda: ADD(X, X, ONES, None, dropout=1.0), ValueError, "dropout: expected a probability"),
        (lambda: ADD(X, X, ONES, None, dropout=0.1, seed=-1), ValueError, "seed: expected an int in"),
        (lambda: ADD(X, X, ONES, None, dropout=0.1, seed="a"), TypeError, "seed: expected an int or"),
        (
            lambda: fastattn.layer_norm(torch.empty(1, 65537), 65537, backend="triton"),
            NotImplementedError,
            "expected at most 65536 elements to be normalised together, got 65537",
        ),
    ],
)
def test_what_is_refused(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


@needs_library
def test_forward_mode_is_refused() -> None:
    x = torch.randn(2, 3)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        fastattn.layer_norm(torch.autograd.forward_ad.make_dual(x, x), 3, backend="cpu")


@needs_library
def test_a_compiled_norm_without_grad() -> None:
    x = torch.randn(2, 3, requires_grad=True)

    def norm(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = fastattn.layer_norm(x, 3, backend="cpu")
        return out + x

    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))
