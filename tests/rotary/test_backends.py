"""The rotation's kernels against float64, and as a torch op; the module with the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.rotary import rotary
from fastattn.ops.rotary.library import UNTURNED
from fastattn.testing import force_isa, present_isas

triton = pytest.mark.skipif(
    bool(
        fastattn.explain(rotary, torch.ones(1, 1, 1, 2), *[torch.ones(1, 1)] * 2, backend="triton").backend
        is None
    ),
    reason="Triton's interpreter is not here",
)
BACKENDS = [*present_isas(), pytest.param("triton", marks=triton)]
# heads, length, head_dim, pairs
SIZES = [(3, 63, 64, 32), (1, 1, 8, 4), (5, 100, 80, 20), (2, 257, 33, 7)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on(backend: str) -> tuple[str, AbstractContextManager[None]]:
    """The backend's name, and what makes it run on its instruction set inside."""
    return ("triton", nullcontext()) if backend == "triton" else ("cpu", force_isa(backend))


def tables(rows: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, half, dtype=torch.float64) * 6.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(x: Tensor, cos: Tensor, sin: Tensor, backend: str, **options: Any) -> None:
    """out and dx: one rounding to the dtype, and of two products in float32."""
    dout = torch.randn(x.shape, dtype=torch.float64)
    found, given = {}, {"ours": (x.dtype, backend), "exact": (torch.float64, "reference")}
    for name, (dtype, where) in given.items():
        leaf = x.detach().to(dtype).requires_grad_()
        wide = (cos, sin) if name == "ours" else (cos.double(), sin.double())
        out = rotary(leaf, *wide, backend=where, **options)
        assert out.dtype == dtype
        out.backward(dout.to(x.dtype).to(dtype))
        assert leaf.grad is not None
        found[name] = (out.detach(), leaf.grad)
    for ours, exact in zip(found["ours"], found["exact"], strict=True):
        eps = torch.finfo(ours.dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * 4
        assert bool(((ours.double() - exact).abs() <= eps).all())


def cases(length: int) -> Iterator[dict[str, Any]]:
    yield {"start": 3}
    yield {"start": torch.tensor([0, 9], dtype=torch.int32)}
    yield {"positions": torch.randint(length + 9, (1, length))}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    name, isa = on(backend)
    with isa:
        for i, (heads, length, dim, half) in enumerate(SIZES):
            x = torch.randn(2, heads, length if name == "cpu" else min(length, 19), dim).to(dtype)
            cos, sin = tables(length + 10, half, DTYPES[i % 3])
            check(x, cos, sin, name, interleaved=interleaved, **list(cases(x.shape[2]))[i % 3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_packing(backend: str) -> None:
    name, isa = on(backend)
    cos, sin = tables(40, 4)
    with isa:
        check(torch.randn(2, 9, 3, 12).transpose(1, 2)[..., 1:11], cos, sin, name)
        check(torch.randn(2, 3, 12, 9).transpose(2, 3), cos, sin, name)
        packed = torch.randn(17, 2, 9)
        check(packed, cos, sin, name, cu_seqlens=torch.tensor([1, 4, 4, 15]), start=2, interleaved=True)
        packed[15:] = float("inf")
        left = rotary(packed, cos, sin, cu_seqlens=torch.tensor([0, 15]), backend=name)
        assert torch.equal(left[15:], packed[15:])


@triton
def test_a_position_outside_of_the_tables_is_seen_on_a_gpu() -> None:
    x, (cos, sin) = torch.randn(1, 1, 3, 4), tables(5, 2)
    found = torch.ops.fastattn.rotary(
        x, cos, sin, torch.tensor([[0, 5, UNTURNED]]), 0, False, False, "triton"
    )
    assert found[0, 0, 1].isnan().all()
    assert not found[0, 0, [0, 2]].isnan().any()


def test_a_position_outside_of_the_tables_is_an_error_in_compiled_code() -> None:
    x, (cos, sin) = torch.randn(1, 1, 3, 4), tables(5, 2)
    for index, start in ((torch.tensor([[0, 5, 1]]), 0), (torch.tensor([[0, -1, 1]]), 0), (None, 3)):
        with pytest.raises(RuntimeError, match="expected positions from 0 to 4"):
            torch.ops.fastattn.rotary(x, cos, sin, index, start, False, False, "cpu")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=triton)])
def test_opcheck(backend: str) -> None:
    cos, sin = tables(9, 4)
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    for positions in (None, torch.randint(9, (2, 5))):
        torch.library.opcheck(torch.ops.fastattn.rotary, (x, cos, sin, positions, 1, True, False, backend))


def test_every_derivative() -> None:
    x, t = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = tables(5, 4)

    def squares(backend: str) -> Any:
        return lambda x: rotary(x, cos, sin, backend=backend).pow(3).sum()

    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.jvp(f, (x,), (t,))[1],
        lambda f: torch.func.hessian(f)(x),
        lambda f: torch.func.vmap(f)(x[:, None]),
    ):
        torch.testing.assert_close(transform(squares("cpu")), transform(squares("reference")))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(squares("cpu")(leaf), leaf, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(2).sum(), leaf)
    assert ddx.isfinite().all()


def test_maps_over_positions_and_over_tables() -> None:
    x, positions = torch.randn(3, 2, 2, 5, 8), torch.randint(9, (3, 1, 5))
    cos, sin = (torch.stack(t) for t in zip(*(tables(9, 4) for _ in range(3)), strict=True))
    found = torch.vmap(lambda x, p: rotary(x, cos[0], sin[0], positions=p))(x, positions)
    want = torch.stack([rotary(x[i], cos[0], sin[0], positions=positions[i]) for i in range(3)])
    assert torch.equal(found, want)
    found = torch.vmap(rotary)(x, cos, sin)
    want = torch.stack([rotary(x[i], cos[i], sin[i]) for i in range(3)])
    torch.testing.assert_close(found, want)


def test_explain() -> None:
    x, (cos, sin) = torch.randn(1, 1, 5, 8), tables(5, 4)
    assert fastattn.explain(rotary, x, cos, sin).backend == "cpu"
    assert fastattn.explain(rotary, x.double(), cos, sin).backend == "reference"
    learned = fastattn.explain(rotary, x, cos.clone().requires_grad_(), sin)
    assert learned.backend == "reference"
    assert "gradients of cos and sin" in str(learned)
    with pytest.raises(NotImplementedError, match="gradients of cos and sin"):
        rotary(x, cos.clone().requires_grad_(), sin, backend="cpu")


def test_under_autocast_it_is_what_it_is() -> None:
    x, (cos, sin) = torch.randn(1, 1, 5, 8), tables(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(x, cos, sin), rotary(x, cos, sin, backend="cpu"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_module(interleaved: bool) -> None:
    module = fastattn.nn.RotaryEmbedding(8, base=500.0, interleaved=interleaved, max_length=16)
    q, k = torch.randn(2, 4, 5, 10), torch.randn(2, 2, 5, 10)
    angle = torch.arange(40.0)[:, None] * 500.0 ** (-torch.arange(4) / 4)
    for start in (0, 3, 30):  # the last lets the tables grow
        for found, x in zip(module(q, k, start=start), (q, k), strict=True):
            want = rotary(x, angle.cos(), angle.sin(), start=start, interleaved=interleaved)
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert module.max_length == 35
    assert not module.state_dict()
    q16, _ = module.to(torch.bfloat16)(q.bfloat16(), k.bfloat16())
    assert q16.dtype == torch.bfloat16
    assert module.q_cos.dtype == torch.float32


def test_module_under_compile_and_from_meta() -> None:
    with torch.device("meta"):
        module = fastattn.nn.RotaryEmbedding(8)
    module = module.to_empty(device="cpu")
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, want in zip(compiled(q, k, start=2), module(q, k, start=2), strict=True):
        torch.testing.assert_close(found, want)


def test_xpos_scores_decay_with_the_distance_alone() -> None:
    module = fastattn.nn.RotaryEmbedding(16, scale_base=32.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(p: int, distance: int) -> Tensor:
        return (module(q, k, start=p)[0] * module(q, k, start=p - distance)[1]).sum()

    torch.testing.assert_close(score(40, 7), score(90, 7), rtol=1e-4, atol=1e-4)
    plain = fastattn.nn.RotaryEmbedding(16)
    assert module(q, k, start=64)[0].norm() < plain(q, k, start=64)[0].norm()


@pytest.mark.parametrize("options", [{"dim": 7}, {"dim": 8, "max_length": 0}, {"dim": 8, "base": -1.0}])
def test_module_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fastattn.nn.RotaryEmbedding(**options)
