"""Forward and every gradient against float64, on every backend and instruction set present."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.testing import assert_within_budget, attention_errors, present_isas
from tests.attention.cases import ROUTES, device_of, interpreted, route

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=ROUTES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend; the C++ one once on every instruction set this machine has."""
    with route(request.param) as name:
        yield name


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


def qkv(
    batch: int,
    heads: tuple[int, int],
    length: tuple[int, int],
    dim: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, heads[0], length[0], dim[0], generator=g)
    k = torch.randn(batch, heads[1], length[1], dim[0], generator=g)
    v = torch.randn(batch, heads[1], length[1], dim[1], generator=g)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


SHAPES = {
    "one": (1, (1, 1), (1, 1), (1, 1)),
    "63x63": (2, (3, 3), (63, 63), (16, 16)),
    "100x257-gqa": (2, (4, 2), (100, 257), (40, 24)),
    "257x100-mqa": (1, (4, 1), (257, 100), (8, 3)),
    "1x1000": (1, (2, 2), (1, 1000), (64, 64)),
    "300x300": (1, (2, 2), (300, 300), (64, 64)),
    "d128": (1, (1, 1), (130, 290), (128, 100)),
    "d256": (1, (2, 1), (37, 70), (256, 200)),
    "d512": (1, (1, 1), (37, 150), (512, 512)),
}


def by_route(names: Iterable[str], few: set[str]) -> list[tuple[str, str]]:
    """Each backend with each name; in the interpreter a `few`, as test_features.py has most of it."""
    return [(r, name) for r in ROUTES for name in names if not interpreted(r) or name in few]


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize(
    ("backend", "name"), by_route(SHAPES, {"one", "1x1000", "d128", "d256", "d512"}), indirect=["backend"]
)
def test_float32(backend: str, device: str, name: str, causal: str | None) -> None:
    mask = None if causal is None else fastattn.causal(causal)
    inputs = qkv(*SHAPES[name], device=device)
    assert_within_budget(attention_errors(*inputs, mask=mask, backend=backend))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("backend", "name"),
    by_route(["63x63", "100x257-gqa", "d128", "d256"], {"d128", "d256"}),
    indirect=["backend"],
)
def test_half(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(*SHAPES[name], dtype, device)
    options = [{"mask": fastattn.causal()}, {"dropout": 0.2, "seed": 3}]
    for some in [options[0] | options[1]] if interpreted(backend) else options:
        assert_within_budget(attention_errors(q, k, v, **some, backend=backend))


def masks(batch: int, heads: int, q_length: int, k_length: int) -> dict[str, fastattn.Mask]:
    g = torch.Generator().manual_seed(2)
    random = lambda *shape: torch.rand(*shape, generator=g) > 0.5  # noqa: E731
    lengths = torch.tensor([0, 1, k_length - 2, k_length])[-batch:]
    blocks = torch.zeros(q_length, k_length, dtype=torch.bool)
    blocks[: q_length // 2, : k_length // 3] = True
    dense = fastattn.Mask()
    return {
        "padding": fastattn.key_padding(lengths),
        "padding-causal": fastattn.key_padding(lengths) & fastattn.causal(),
        "both-corners": fastattn.causal("top_left") & fastattn.causal("bottom_right"),
        "full": dense & random(batch, heads, q_length, k_length),
        "heads": dense & random(1, heads, q_length, k_length),
        "keys": dense & random(batch, 1, 1, k_length),
        "queries": dense & random(batch, 1, q_length, 1),
        "2d": dense & random(q_length, k_length),
        "transposed": dense & random(k_length, q_length).t(),
        "blocks": dense & blocks & fastattn.causal(),
        "nothing": dense & torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    ("backend", "name"),
    by_route(masks(1, 1, 4, 4), {"padding-causal", "both-corners", "transposed", "blocks", "nothing"}),
    indirect=["backend"],
)
def test_masks(backend: str, device: str, name: str) -> None:
    batch, heads, lengths = (2, 2, (37, 70)) if interpreted(backend) else (4, 2, (70, 300))
    q, k, v = qkv(batch, (heads, heads), lengths, (24, 32), device=device)
    mask = masks(batch, heads, *lengths)[name].to(device)
    if not interpreted(backend):
        assert_within_budget(attention_errors(q, k, v, mask=mask, backend=backend))
    assert_within_budget(attention_errors(q, k, v, mask=mask, dropout=0.3, seed=11, backend=backend))


@pytest.mark.parametrize(
    ("backend", "shape"),
    by_route(["BHQK", "1HQK", "B1QK", "11QK", "BH1K", "B1Q1", "1111"], {"1HQK", "B1Q1"}),
    indirect=["backend"],
)
def test_bias_and_its_gradient(backend: str, device: str, shape: str) -> None:
    heads, lengths = ((2, 1), (37, 40)) if interpreted(backend) else ((4, 2), (70, 300))
    q, k, v = qkv(2, heads, lengths, (24, 32), device=device)
    sizes = {"B": 2, "H": heads[0], "Q": lengths[0], "K": lengths[1], "1": 1}
    bias = torch.randn([sizes[x] for x in shape], generator=torch.Generator().manual_seed(3)).to(device)
    if not interpreted(backend):
        assert_within_budget(attention_errors(q, k, v, bias=bias, backend=backend))
    assert_within_budget(
        attention_errors(q, k, v, bias=bias, mask=fastattn.causal(), dropout=0.1, seed=1, backend=backend)
    )


def test_gradient_of_bias_alone(backend: str, device: str) -> None:
    q, k, v = qkv(2, (2, 2), (33, 47), (8, 8), device=device)
    bias = torch.randn(1, 2, 33, 47).to(device).requires_grad_()
    fastattn.attention(q, k, v, bias=bias, backend=backend).square().sum().backward()
    exact = bias.detach().double().requires_grad_()
    fastattn.attention(q.double(), k.double(), v.double(), bias=exact).square().sum().backward()
    torch.testing.assert_close(bias.grad, exact.grad.float(), atol=2e-6, rtol=1e-4)


def test_bias_of_minus_infinity_masks(backend: str, device: str) -> None:
    q, k, v = qkv(1, (2, 2), (65, 130), (16, 16), device=device)
    keep = torch.rand(1, 2, 65, 130, generator=torch.Generator().manual_seed(4)) > 0.7
    keep[:, :, 7] = False
    keep = keep.to(device)
    bias = torch.zeros(keep.shape, device=device).masked_fill(~keep, float("-inf"))
    out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    want, want_lse = fastattn.attention(q, k, v, mask=keep, return_lse=True, backend=backend)
    torch.testing.assert_close(out, want, atol=0, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=0, rtol=0)
    assert (out[:, :, 7] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 30.0])
def test_scale(backend: str, device: str, scale: float) -> None:
    inputs = qkv(1, (2, 2), (40, 50), (16, 16), device=device)
    assert_within_budget(attention_errors(*inputs, scale=scale, backend=backend))


def test_large_scores_do_not_overflow(backend: str, device: str) -> None:
    q, k, v = qkv(1, (1, 1), (50, 300), (64, 64), device=device)
    assert_within_budget(attention_errors(q * 30, k * 30, v, mask=fastattn.causal(), backend=backend))


@pytest.mark.parametrize("layout", ["heads-last", "packed", "sliced", "broadcast", "stepped"])
def test_strided_inputs(backend: str, device: str, layout: str) -> None:
    batch, heads, length, dim = (2, 2, 33, 24) if interpreted(backend) else (2, 3, 70, 24)
    g = torch.Generator().manual_seed(5)
    some = lambda *shape: torch.randn(shape, generator=g).to(device)  # noqa: E731
    if layout == "packed":
        packed = some(batch, length, 3, heads, dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    elif layout == "broadcast":
        q, k, v = (some(1, heads, length, dim).expand(batch, -1, -1, -1) for _ in range(3))
    elif layout == "stepped":
        q, k, v = (some(batch, heads, length, 2 * dim)[..., ::2] for _ in range(3))
    elif layout == "sliced":
        q, k, v = (some(batch, heads, length + 5, dim + 3)[:, :, 2:-3, 1:-2] for _ in range(3))
    else:
        q, k, v = (some(batch, length, heads, dim).transpose(1, 2) for _ in range(3))
    results = []
    for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fastattn.attention(*leaves, mask=fastattn.causal(), backend=backend)
        out.backward(torch.linspace(-1, 1, dim, device=device).expand(out.shape))
        results.append([out.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 2, 0, 0)], ids=str)
def test_empty(backend: str, device: str, shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_length, k_length = shape
    q = torch.randn(batch, heads, q_length, 8, device=device, requires_grad=True)
    k, v = (torch.randn(batch, heads, k_length, 8, device=device, requires_grad=True) for _ in range(2))
    out, lse = fastattn.attention(q, k, v, mask=fastattn.causal(), return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == float("-inf")).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and (x.grad == 0).all()


def test_empty_rows_are_zero_with_gradient_zero(backend: str, device: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, (2, 2), (20, 30), (8, 8), device=device))
    keep = torch.ones(20, 30, dtype=torch.bool, device=device)
    keep[3:9] = False
    out, lse = fastattn.attention(q, k, v, mask=keep, return_lse=True, backend=backend)
    assert (out[:, :, 3:9] == 0).all() and (lse[:, :, 3:9] == float("-inf")).all()
    assert (lse[:, :, :3] > float("-inf")).all()
    out.sum().backward()
    assert (q.grad[:, :, 3:9] == 0).all() and (q.grad[:, :, :3] != 0).any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_keys_behind_the_length_are_never_read(backend: str, device: str) -> None:
    """Not in backward either, where NaN behind a length came into dq and dk."""
    if backend == "reference":
        pytest.skip("plain PyTorch multiplies masked values by 0")
    length = 75 if interpreted(backend) else 300
    mask = fastattn.key_padding(torch.tensor([length // 2, length - 1], device=device))
    results = []
    for padding in (0.0, float("nan")):
        q, k, v = qkv(2, (2, 2), (20, length), (8, 8), device=device)
        k[0, :, length // 2 :] = v[0, :, length // 2 :] = padding
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, mask=mask, backend=backend)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_most_negative_finite_bias_is_no_mask(backend: str, device: str, dtype: torch.dtype) -> None:
    """It overflowed to -inf in base 2, and a row full of it counted as empty."""
    q, k, v = (x.requires_grad_() for x in qkv(1, (2, 2), (20, 40), (8, 8), device=device))
    bias = torch.full((1, 1, 20, 40), torch.finfo(dtype).min, dtype=dtype, device=device)
    bias[..., 10:, 3:9] = 0
    out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    want = torch.softmax((q.detach() @ k.detach().transpose(-1, -2)) / 8**0.5 + bias.float(), -1) @ v.detach()
    torch.testing.assert_close(out.detach(), want, atol=2e-6, rtol=1e-5)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_an_empty_row_has_gradient_zero_whatever_reaches_its_lse(backend: str, device: str) -> None:
    """Merging partial results squares or exponentiates an lse of -inf: 0 · inf was NaN in dq and dk."""
    q, k, v = (x.requires_grad_() for x in qkv(1, (2, 2), (20, 30), (8, 8), device=device))
    keep = torch.ones(20, 30, dtype=torch.bool, device=device)
    keep[4] = False
    out, lse = fastattn.attention(q, k, v, mask=keep, return_lse=True, backend=backend)
    (out.sum() + torch.logaddexp(lse, lse).exp().sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :, 4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_bias_of_another_dtype_and_layout(backend: str, device: str, dtype: torch.dtype) -> None:
    q_length, k_length = (20, 40) if interpreted(backend) else (70, 300)
    q, k, v = qkv(2, (2, 2), (q_length, k_length), (24, 32), device=device)
    g = torch.Generator().manual_seed(6)
    bias = torch.randn(k_length, q_length, generator=g).to(device, dtype).t()
    for some in (bias[None, None], bias[None, None].expand(2, 2, -1, -1), bias[None, None, :, ::2]):
        columns = some.shape[3]
        options = {"bias": some.float(), "backend": backend}
        found = fastattn.attention(q, k[:, :, :columns], v[:, :, :columns], bias=some, backend=backend)
        want = fastattn.attention(q, k[:, :, :columns], v[:, :, :columns], **options)
        torch.testing.assert_close(found, want)


def test_nan_comes_through(backend: str, device: str) -> None:
    q, k, v = qkv(1, (2, 2), (40, 300), (16, 16), device=device)
    q[0, 0, 5, 3] = float("nan")
    k[0, 1, 200, 2] = float("nan")
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    assert out[0, 0, 5].isnan().all() and lse[0, 0, 5].isnan()
    assert out[0, 0, 6].isfinite().all()
    assert out[0, 1].isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    q_length=st.integers(0, 140),
    k_length=st.integers(0, 300),
    dim=st.integers(1, 70),
    v_dim=st.integers(1, 70),
    causal=st.sampled_from([None, "bottom_right", "top_left"]),
    padded=st.booleans(),
    dropout=st.sampled_from([0.0, 0.25]),
)
def test_any_shape(batch, kv_heads, group, q_length, k_length, dim, v_dim, causal, padded, dropout) -> None:
    if not present_isas():
        pytest.skip("the C++ library is not here")
    q, k, v = qkv(batch, (kv_heads * group, kv_heads), (q_length, k_length), (dim, v_dim))
    mask = fastattn.Mask() if causal is None else fastattn.causal(causal)
    if padded:
        mask = mask & fastattn.key_padding(torch.arange(batch) * k_length // 2)
    assert_within_budget(attention_errors(q, k, v, mask=mask, dropout=dropout, seed=7, backend="cpu"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_of_the_reference(dropout: float) -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(2, (4, 2), (5, 7), (3, 4)))
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    mask = fastattn.causal() & fastattn.key_padding(torch.tensor([3, 7]))

    def call(q, k, v, bias):
        options = {"mask": mask, "dropout": dropout, "seed": 1, "return_lse": True}
        out, lse = fastattn.attention(q, k, v, bias=bias, **options)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))
    if dropout == 0:
        assert torch.autograd.gradgradcheck(call, (q, k, v, bias))
