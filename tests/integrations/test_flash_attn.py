"""flash_attn_func and its packed forms against plain float64 PyTorch: results, gradients, and corners."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

import fastattn.integrations.flash_attn as door
from tests.integrations import flash_attn_oracle as oracle
from tests.integrations.flash_attn_oracle import assert_close

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{TAIL}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": "(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{TAIL})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, "
    "num_splits=0, return_softmax_lse=False)",
}


def signature(function: object) -> str:
    """Names, order and defaults, without annotations."""
    given = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name: str) -> None:
    assert signature(getattr(door, name)) == SIGNATURES[name]


def inputs(
    q_length: int,
    k_length: int,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    shapes = (2, q_length, heads, dim), (2, k_length, kv_heads, dim), (2, k_length, kv_heads, dim)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def check(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], leaves: list[Tensor], names: str) -> None:
    """Results, and the gradients of a loss over out and lse, where that is finite."""
    out, lse = found[:2]
    assert_close(out, exact[0], "out")
    assert_close(lse, exact[1], "lse")
    dout, dlse = torch.randn_like(exact[0]), torch.randn_like(exact[1])

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return (out.double() * dout).sum() + torch.where(lse.isinf(), 0.0, lse.double() * dlse).sum()

    ours = torch.autograd.grad(loss(out, lse), leaves)
    right = torch.autograd.grad(loss(*exact[:2]), leaves)
    for name, a, b in zip(names.split(), ours, right, strict=True):
        assert_close(a, b, name)


# The reference backend's, and the kernels' where there are any.
DTYPES = (torch.float64, torch.float32)
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 3)},
    "window, left open": {"window_size": (-1, 5)},
    "window, right open": {"window_size": (4, -1)},
    "window of own key": {"window_size": (0, 0)},
    "causal window": {"causal": True, "window_size": (9, 4)},
    "softcap": {"causal": True, "softcap": 1.5},
    "scale": {"softmax_scale": 0.31},
    "alibi": {"alibi": 1},
    "causal alibi by batch": {"alibi": 2, "causal": True},
    "all": {"alibi": 2, "causal": True, "window_size": (6, 0), "softcap": 2.0, "softmax_scale": 0.4},
}


@pytest.mark.parametrize("lengths", [(33, 33), (13, 40), (37, 11), (1, 19)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients(dtype: torch.dtype, case: str, lengths: tuple[int, int]) -> None:
    options = dict(CASES[case])
    leaves = inputs(*lengths, dtype=dtype)
    alibi = options.pop("alibi", 0)
    if alibi:
        slopes = torch.rand((4,) if alibi == 1 else (2, 4), dtype=dtype).requires_grad_()
        leaves.append(slopes)
        options["alibi_slopes"] = slopes
    q, k, v = leaves[:3]
    found = door.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert found[1].shape == (2, 4, lengths[0])
    assert found[2].numel() == 0
    assert torch.equal(door.flash_attn_func(q, k, v, **options), found[0])
    check(found, oracle.attention(q, k, v, **options), leaves, "dq dk dv" + " dslopes" * bool(alibi))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    leaves = inputs(45, 70, dtype=dtype)
    found = door.flash_attn_func(*leaves, causal=True, window_size=(20, 0), return_attn_probs=True)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    check(found, oracle.attention(*leaves, causal=True, window_size=(20, 0)), leaves, "dq dk dv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(dtype: torch.dtype) -> None:
    leaves = inputs(9, 4, dtype=dtype)
    out, lse, _ = door.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5])) and out[:, 5:].abs().min() > 0
    assert torch.equal(lse.isneginf(), torch.arange(9).lt(5).expand_as(lse))
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(33, 33), (13, 530)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_and_its_pattern(dtype: torch.dtype, shape: tuple[int, int], softcap: float) -> None:
    leaves = inputs(*shape, dtype=dtype)
    options = {"causal": True, "softcap": softcap, "dropout_p": 0.25}
    torch.manual_seed(3)
    found = door.flash_attn_func(*leaves, **options, return_attn_probs=True)
    pattern = found[2]
    assert pattern.shape == (2, 4, *shape) and not pattern.requires_grad
    seen = oracle.visible(*shape, True, (-1, -1)).expand_as(pattern)
    assert pattern[~seen].abs().max() == 0
    dropped = (pattern[seen] < 0).double().mean()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / int(seen.sum()))
    exact = oracle.attention(*leaves, **options, dropped=pattern < 0)
    assert_close(pattern.abs(), exact[2], "S_dmask")
    torch.manual_seed(3)
    assert torch.equal(door.flash_attn_func(*leaves, **options), found[0])
    check(found, exact, leaves, "dq dk dv")


def test_no_keys() -> None:
    q, none = torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8)
    out, lse, pattern = door.flash_attn_func(q, none, none, 0.5, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(q)) and lse.isneginf().all() and pattern.shape == (1, 2, 3, 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_packed_tensors(dropout_p: float) -> None:
    qkv = torch.randn(2, 21, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    options = {"dropout_p": dropout_p, "causal": True, "window_size": (5, 0)}
    torch.manual_seed(1)
    want = door.flash_attn_func(*qkv.unbind(2), **options)
    (dqkv,) = torch.autograd.grad(want.square().sum(), qkv)

    torch.manual_seed(1)
    found = door.flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(found, want)
    assert torch.equal(torch.autograd.grad(found.square().sum(), qkv)[0], dqkv)

    torch.manual_seed(1)
    found, lse, pattern = door.flash_attn_kvpacked_func(
        qkv[:, :, 0], qkv[:, :, 1:], **options, return_attn_probs=True
    )
    assert torch.equal(found, want) and lse.shape == (2, 4, 21)
    assert pattern.shape == ((2, 4, 21, 21) if dropout_p else (0,))
    assert torch.equal(torch.autograd.grad(found.square().sum(), qkv)[0], dqkv)


def test_window_as_tensor_and_list() -> None:
    q, k, v = (x.detach() for x in inputs(20, 25))
    want = door.flash_attn_func(q, k, v, window_size=(4, 2))
    for window in ([4, 2], torch.tensor([4, 2])):
        assert torch.equal(door.flash_attn_func(q, k, v, window_size=window), want)


def test_deterministic_is_taken() -> None:
    q, k, v = (x.detach() for x in inputs(20, 25))
    want = door.flash_attn_func(q, k, v)
    assert torch.equal(door.flash_attn_func(q, k, v, deterministic=True), want)


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"window_size": (1, 2, 3)}, ValueError, "window_size"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi"),
        ({"alibi_slopes": torch.ones(1, 2, 4)}, ValueError, "alibi"),
        ({"dropout_p": 1.0}, ValueError, "dropout"),
        ({"q": torch.ones(5, 4, 16)}, ValueError, "batch_size, seqlen, nheads, headdim"),
        ({"k": torch.ones(2, 25, 3, 16), "v": torch.ones(2, 25, 3, 16)}, ValueError, "divide"),
        ({"v": torch.ones(2, 25, 2, 16, dtype=torch.int32)}, TypeError, "v"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], says: str) -> None:
    q, k, v = (x.detach().float() for x in inputs(20, 25))
    with pytest.raises(error, match=says):
        door.flash_attn_func(**({"q": q, "k": k, "v": v} | change))


def test_packed_errors() -> None:
    with pytest.raises(ValueError, match=r"qkv: expected \(batch_size, seqlen, 3"):
        door.flash_attn_qkvpacked_func(torch.ones(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv: expected \(total_k, 2"):
        door.flash_attn_varlen_kvpacked_func(
            torch.ones(5, 4, 8), torch.ones(5, 3, 4, 8), torch.tensor([0, 5]), torch.tensor([0, 5]), 5, 5
        )


def test_compiles_to_one_graph_for_all_lengths() -> None:
    frames = 0

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        nonlocal frames
        frames += 1
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        out = door.flash_attn_func(q, k, v, 0.1, causal=True, window_size=(5, 0), alibi_slopes=slopes)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    slopes = torch.rand(4)
    for length in (20, 33, 47):
        q, k, v = inputs(length, length, dtype=torch.float32)
        torch.manual_seed(0)
        want = step(q, k, v, slopes)
        torch.manual_seed(0)
        found = compiled(q, k, v, slopes)
        assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (found, want)), strict=True):
            assert_close(a, b)
    assert frames == 1


def test_the_pattern_compiles() -> None:
    def step(q: Tensor) -> tuple[Tensor, ...]:
        return door.flash_attn_func(q, q, q, 0.3, return_attn_probs=True)

    q = torch.randn(1, 9, 2, 8)
    torch.manual_seed(0)
    want = step(q)
    torch.manual_seed(0)
    for a, b in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(q), want, strict=True):
        assert_close(a, b)


def test_explain_tells_the_kernel() -> None:
    q, k, v = (x.detach() for x in inputs(20, 25))
    for function, given in (
        (door.flash_attn_func, (q, k, v)),
        (door.flash_attn_kvpacked_func, (q, torch.stack((k, v), 2))),
        (door.flash_attn_qkvpacked_func, (torch.stack((q, q, q), 2),)),
    ):
        found = door.explain(function, *given, dropout_p=0.1, causal=True, window_size=(3, 0), softcap=1.0)
        assert found.backend == "reference"
        assert any("float64" in reason for reason in found.reasons["cpu"])
    with pytest.raises(TypeError, match="flash_attn_func"):
        door.explain(torch.nn.functional.scaled_dot_product_attention, q, k, v)
