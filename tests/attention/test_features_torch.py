"""The features inside torch's subsystems: opcheck, compile with one graph for all lengths, vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.ops.attention.problem import resolve
from fastattn.testing import FEATURES, Sizes, options_of, present_isas, sizes_for
from tests.attention.cases import device_of, fitted, route

pytestmark = pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")
OPS = torch.ops.fastattn
SIZES = Sizes(2, 4, 2, 20, 30, 8, 6)


# One of each kind that the ops are given: intervals, blocks, dense, vectors over distance, origins, sinks.
KINDS = [
    ["documents-causal", "alibi-of-each"],
    ["either-of-three", "sinks", "softcap"],
    ["block-sparse-causal", "relative-position", "dropout"],
    ["dense-mask", "bias-1HQK", "starts-of-each", "alibi"],
]


@pytest.mark.parametrize(
    ("names", "backend"),
    [
        *(pytest.param(names, "cpu", id="-".join(names)) for names in KINDS),
        pytest.param(["dense-mask", "bias-1HQK", "sinks"], "triton", id="triton"),
    ],
)
def test_opcheck(names: list[str], backend: str) -> None:
    with route(backend):
        sizes, device = fitted(backend, SIZES), device_of(backend)
    q, k, v = sizes.tensors(device=device)
    options = options_of(names, sizes, device=device)
    seed = torch.tensor([options["seed"]], device=device) if "seed" in options else None
    with torch.no_grad():
        problem = resolve(
            *(q, k, as_mask(options.get("mask")), as_bias(options.get("bias")), options.get("sinks"), seed),
            *(options.get("q_start"), options.get("k_start")),
            *(0.3, options.get("softcap", 0.0), options.get("dropout", 0.0)),
        )
    torch.library.opcheck(OPS.attention_forward, (q, k, v, *problem, backend))
    out, lse = OPS.attention_forward(q, k, v, *problem, backend)
    dlse = torch.randn_like(lse).masked_fill(lse == float("-inf"), 0.0)
    saved = (torch.randn_like(out), dlse, q, k, v, out, lse, *problem, backend)
    own = (
        1 * (problem.bias is not None) + 2 * (problem.relative is not None) + 4 * (problem.sinks is not None)
    )
    torch.library.opcheck(OPS.attention_backward, (*saved, 8))
    if own:
        torch.library.opcheck(OPS.attention_backward, (*saved, own))


def everything(q: Tensor, k: Tensor, v: Tensor, some: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mask = fastattn.documents(some["cu"]) & fastattn.sliding_window(9, 0) | fastattn.documents(
        some["cu"]
    ) & fastattn.prefix(3)
    first = fastattn.attention(
        q,
        k,
        v,
        mask=mask & fastattn.key_padding(some["lengths"]),
        bias=some["bias"],
        softcap=3.0,
        sinks=some["sinks"],
        dropout=0.1,
        seed=3,
    )
    bias = fastattn.alibi(some["slopes"]) + fastattn.relative_position(some["table"], max_distance=9)
    window = fastattn.causal() & fastattn.chunked(7) | fastattn.prefix(some["lengths"] // 4)
    second, lse = fastattn.attention(q, k, v, mask=window, bias=bias, q_start=5, k_start=2, return_lse=True)
    blocks = fastattn.block_sparse(some["blocks"], 10) & fastattn.causal("top_left")
    third = fastattn.attention(q, k, v, mask=blocks)
    return first.sin() + second + third, lse


def inputs(length: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 4, length, 8, generator=g).requires_grad_() for _ in range(3))
    some = {
        "bias": torch.randn(1, 4, length, length, generator=g).requires_grad_(),
        "sinks": torch.randn(4, generator=g).requires_grad_(),
        "slopes": torch.rand(4, generator=g).requires_grad_(),
        "table": torch.randn(8, 4, generator=g).requires_grad_(),
        "lengths": torch.tensor([length, length // 2]),
        "cu": torch.tensor([0, length // 3, length - 1]),
        "blocks": torch.rand(-(-length // 10), -(-length // 10), generator=g) < 0.7,
    }
    return [q, k, v], some


def step(function: Any, length: int) -> list[Tensor]:
    qkv, some = inputs(length)
    out, lse = function(*qkv, some)
    leaves = [*qkv, *(x for x in some.values() if x.requires_grad)]
    return [out, lse, *torch.autograd.grad(out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum(), leaves)]


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, backend="inductor", fullgraph=True)
    for a, b in zip(step(compiled, 30), step(everything, 30), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_recompile_for_a_new_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for length in (50, 33, 65):
        for a, b in zip(step(compiled, length), step(everything, length), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_one_graph_on_triton_for_all_lengths() -> None:
    """Its kernels are not looked into: the graph holds the ops."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        bias = fastattn.alibi(slopes)
        found = fastattn.attention(q, k, v, mask=fastattn.causal(), bias=bias, backend=backend)
        assert isinstance(found, Tensor)
        return found.sin()

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    with route("triton") as backend:
        for length in (20, 17):
            leaves = [*Sizes(1, 2, 1, length, length, 8, 8).tensors(), torch.tensor([0.5, 0.2])]
            leaves = [x.to(device_of(backend)).requires_grad_() for x in leaves]
            for a, b in zip(
                torch.autograd.grad(compiled(*leaves).sum(), leaves),
                torch.autograd.grad(call(*leaves).sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_no_recompile_for_a_new_start() -> None:
    """A ring's shards, or the steps of decoding: q_start changes with every call."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(q: Tensor, k: Tensor, q_start: int) -> Tensor:
        found = fastattn.attention(q, k, k, mask=fastattn.sliding_window(5, 0), q_start=q_start, k_start=1)
        assert isinstance(found, Tensor)
        return found

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    q, k, _ = Sizes(1, 2, 2, 6, 40, 8, 8).tensors()
    for q_start in (10, 11, 25, 31):
        torch.testing.assert_close(compiled(q, k, q_start), call(q, k, q_start))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "dropout"])
def test_vmap_over_queries_keys_and_values(name: str) -> None:
    """The mask and the bias are the same for all."""
    sizes = sizes_for([name], SIZES)
    options = options_of([name], sizes)
    q, k, v = (torch.stack([x, x.flip(2), x * 2]) for x in sizes.tensors())
    found = torch.vmap(lambda q, k, v: fastattn.attention(q, k, v, backend="cpu", **options))(q, k, v)
    for i in range(3):
        want = fastattn.attention(q[i], k[i], v[i], backend="cpu", **options)
        torch.testing.assert_close(found[i], want)


def test_vmap_of_grad_over_everything() -> None:
    """Parameters and masks differ with the sample, too."""

    def loss(q, k, v, slopes, sinks, table, lengths, keep):
        bias = fastattn.alibi(slopes) + fastattn.relative_position(table, max_distance=9)
        mask = fastattn.sliding_window(9, 3) & fastattn.key_padding(lengths) & keep | fastattn.prefix(
            lengths // 4
        )
        out, lse = fastattn.attention(
            q, k, v, mask=mask, bias=bias, sinks=sinks, softcap=2.0, return_lse=True
        )
        return out.square().sum() + lse.sum()

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 20, 8, generator=g) for _ in range(3))
    slopes, sinks = (torch.rand(3, 4, generator=g) for _ in range(2))
    table = torch.randn(3, 8, 4, generator=g)
    lengths = torch.tensor([[20, 3], [9, 20], [1, 17]])
    keep = torch.rand(3, 1, 1, 20, 20, generator=g) < 0.8
    inputs = (q, k, v, slopes, sinks, table, lengths, keep)
    gradient = torch.func.grad(loss, argnums=tuple(range(6)))
    found = torch.vmap(gradient)(*inputs)
    for i in range(3):
        for a, b in zip(found, gradient(*(x[i] for x in inputs)), strict=True):
            torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-4)


def test_gradcheck_of_the_reference() -> None:
    """Every derivative there is, twice."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, 5, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    slopes, sinks = (torch.rand(2, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    table = torch.randn(4, 2, generator=g, dtype=torch.float64).requires_grad_()
    mask = fastattn.sliding_window(2, 1) & fastattn.key_padding(torch.tensor([5, 2]))

    def call(q, k, v, slopes, sinks, table):
        bias = fastattn.alibi(slopes) + fastattn.relative_position(table, max_distance=4)
        options = {"mask": mask, "bias": bias, "sinks": sinks, "softcap": 1.3, "return_lse": True}
        return fastattn.attention(q, k, v, backend="reference", **options)

    leaves = (q, k, v, slopes, sinks, table)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
