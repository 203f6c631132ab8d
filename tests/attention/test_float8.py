"""Attention of float8 tensors against float64 on the values that these stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing.budget import Errors, assert_within_budget
from tests.attention.cases import device_of, here, route

FLOAT8 = torch.float8_e4m3fn
Scaled = tuple[Tensor, Tensor]


def quantised(*shape: int, per: str = "head") -> Scaled:
    """Random float8 ``[B, H, L, D]`` and the scale of each head, or of the whole tensor."""
    x = torch.randn(shape)
    scale = x.abs().amax((2, 3)) / 448 if per == "head" else x.abs().max() / 448
    wide = scale[..., None, None] if per == "head" else scale
    return (x / wide).to(FLOAT8), scale


def exact(scaled: Scaled) -> Tensor:
    x, scale = scaled
    return x.double() * (scale[..., None, None] if scale.dim() else scale).double()


def of_ones(backend: str, q: Scaled, k: Scaled, v: Scaled, **options) -> tuple[Tensor, Tensor]:
    device = device_of(backend)
    found = fastattn.attention_float8(
        *(x[0].to(device) for x in (q, k, v)),
        q_scale=q[1].to(device),
        k_scale=k[1].to(device),
        v_scale=v[1].to(device),
        return_lse=True,
        backend=backend,
        **options,
    )
    return found[0].cpu(), found[1].cpu()


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest):
    if request.param not in {name.partition("-")[0] for name in here()}:
        pytest.skip(f"{request.param} is not here")
    with route(request.param) as name:
        yield name


OPTIONS = {
    "plain": lambda: {},
    "causal": lambda: {"mask": fastattn.causal()},
    "window-and-alibi": lambda: {
        "mask": fastattn.sliding_window(9, 3),
        "bias": fastattn.alibi(torch.tensor([0.5, 0.1, 0.3, 0.2])),
    },
    "softcap-and-sinks": lambda: {"softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 0.0, 1.0])},
    "negative-scale": lambda: {"scale": -0.3},
}


@pytest.mark.parametrize("per", ["head", "tensor"])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(backend: str, name: str, per: str) -> None:
    if device_of(backend) != "cpu" and "alibi" in name:
        pytest.skip("the bias is on the CPU")
    q, k, v = (quantised(2, h, n, d, per=per) for h, n, d in ((4, 33, 24), (2, 70, 24), (2, 70, 17)))
    options = OPTIONS[name]()
    out, lse = of_ones(backend, q, k, v, **options)
    wide = [exact(x) for x in (q, k, v)]
    want, want_lse = fastattn.attention(*wide, **options, return_lse=True, backend="reference")
    plain = fastattn.attention(*(x.bfloat16() for x in wide), **options, backend="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).abs().max())

    size, peak = float(want.abs().max()), float(want_lse.abs().max())
    assert_within_budget(
        [
            Errors("out", distance(out, want), distance(plain, want), size, torch.bfloat16, peak),
            Errors("lse", distance(lse, want_lse), 0.0, peak, torch.float32, peak),
        ]
    )


def test_the_largest_and_smallest_values_and_nan(backend: str) -> None:
    """Subnormals have an exponent of their own; 0x7F is NaN, not 480."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    v = values[~values.float().isnan()].view(1, 1, -1, 2)
    zeros = torch.zeros(1, 1, v.shape[2], 16).to(FLOAT8)
    keep = torch.eye(v.shape[2], dtype=torch.bool)
    device = device_of(backend)
    call = lambda v: fastattn.attention_float8(  # noqa: E731
        *(x.to(device) for x in (zeros, zeros, v)), mask=keep.to(device), backend=backend
    ).cpu()
    torch.testing.assert_close(call(v).float(), v.float(), atol=0, rtol=0)
    broken = v.clone()
    broken.view(torch.uint8)[0, 0, 5, 1] = 0x7F
    assert call(broken)[0, 0, 5].isnan().tolist() == [False, True]


def test_scales_default_to_one() -> None:
    q, k, v = (quantised(1, 2, 5, 16)[0] for _ in range(3))
    one = torch.ones(())
    torch.testing.assert_close(
        fastattn.attention_float8(q, k, v),
        fastattn.attention_float8(q, k, v, q_scale=one, k_scale=one.expand(2), v_scale=one.expand(1, 1)),
    )


def test_compiled_without_a_break() -> None:
    q, k, v = (quantised(1, 2, 5, 16) for _ in range(3))

    def call(q, k, v, scale):
        return fastattn.attention_float8(q, k, v, q_scale=scale, mask=fastattn.causal())

    arguments = (q[0], k[0], v[0], q[1])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_refusals() -> None:
    q, scale = quantised(1, 2, 5, 16)
    with pytest.raises(
        TypeError, match=r"q: expected .* got torch.float8_e4m3fn \(fastattn.attention_float8"
    ):
        fastattn.attention(q, q, q)
    with pytest.raises(TypeError, match=r"k: expected a tensor of float8_e4m3fn, got torch.float32"):
        fastattn.attention_float8(q, q.float(), q)
    with pytest.raises(TypeError, match=r"v_scale: expected a floating tensor, got float"):
        fastattn.attention_float8(q, q, q, v_scale=0.5)
    with pytest.raises(ValueError, match=r"q_scale: expected .* broadcasts to \[1, 2\] .* got \[3\]"):
        fastattn.attention_float8(q, q, q, q_scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"v: expected k's heads and length \[2, 5\], got \[2, 4\]"):
        fastattn.attention_float8(q, q, q[:, :, :4])
    with pytest.raises(NotImplementedError, match="attention_float8 has no gradient"):
        fastattn.attention_float8(q, q, q, q_scale=scale.requires_grad_())
    with pytest.raises(ValueError, match="backend: expected one of"):
        fastattn.attention_float8(q, q, q, backend="cuda")
