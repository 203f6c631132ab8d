"""Every feature on every backend, instruction set and dtype: forward and all gradients against float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.testing import (
    BIASES,
    FEATURES,
    Errors,
    Sizes,
    assert_within_budget,
    attention_errors,
    options_of,
    present_isas,
    sizes_for,
)
from tests.attention.cases import KERNELS, ROUTES, device_of, fitted, interpreted, route

Options = dict[str, Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")
# What a half dtype can change in a kernel: in the interpreter these, anywhere else all.
OF_BFLOAT16 = {
    "causal",
    "documents-causal",
    "block-sparse",
    "dense-mask",
    "bias-BHQK",
    "half-bias-and-slopes",
    "relative-position",
    "softcap",
    "half-sinks",
    "dropout",
}
OF_DTYPE = {
    torch.float32: set(FEATURES),
    torch.bfloat16: OF_BFLOAT16,
    torch.float16: {"causal", "bias-BHQK", "dropout"},
}
# The sums of each kind of bias, and over broadcast dimensions.
OF_BIASES = {"bias-BHQK", "bias-11QK", "bias-BH1K", "alibi-of-each", "relative-position", "sinks"}


@pytest.fixture(params=ROUTES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with route(request.param) as name:
        yield name


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


@pytest.mark.parametrize(
    ("backend", "name", "dtype"),
    [
        pytest.param(r, name, dtype, id=f"{r}-{name}-{dtype}")
        for r in ROUTES
        for name in FEATURES
        for dtype in DTYPES
        if not interpreted(r) or name in OF_DTYPE[dtype]
    ],
    indirect=["backend"],
)
def test_feature(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """Few heads for many queries, grouped, and d_v ≠ d throughout."""
    sizes = fitted(backend, Sizes(q_length=70 if dtype == torch.float32 else 37))
    sizes = sizes_for([name], sizes)
    options = options_of([name], sizes, device=device)
    assert_within_budget(attention_errors(*sizes.tensors(dtype, device=device), backend=backend, **options))


SHAPES = {
    "one head": Sizes(1, 1, 1, 65, 65, 16, 16),
    "multi-query": Sizes(1, 6, 1, 33, 40, 8, 8),
    "more queries than keys": Sizes(2, 2, 2, 150, 50, 64, 64),
    "one query": Sizes(3, 4, 2, 1, 150, 32, 32),
    "decoding": Sizes(2, 4, 2, 3, 150, 24, 17),
    "wide heads": Sizes(1, 2, 1, 40, 70, 130, 200),
}


def errors_of(
    backend: str, names: list[str], sizes: Sizes, dtype: torch.dtype = torch.float32
) -> list[Errors]:
    sizes, device = sizes_for(names, sizes), device_of(backend)
    options = options_of(names, sizes, device=device)
    return attention_errors(*sizes.tensors(dtype, device=device), backend=backend, **options)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FEATURES)
def test_shapes(backend: str, name: str, shape: str) -> None:
    assert_within_budget(errors_of(backend, [name], SHAPES[shape]))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("name", FEATURES)
def test_decoding_in_half_precision(backend: str, name: str) -> None:
    assert_within_budget(errors_of(backend, [name], SHAPES["decoding"], torch.bfloat16))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("name", FEATURES)
def test_many_tiles(backend: str, name: str) -> None:
    """Long enough that whole tiles are skipped, and some are masked in part."""
    assert_within_budget(errors_of(backend, [name], Sizes(1, 2, 1, 500, 1100, 16, 16)))


def leaves_of(sizes: Sizes, names: list[str], device: str = "cpu") -> tuple[list[Tensor], Options]:
    """q, k, v and what else can have a gradient, and the options made of these leaves."""
    options = options_of(names, sizes, device=device)
    bias, sinks = as_bias(options.get("bias")), options.get("sinks")
    others = [bias.dense, *(part.parameter for part in bias.compact), sinks]
    leaves = [*sizes.tensors(device=device), *(x for x in others if x is not None)]
    return [x.requires_grad_() for x in leaves], options


def outcome(sizes: Sizes, names: list[str], backend: str = "cpu", **changes: Any) -> list[Tensor]:
    """out, lse and every gradient of a loss that both have a part in."""
    leaves, options = leaves_of(sizes, names, device_of(backend))
    out, lse = fastattn.attention(*leaves[:3], return_lse=True, backend=backend, **(options | changes))
    weight = torch.linspace(-1, 1, out.shape[2], device=out.device)[:, None]
    loss = (out * weight).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("backend", "name"),
    [(r, name) for r in ROUTES for name in (*BIASES, "sinks") if not interpreted(r) or name in OF_BIASES],
    indirect=["backend"],
)
def test_only_the_bias_or_the_sinks_need_a_gradient(backend: str, device: str, name: str) -> None:
    sizes = fitted(backend, Sizes(q_length=33, k_length=47))
    q, k, v = sizes.tensors(device=device)
    leaves, options = leaves_of(sizes, [name, "causal"], device)
    found = torch.autograd.grad(
        fastattn.attention(q, k, v, backend=backend, **options).square().sum(), leaves[3:]
    )
    leaves, options = leaves_of(sizes, [name, "causal"], device)
    exact = torch.autograd.grad(
        fastattn.attention(*leaves[:3], backend="reference", **options).square().sum(), leaves[3:]
    )
    assert len(found) > 0
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["window", "sinks", "softcap", "alibi", "bias-1HQK", "documents-causal", "dropout"]
)
def test_gradient_of_lse_alone(backend: str, device: str, name: str) -> None:
    """z-loss: nothing reaches out."""
    grads = []
    for which, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        sizes = fitted(backend, Sizes(q_length=33, k_length=47))
        leaves, options = leaves_of(sizes, [name], device)
        q, k, v = (x.to(dtype) for x in leaves[:3])
        lse = fastattn.attention(q, k, v, return_lse=True, backend=which, **options)[1]
        loss = lse.masked_fill(lse == float("-inf"), 0.0).square().mean()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    assert grads[0][2] is None or (grads[0][2] == 0).all()
    for a, b in zip(grads[0][:2] + grads[0][3:], grads[1][:2] + grads[1][3:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


GLOBAL = [
    "causal",
    "relative-position-decoder",
    "dropout",
    "sinks",
    "window",
    "window-both-sides",
    "prefix",
    "first-keys-and-window",
    "chunked",
    "alibi",
    "softcap",
]


@pytest.mark.parametrize(
    ("backend", "name"),
    # In the interpreter the first, which differ in how they go by positions.
    [(r, name) for r in ROUTES for name in GLOBAL[: 3 if interpreted(r) else None]],
    indirect=["backend"],
)
def test_shards_make_the_whole(backend: str, device: str, name: str) -> None:
    """A sequence cut into shards of queries and keys, each at its own position, dropout included."""
    length = 66 if interpreted(backend) else 150
    middle, parts = 61 * length // 150, (0, 37 * length // 150, 129 * length // 150, length)
    sizes = Sizes(1, 2, 1, length, length, 16, 16)
    names = [name] if name in ("causal", "prefix") else [name, "causal"]
    results = []
    for whole in (True, False):
        leaves, options = leaves_of(sizes, names, device)
        q, k, v = leaves[:3]
        sinks = options.pop("sinks", None)
        if whole:
            out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend, **options)
        else:
            rows = []
            for a, b in ((0, middle), (middle, length)):
                found = [
                    fastattn.attention(
                        *(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]),
                        sinks=sinks if c == 0 else None,
                        q_start=a,
                        k_start=c,
                        return_lse=True,
                        backend=backend,
                        **options,
                    )
                    for c, d in pairwise(parts)
                ]
                rows.append(fastattn.merge_attention(*zip(*found, strict=True)))
            out, lse = (torch.cat(x, 2) for x in zip(*rows, strict=True))
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, length, device=device)[:, None]).sum() + lse.sin().sum(), leaves
        )
        results.append([out, lse, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strided_masks_and_biases(backend: str, device: str, layout: str) -> None:
    sizes = Sizes(heads=2, kv_heads=1, q_length=33, k_length=70)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in sizes.tensors(device=device))
    g = torch.Generator().manual_seed(4)
    shapes = {"transposed": (2, 2, 70, 33), "expanded": (1, 2, 33, 1), "sliced": (2, 2, 40, 150)}
    change = {
        "transposed": lambda x: x.mT,
        "expanded": lambda x: x.expand(2, 2, 33, 70),
        "sliced": lambda x: x[:, :, 3:36, 2:142:2],
    }[layout]
    bias = change(torch.randn(shapes[layout], generator=g).to(device))
    blocks, keep = (change((torch.rand(shapes[layout], generator=g) < 0.7).to(device)) for _ in range(2))
    mask = fastattn.block_sparse(blocks, 1) & keep
    sinks = torch.randn(4, generator=g).to(device)[::2]
    slopes = torch.rand(2, 2, generator=g).to(device).T
    options = {"mask": mask, "bias": fastattn.alibi(slopes) + bias, "sinks": sinks}
    assert_within_budget(attention_errors(q, k, v, backend=backend, **options))


EMPTY: dict[str, tuple[fastattn.Mask, slice]] = {
    "no key in the window": (fastattn.sliding_window(0, 0, align="top_left"), slice(20, 30)),
    "behind the last document": (
        fastattn.documents(torch.tensor([0, 3, 9]), torch.tensor([0, 5, 20])),
        slice(9, 30),
    ),
    "a document without keys": (
        fastattn.documents(torch.tensor([0, 8, 30]), torch.tensor([0, 20, 20])),
        slice(8, 30),
    ),
    "no block": (fastattn.block_sparse(torch.tensor([[True], [False], [True]]), (10, 20)), slice(10, 20)),
    "no prefix": (fastattn.prefix(0), slice(0, 30)),
    "no length": (fastattn.key_padding(torch.tensor([0, 0])), slice(0, 30)),
}


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_rows(backend: str, device: str, name: str, with_sinks: bool) -> None:
    """out 0, lse -inf (or the sink), gradients 0 and never NaN, whatever reaches them."""
    mask, empty = EMPTY[name]
    sizes = Sizes(2, 2, 1, 30, 20, 8, 8)
    q, k, v = (x.requires_grad_() for x in sizes.tensors(device=device))
    sinks = torch.tensor([0.5, -3.0], device=device, requires_grad=True) if with_sinks else None
    options = {
        "mask": mask.to(device),
        "softcap": 2.0,
        "bias": fastattn.alibi(torch.ones(2, device=device)),
    }
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend, **options)
    assert (out[:, :, empty] == 0).all()
    if sinks is None:
        assert (lse[:, :, empty] == float("-inf")).all()
    else:
        torch.testing.assert_close(lse[:, :, empty], sinks[:, None].expand_as(lse[:, :, empty]))
    grads = torch.autograd.grad(out.square().sum() + torch.logaddexp(lse, lse).exp().sum(), [q, k, v])
    assert all(x.isfinite().all() for x in grads)
    assert (grads[0][:, :, empty] == 0).all()


@needs_kernels
@pytest.mark.parametrize("sizes", [Sizes(1, 2, 1, 260, 260, 16, 16), Sizes(1, 2, 1, 3, 700, 16, 16)], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_bitwise_for_any_number_of_threads(name: str, sizes: Sizes) -> None:
    sizes = sizes_for([name], sizes)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outcome(sizes, [name, "dropout"] if name != "starts-of-each" else [name]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def of_sequence(b: int, options: Options, batch: int) -> Options:
    """The options for sequence b of a batch alone: what has a size of `batch` first belongs to sequences."""

    def pick(x: Tensor) -> Tensor:
        return x[b : b + 1] if x.shape[0] == batch else x

    bias = as_bias(options.get("bias"))
    compact = tuple(part.of(pick(part.parameter)) if part.batch > 1 else part for part in bias.compact)
    dense = None if bias.dense is None else pick(bias.dense)
    start = options.get("q_start")
    return options | {
        "mask": as_mask(options.get("mask")).map(pick),
        "bias": fastattn.Bias(dense, compact),
        "q_start": pick(start) if isinstance(start, Tensor) else start,
    }


def test_the_same_bits_again() -> None:
    """On a GPU too, where programs run in any order: no sum is left to it."""
    backend = KERNELS[-1]
    if device_of(backend) == "cpu":
        pytest.skip("of a GPU; on CPU test_bitwise_for_any_number_of_threads has it")
    sizes = Sizes(2, 8, 2, 500, 700, 64, 64)
    for names in (
        ["causal", "bias-1HQK", "sinks"],
        ["dropout", "alibi", "dense-mask"],
        ["relative-position"],
    ):
        first = outcome(sizes, names, backend)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, outcome(sizes, names, backend), strict=True))


# Masks and biases by sequence, by the ways that a kernel comes to its rows.
OF_SEQUENCES = {"causal", "documents", "key-padding", "block-sparse-causal", "alibi-of-each", "bias-BHQK"}


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "q_length"),
    [
        pytest.param(r, name, dtype, q_length, id=f"{r}-{name}-{dtype}-{q_length}")
        for r in ("cpu", "triton")
        for name in FEATURES
        for dtype in (torch.float32, torch.bfloat16)
        for q_length in (70, 2)
        if name != "dropout"
        and (not interpreted(r) or (name in OF_SEQUENCES and dtype == torch.float32 and q_length == 2))
    ],
    indirect=["backend"],
)
def test_a_sequence_does_not_depend_on_its_neighbours(
    backend: str, device: str, name: str, dtype: torch.dtype, q_length: int
) -> None:
    """Bitwise, forward and backward; dropout alone goes by the place in the batch."""
    sizes = sizes_for([name], fitted(backend, Sizes(3, 4, 2, q_length, 150, 16, 16)))
    options = options_of([name], sizes, device=device)

    def run(tensors: list[Tensor], options: Options) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = fastattn.attention(*leaves, return_lse=True, backend=backend, **options)
        loss = out.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    inputs = sizes.tensors(dtype, device=device)
    together = run(list(inputs), options)
    for b in range(3):
        alone = run([x[b : b + 1] for x in inputs], of_sequence(b, options, 3))
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True)), b
