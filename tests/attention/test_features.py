"""Every feature on every backend, instruction set and dtype: forward and all gradients against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.testing import assert_within_budget, attention_errors, present_isas
from tests.attention.cases import (
    BIASES,
    FEATURES,
    ROUTES,
    Options,
    Sizes,
    options_of,
    route,
    sizes_for,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")


@pytest.fixture(params=ROUTES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with route(request.param) as name:
        yield name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(backend: str, name: str, dtype: torch.dtype) -> None:
    """Few heads for many queries, grouped, and d_v ≠ d throughout."""
    sizes = sizes_for([name], Sizes(q_length=70 if dtype == torch.float32 else 37))
    errors = attention_errors(*sizes.tensors(dtype), backend=backend, **options_of([name], sizes))
    assert_within_budget(errors)


SHAPES = {
    "one head": Sizes(1, 1, 1, 65, 65, 16, 16),
    "multi-query": Sizes(1, 6, 1, 33, 40, 8, 8),
    "more queries than keys": Sizes(2, 2, 2, 150, 50, 64, 64),
    "one query": Sizes(3, 4, 2, 1, 150, 32, 32),
    "decoding": Sizes(2, 4, 2, 3, 150, 24, 17),
    "wide heads": Sizes(1, 2, 1, 40, 70, 130, 200),
}


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FEATURES)
def test_shapes(name: str, shape: str) -> None:
    sizes = sizes_for([name], SHAPES[shape])
    assert_within_budget(attention_errors(*sizes.tensors(), backend="cpu", **options_of([name], sizes)))


@needs_kernels
@pytest.mark.parametrize("name", FEATURES)
def test_decoding_in_half_precision(name: str) -> None:
    sizes = sizes_for([name], SHAPES["decoding"])
    errors = attention_errors(*sizes.tensors(torch.bfloat16), backend="cpu", **options_of([name], sizes))
    assert_within_budget(errors)


@needs_kernels
@pytest.mark.parametrize("name", FEATURES)
def test_many_tiles(name: str) -> None:
    """Long enough that whole tiles are skipped, and some are masked in part."""
    sizes = sizes_for([name], Sizes(1, 2, 1, 500, 1100, 16, 16))
    assert_within_budget(attention_errors(*sizes.tensors(), backend="cpu", **options_of([name], sizes)))


def leaves_of(sizes: Sizes, options: Options) -> tuple[list[Tensor], Options]:
    """q, k, v and what else can have a gradient, and the options made of these leaves."""
    bias, sinks = as_bias(options.get("bias")), options.get("sinks")
    dense = None if bias.dense is None else bias.dense.requires_grad_()
    for part in bias.compact:
        part.parameter.requires_grad_()
    if sinks is not None:
        sinks.requires_grad_()
    others = [dense, *(part.parameter for part in bias.compact), sinks]
    return [*(x.requires_grad_() for x in sizes.tensors()), *(x for x in others if x is not None)], options


def outcome(sizes: Sizes, names: list[str], backend: str = "cpu", **changes: Any) -> list[Tensor]:
    """out, lse and every gradient of a loss that both have a part in."""
    leaves, options = leaves_of(sizes, options_of(names, sizes))
    out, lse = fastattn.attention(*leaves[:3], return_lse=True, backend=backend, **(options | changes))
    weight = torch.linspace(-1, 1, out.shape[2])[:, None]
    loss = (out * weight).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", [*BIASES, "sinks"])
def test_only_the_bias_or_the_sinks_need_a_gradient(backend: str, name: str) -> None:
    sizes = Sizes(q_length=33, k_length=47)
    q, k, v = sizes.tensors()
    leaves, options = leaves_of(sizes, options_of([name, "causal"], sizes))
    found = torch.autograd.grad(
        fastattn.attention(q, k, v, backend=backend, **options).square().sum(), leaves[3:]
    )
    leaves, options = leaves_of(sizes, options_of([name, "causal"], sizes))
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
def test_gradient_of_lse_alone(backend: str, name: str) -> None:
    """z-loss: nothing reaches out."""
    grads = []
    for which, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        sizes = Sizes(q_length=33, k_length=47)
        leaves, options = leaves_of(sizes, options_of([name], sizes))
        q, k, v = (x.to(dtype) for x in leaves[:3])
        lse = fastattn.attention(q, k, v, return_lse=True, backend=which, **options)[1]
        loss = lse.masked_fill(lse == float("-inf"), 0.0).square().mean()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    assert grads[0][2] is None or (grads[0][2] == 0).all()
    for a, b in zip(grads[0][:2] + grads[0][3:], grads[1][:2] + grads[1][3:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


GLOBAL = [
    "causal",
    "window",
    "window-both-sides",
    "prefix",
    "first-keys-and-window",
    "chunked",
    "alibi",
    "relative-position-decoder",
    "softcap",
    "sinks",
    "dropout",
]


@pytest.mark.parametrize("name", GLOBAL)
def test_shards_make_the_whole(backend: str, name: str) -> None:
    """A sequence cut into shards of queries and keys, each at its own position, dropout included."""
    sizes = Sizes(1, 2, 1, 150, 150, 16, 16)
    names = [name] if name in ("causal", "prefix") else [name, "causal"]
    results = []
    for whole in (True, False):
        leaves, options = leaves_of(sizes, options_of(names, sizes))
        q, k, v = leaves[:3]
        sinks = options.pop("sinks", None)
        if whole:
            out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend, **options)
        else:
            rows = []
            for a, b in ((0, 61), (61, 150)):
                parts = [
                    fastattn.attention(
                        *(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]),
                        sinks=sinks if c == 0 else None,
                        q_start=a,
                        k_start=c,
                        return_lse=True,
                        backend=backend,
                        **options,
                    )
                    for c, d in ((0, 37), (37, 129), (129, 150))
                ]
                rows.append(fastattn.merge_attention(*zip(*parts, strict=True)))
            out, lse = (torch.cat(x, 2) for x in zip(*rows, strict=True))
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, 150)[:, None]).sum() + lse.sin().sum(), leaves
        )
        results.append([out, lse, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strided_masks_and_biases(backend: str, layout: str) -> None:
    sizes = Sizes(q_length=33, k_length=70)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in sizes.tensors())
    g = torch.Generator().manual_seed(4)
    shapes = {"transposed": (2, 4, 70, 33), "expanded": (1, 4, 33, 1), "sliced": (2, 4, 40, 150)}
    change = {
        "transposed": lambda x: x.mT,
        "expanded": lambda x: x.expand(2, 4, 33, 70),
        "sliced": lambda x: x[:, :, 3:36, 2:142:2],
    }[layout]
    bias = change(torch.randn(shapes[layout], generator=g))
    blocks = change(torch.rand(shapes[layout], generator=g) < 0.7)
    mask = fastattn.block_sparse(blocks, 1) & change(torch.rand(shapes[layout], generator=g) < 0.7)
    sinks = torch.randn(8, generator=g)[::2]
    slopes = torch.rand(4, 2, generator=g).T
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
def test_empty_rows(backend: str, name: str, with_sinks: bool) -> None:
    """out 0, lse -inf (or the sink), gradients 0 and never NaN, whatever reaches them."""
    mask, empty = EMPTY[name]
    sizes = Sizes(2, 2, 1, 30, 20, 8, 8)
    q, k, v = (x.requires_grad_() for x in sizes.tensors())
    sinks = torch.tensor([0.5, -3.0], requires_grad=True) if with_sinks else None
    options = {"mask": mask, "softcap": 2.0, "bias": fastattn.alibi(torch.ones(2))}
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


@needs_kernels
@pytest.mark.parametrize("q_length", [70, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in FEATURES if name != "dropout"])
def test_a_sequence_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype, q_length: int) -> None:
    """Bitwise, forward and backward; dropout alone goes by the place in the batch."""
    sizes = sizes_for([name], Sizes(3, 4, 2, q_length, 150, 16, 16))
    options = options_of([name], sizes)

    def run(tensors: list[Tensor], options: Options) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = fastattn.attention(*leaves, return_lse=True, backend="cpu", **options)
        loss = out.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    together = run(list(sizes.tensors(dtype)), options)
    for b in range(3):
        alone = run([x[b : b + 1] for x in sizes.tensors(dtype)], of_sequence(b, options, 3))
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True)), b
