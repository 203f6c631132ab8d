"""One test for each bug there was, named for it."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import fastattn
from fastattn.ops.attention.api import attention_backward
from fastattn.ops.attention.problem import resolve
from fastattn.testing import present_isas
from tests.attention.cases import device_of, here

BACKENDS = ["reference", *(["cpu"] if present_isas() else [])]


def test_masks_joined_by_or_under_compile() -> None:
    """Dynamo can't trace `not clause` of a tuple inside a generator expression."""

    def f(q: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, mask=fastattn.causal() | fastattn.prefix(prefix))

    torch._dynamo.reset()
    q, prefix = torch.randn(2, 1, 9, 4), torch.tensor([2, 5])
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, prefix), f(q, prefix))


def test_lengths_that_differ_with_the_sample_under_vmap_of_grad() -> None:
    """Their values were read where they are wrapped twice: "Cannot access data pointer of Tensor"."""

    def loss(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, mask=fastattn.key_padding(lengths)).square().sum()

    q, lengths = torch.randn(3, 2, 1, 9, 4), torch.tensor([[2, 5], [9, 0], [1, 1]])
    found = torch.vmap(torch.func.grad(loss))(q, lengths)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.func.grad(loss)(q[i], lengths[i]))


def test_a_compact_bias_far_from_the_keys() -> None:
    """With a start of each sequence its distances were cut off where queries stand beyond L_q + L_k."""
    q, k = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 5, 4)
    for starts in ([0, 3], [40, 7], [2, 90]):
        options = {"bias": fastattn.alibi(torch.tensor([0.3, 0.2, 0.1])), "q_start": torch.tensor(starts)}
        found = fastattn.attention(q, k, k, return_lse=True, **options)
        want = fastattn.attention(q, k, k, return_lse=True, backend="reference", **options)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_the_reference_under_autocast() -> None:
    """Its float32 scores were rounded to bfloat16 by autocast, and lse was bfloat16."""
    q, k, v = (torch.randn(1, 2, 50, 32).bfloat16() for _ in range(3))
    want = fastattn.attention(q, k, v, return_lse=True, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = fastattn.attention(q, k, v, return_lse=True, backend="reference")
    assert found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_as_long_as_ints_go(backend: str) -> None:
    """Their ends overflowed and nothing was seen."""
    q, k = torch.randn(2, 1, 9, 4), torch.randn(2, 1, 12, 4)
    far = sys.maxsize
    for mask, same in (
        (fastattn.sliding_window(3, far), fastattn.sliding_window(3, None)),
        (fastattn.sliding_window(far, 0), fastattn.causal()),
        (fastattn.prefix(far), None),
        (fastattn.causal() & fastattn.chunked(far), fastattn.causal()),
    ):
        for start in ({}, {"q_start": 2**31 - 1, "k_start": 2**31 - 9}):
            found = fastattn.attention(q, k, k, mask=mask, backend=backend, **start)
            torch.testing.assert_close(
                found, fastattn.attention(q, k, k, mask=same, backend=backend, **start)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_starts_in_a_narrow_dtype(backend: str, dtype: torch.dtype) -> None:
    """Distances were computed in it, and came round."""
    q, k, starts = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 300, 4), torch.tensor([120, 7])
    options = {"bias": fastattn.alibi(torch.tensor([0.3, 0.2, 0.1])), "mask": fastattn.causal()}
    want = fastattn.attention(q, k, k, q_start=starts, backend=backend, **options)
    found = fastattn.attention(q, k, k, q_start=starts.to(dtype), backend=backend, **options)
    assert torch.equal(found, want)


def test_slopes_of_each_take_no_square_of_the_batch() -> None:
    batch, length = 512, 300
    slopes = torch.rand(batch, 2, requires_grad=True)
    starts = torch.arange(batch)
    problem_of = lambda bias, q: resolve(  # noqa: E731
        q, q, fastattn.Mask(), bias, None, None, starts, None, 1.0, 0.0, 0.0
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        problem = problem_of(fastattn.alibi(slopes), torch.empty(batch, 2, length, 1))
    assert problem.relative is not None and problem.relative.shape == (batch, 2, 2 * length)
    taken = max(event.cpu_memory_usage for event in profile.key_averages())
    assert taken < 100 * 2**20, taken


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_and_a_compact_one(backend: str) -> None:
    """Their sum was NaN where a tile was masked by the first."""
    q = torch.randn(2, 2, 70, 8, requires_grad=True)
    bias = torch.randn(2, 1, 70, 70).masked_fill(torch.rand(2, 1, 70, 70) < 0.3, float("-inf"))
    bias[0, :, 3] = float("-inf")
    slopes = torch.tensor([0.5, 0.1], requires_grad=True)
    results = []
    for name in (backend, "reference"):
        out, lse = fastattn.attention(
            q, q, q, bias=bias + fastattn.alibi(slopes), return_lse=True, backend=name
        )
        assert (out[0, :, 3] == 0).all() and (lse[0, :, 3] == float("-inf")).all()
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), [q, slopes])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_that_sees_nothing(dtype: torch.dtype) -> None:
    """Decoding read rows of an empty intersection from before the first key."""
    q, k = torch.randn(2, 4, 1, 16).to(dtype), torch.randn(2, 4, 33, 16).to(dtype)
    out, lse = fastattn.attention(
        q, k, k, mask=fastattn.sliding_window(3, 0) & fastattn.prefix(2), return_lse=True
    )
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_backward_from_rows_under_autocast() -> None:
    """It computed in float32 what forward had computed in bfloat16."""
    q, k, v, dout = (torch.randn(1, 2, 20, 8) for _ in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        found = attention_backward(dout.bfloat16(), q, k, v, out, lse)
    want = attention_backward(dout.bfloat16(), *(x.bfloat16() for x in (q, k, v)), out, lse)
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_bounds_of_each_sample_under_vmap() -> None:
    """torch warned that they were not contiguous."""
    q, bounds = torch.randn(3, 1, 1, 9, 4), torch.tensor([[0, 4, 9], [0, 1, 8], [0, 9, 9]])

    def f(q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, mask=fastattn.documents(bounds) & fastattn.causal())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.vmap(f)(q, bounds)
    for i in range(3):
        torch.testing.assert_close(found[i], f(q[i], bounds[i]))


@pytest.fixture(params=["reference", "cpu", "triton"])
def each(request: pytest.FixtureRequest) -> str:
    """Every backend that takes CPU tensors here."""
    if request.param not in {name.partition("-")[0] for name in here()}:
        pytest.skip(f"{request.param} is not here")
    if device_of(request.param) != "cpu":
        pytest.skip("the tensors of these tests are on the CPU")
    return request.param


def test_a_sink_of_minus_infinity_over_a_row_that_sees_nothing(each: str) -> None:
    """-inf - -inf made it NaN, and its gradients."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (4, 5, 5))
    sinks = torch.tensor([float("-inf"), 0.5], requires_grad=True)
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[2] = False
    out, lse = fastattn.attention(q, k, v, mask=keep, sinks=sinks, return_lse=True, backend=each)
    assert (out[0, 0, 2] == 0).all() and lse[0, 0, 2] == float("-inf")
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, sinks))


def test_the_gradient_of_sinks_where_there_are_no_keys(each: str) -> None:
    """It was 0, although lse is the sink."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    sinks = torch.randn(2, requires_grad=True)
    _, lse = fastattn.attention(q, k, k, sinks=sinks, return_lse=True, backend=each)
    lse.sum().backward()
    torch.testing.assert_close(sinks.grad, torch.full((2,), 5.0))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("what", ["padding", "tail"])
def test_nan_where_nobody_looks(backend: str, what: str) -> None:
    """Probabilities of 0 times NaN reached every row of the tile, and the gradients."""
    if backend not in {name.partition("-")[0] for name in here()}:
        pytest.skip(f"{backend} is not here")
    if device_of(backend) != "cpu":
        pytest.skip("the tensors of this test are on the CPU")
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    there = 37
    mask = fastattn.key_padding(torch.tensor([there]))
    if what == "tail":
        mask = fastattn.documents(torch.tensor([0, 20, there])) & fastattn.causal()
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty[0 if what == "tail" else 1 :]:
        x[:, :, there:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    found = fastattn.attention(*dirty, mask=mask, backend=backend)
    want = fastattn.attention(*clean, mask=mask, backend=backend)
    torch.testing.assert_close(found, want)
    found.sum().backward()
    want.sum().backward()
    for a, b in zip(dirty, clean, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_float8_that_requires_a_gradient() -> None:
    """Its gradient was silently dropped."""
    x = torch.randn(1, 2, 5, 16).to(torch.float8_e4m3fn).requires_grad_()
    with pytest.raises(NotImplementedError, match="attention_float8 has no gradient"):
        fastattn.attention_float8(x, x, x)


def test_rows_that_are_further_apart_than_32_bits_tell() -> None:
    """Offsets within a tile are 32 bits: such tensors are copied."""
    pytest.importorskip("triton")
    from fastattn.ops.attention.triton.arguments import unit_last

    far = torch.empty((), device="meta").as_strided((1, 1, 128, 8), (0, 0, 2**24, 1))
    near = torch.empty((), device="meta").as_strided((1, 1, 128, 8), (0, 0, 2**22, 1))
    assert unit_last(far).stride(2) == 8 and unit_last(near) is near
