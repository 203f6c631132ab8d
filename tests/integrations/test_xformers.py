"""xformers' functions and attention biases on fastattn against attention written out in float64."""

import importlib
import math
from itertools import pairwise

import pytest
import torch

import fastattn
from fastattn.integrations import xformers as xops
from fastattn.integrations.xformers import attn_bias as biases
from fastattn.integrations.xformers import fmha
from fastattn.integrations.xformers import functions as functions_
from fastattn.integrations.xformers.structure import NAMES

Q_LENS, K_LENS = [3, 1, 5], [4, 2, 6]
STARTS, PADDING = [1, 6, 8, 17], 6


def causal(i, j, n, m):
    return j <= i


def bottom_right(i, j, n, m):
    return j <= i + m - n


def window(left, right, shift=True):
    def keep(i, j, n, m):
        middle = i + (m - n if shift else 0)
        return middle - left <= j <= middle + right

    return keep


def everything(i, j, n, m):
    return True


def blocks(keep, starts=None):
    """Which keys each query keeps, block by block: written out."""
    starts = starts or [sum(K_LENS[:b]) for b in range(len(K_LENS) + 1)]
    out = torch.zeros(sum(Q_LENS), starts[-1], dtype=torch.bool)
    for b, (n, m) in enumerate(zip(Q_LENS, K_LENS, strict=True)):
        for i in range(n):
            for j in range(m):
                out[sum(Q_LENS[:b]) + i, starts[b] + j] = keep(i, j, n, m)
    return out


def plain(keep, n=7, m=11):
    return torch.tensor([[keep(i, j, n, m) for j in range(m)] for i in range(n)])


def block_diagonal():
    return biases.BlockDiagonalMask.from_seqlens(Q_LENS, K_LENS)


def padded(cls, *window):
    if window:
        return cls.from_seqlens_local(Q_LENS, PADDING, K_LENS, *window)
    return cls.from_seqlens(Q_LENS, PADDING, K_LENS)


PADDED = [PADDING * b for b in range(len(K_LENS) + 1)]
# The bias, and which keys it keeps.
BIASES = {
    "LowerTriangularMask": lambda: (biases.LowerTriangularMask(), plain(causal)),
    "LowerTriangularFromBottomRightMask": lambda: (
        biases.LowerTriangularFromBottomRightMask(),
        plain(bottom_right),
    ),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda: (
        biases.LowerTriangularFromBottomRightMask().make_local_attention(3),
        plain(window(2, 0)),
    ),
    "LocalAttentionFromBottomRightMask": lambda: (
        biases.LocalAttentionFromBottomRightMask(window_left=1, window_right=2),
        plain(window(1, 2)),
    ),
    "BlockDiagonalMask": lambda: (block_diagonal(), blocks(everything)),
    "BlockDiagonalCausalMask": lambda: (block_diagonal().make_causal(), blocks(causal)),
    "BlockDiagonalCausalFromBottomRightMask": lambda: (
        block_diagonal().make_causal_from_bottomright(),
        blocks(bottom_right),
    ),
    "BlockDiagonalCausalLocalAttentionMask": lambda: (
        block_diagonal().make_local_attention(2),
        blocks(window(1, 0, shift=False)),
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda: (
        block_diagonal().make_local_attention_from_bottomright(2),
        blocks(window(1, 0)),
    ),
    "BlockDiagonalPaddedKeysMask": lambda: (
        padded(biases.BlockDiagonalPaddedKeysMask),
        blocks(everything, PADDED),
    ),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda: (
        padded(biases.BlockDiagonalCausalWithOffsetPaddedKeysMask),
        blocks(bottom_right, PADDED),
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": lambda: (
        padded(biases.BlockDiagonalPaddedKeysMask).make_local_attention(1, 1),
        blocks(window(1, 1), PADDED),
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": lambda: (
        padded(biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask, 2),
        blocks(window(1, 0), PADDED),
    ),
    "BlockDiagonalGappyKeysMask": lambda: (
        biases.BlockDiagonalGappyKeysMask.from_seqlens(Q_LENS, STARTS, K_LENS),
        blocks(everything, STARTS),
    ),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda: (
        biases.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q_LENS, STARTS, K_LENS),
        blocks(bottom_right, STARTS),
    ),
}


def reference(query, key, value, keep=None, bias=None, scale=None):
    """``[B, M, H, K]`` or ``[B, M, G, H, K]``: the result and its log-sum-exp."""
    q, k, v = (x.movedim(1, -2) for x in (query, key, value))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return (torch.softmax(scores, -1).nan_to_num() @ v).movedim(-2, 1), torch.logsumexp(scores, -1)


def qkv(q_length, k_length, batch=1, heads=(3,), dim=8, v_dim=5, dtype=torch.float32):
    shapes = [
        (batch, q_length, *heads, dim),
        (batch, k_length, *heads, dim),
        (batch, k_length, *heads, v_dim),
    ]
    return [torch.randn(shape, dtype=dtype).to(dtype).requires_grad_() for shape in shapes]


def grads_of(out, leaves):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_close(found, expected):
    eps = torch.finfo(torch.float32).eps
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).abs().max() <= 64 * eps * max(1, exact.abs().max())


def doubles(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("name", BIASES)
def test_biases_by_structure(name):
    bias, keep = BIASES[name]()
    assert type(bias).__name__ == name
    leaves = qkv(*keep.shape)
    exact = doubles(leaves)
    found = grads_of(xops.memory_efficient_attention(*leaves, attn_bias=bias), leaves)
    assert_close(found, grads_of(reference(*exact, keep)[0], exact))


def test_every_name_that_is_recognised_is_tested():
    assert {*BIASES, "LowerTriangularMaskWithTensorBias"} == set(NAMES)


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_as_a_tensor(name):
    bias, keep = BIASES[name]()
    tensor = bias.materialize((2, 3, *keep.shape), dtype=torch.float64)
    assert tensor.shape == (2, 3, *keep.shape)
    assert torch.equal(tensor.exp(), keep.double().expand(2, 3, *keep.shape))
    moved = bias.to("meta")
    assert type(moved) is type(bias)
    if hasattr(bias, "q_seqinfo"):
        assert moved.q_seqinfo.seqstart.device.type == moved.k_seqinfo.seqstart.device.type == "meta"


@pytest.mark.parametrize("name", BIASES)
def test_the_same_of_xformers_itself(name):
    peer = pytest.importorskip("xformers.ops.fmha.attn_bias")
    ours, keep = BIASES[name]()
    info = {}
    for side in ("q_seqinfo", "k_seqinfo"):
        if hasattr(ours, side):
            info[side] = getattr(ours, side)
    own = {n: getattr(ours, n) for n in ("window_left", "window_right", "_window_size") if hasattr(ours, n)}
    theirs = getattr(peer, name)(**info, **own)
    leaves = qkv(*keep.shape)
    found = xops.memory_efficient_attention(*leaves, attn_bias=theirs)
    assert torch.equal(found, xops.memory_efficient_attention(*leaves, attn_bias=ours))
    expected = theirs.materialize((1, 1, *keep.shape))
    assert torch.equal(ours.materialize((1, 1, *keep.shape)), expected)


@pytest.mark.parametrize("causal_", [False, True])
@pytest.mark.parametrize("layout", ["BMK", "BMHK", "BMGHK"])
def test_tensors_added_to_the_scores_have_gradients(layout, causal_):
    heads = {"BMK": (), "BMHK": (3,), "BMGHK": (2, 3)}[layout]
    leaves = [*qkv(7, 11, 2, heads), torch.randn(2, *heads, 7, 11, requires_grad=True)]
    exact = doubles(leaves)
    keep = plain(causal) if causal_ else None
    bias = xops.LowerTriangularMask().add_bias(leaves[3]) if causal_ else leaves[3]
    out = xops.memory_efficient_attention(*leaves[:3], attn_bias=bias)
    assert_close(grads_of(out, leaves), grads_of(reference(*exact[:3], keep, exact[3])[0], exact))


def test_a_bias_alone_may_need_a_gradient():
    query, key, value = (x.detach() for x in qkv(7, 11))
    bias = torch.zeros(1, 3, 7, 11, requires_grad=True)
    exact = bias.detach().double().requires_grad_()
    out = xops.memory_efficient_attention(query, key, value, bias)
    expected = reference(query.double(), key.double(), value.double(), None, exact)[0]
    assert_close(grads_of(out, [bias]), grads_of(expected, [exact]))


@pytest.mark.parametrize("shape", [(1, 1, 7, 11), (2, 1, 7, 11), (1, 3, 1, 11), (1, 1, 1, 1)])
def test_expanded_tensors_are_not_copied(shape, monkeypatch):
    seen = []

    def spy(q, k, v, **options):
        seen.append(options["bias"])
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr(functions_, "attention", spy)
    query, key, value = (x.detach() for x in qkv(7, 11, 2))
    bias = torch.randn(shape)
    found = xops.memory_efficient_attention(query, key, value, bias.expand(2, 3, 7, 11))
    expected, _ = reference(query.double(), key.double(), value.double(), None, bias.double())
    assert_close([found], [expected])
    assert seen[0].shape == shape
    assert seen[0].data_ptr() == bias.data_ptr()


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"attn_bias": xops.LowerTriangularMask()}])
@pytest.mark.parametrize("heads", [(), (3,), (2, 3)])
def test_layouts_and_the_functions_without_autograd(heads, options):
    leaves = qkv(7, 11, 2, heads)
    exact = doubles(leaves)
    keep = plain(causal) if "attn_bias" in options else None
    result, exact_lse = reference(*exact, keep, scale=options.get("scale"))
    expected = grads_of(result, exact)
    found = grads_of(xops.memory_efficient_attention(*leaves, **options), leaves)
    assert_close(found, expected)

    forward = xops.memory_efficient_attention_forward(*leaves, **options)
    assert not forward.requires_grad
    out, lse = xops.memory_efficient_attention_forward_requires_grad(*leaves, **options)
    assert torch.equal(out, forward)
    assert_close([out, lse], [expected[0], exact_lse if heads else exact_lse[:, None]])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    args = [x.detach() for x in (grad, out, lse, *leaves)]
    assert_close(xops.memory_efficient_attention_backward(*args, **options), expected[1:])


@pytest.mark.parametrize("with_gradient", [False, True])
def test_groups_expanded_over_their_heads(with_gradient, monkeypatch):
    seen = []

    def spy(q, k, v, **options):
        seen.append(k.shape[1])
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr(functions_, "attention", spy)
    leaves = [torch.randn(1, 7, 2, 3, 8), torch.randn(1, 11, 2, 1, 8), torch.randn(1, 11, 2, 1, 5)]
    if with_gradient:
        leaves = [x.requires_grad_() for x in leaves]
    exact = doubles(leaves)
    query, key, value = leaves
    out = xops.memory_efficient_attention(
        query, key.expand(-1, -1, -1, 3, -1), value.expand(-1, -1, -1, 3, -1)
    )
    expected = reference(*exact)[0]
    assert seen == [6 if with_gradient else 2]
    if with_gradient:
        assert_close(grads_of(out, leaves), grads_of(expected, exact))
        # Each head's own, of an expanded tensor that is asked for its gradient.
        expanded = key.detach().expand(-1, -1, -1, 3, -1).requires_grad_()
        out = xops.memory_efficient_attention(query, expanded, value.expand(-1, -1, -1, 3, -1))
        (grad,) = torch.autograd.grad(out.square().sum(), expanded)
        assert not torch.allclose(grad[..., 0, :], grad[..., 1, :])
    else:
        assert_close([out], [expected])


def test_packed_tensors_and_back():
    """The example of xformers' documentation."""
    tensors = [torch.randn(batch, length, 2, 8) for batch, length in [(1, 3), (2, 6), (1, 2)]]
    bias, x = fmha.BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 17, 2, 8)
    out = fmha.memory_efficient_attention(x, x, x, attn_bias=bias)
    parts = bias.split(out)
    for part, one in zip(parts, tensors, strict=True):
        assert torch.allclose(part, xops.memory_efficient_attention(one, one, one), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(bias.split(x), tensors, strict=True))


def test_packed_queries_keys_and_values():
    queries = [torch.randn(2, n, 2, 8) for n in (3, 1)]
    keys, values = ([torch.randn(2, n, 2, 8) for n in (4, 5)] for _ in range(2))
    bias, q, k, v = fmha.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, values)
    out = xops.memory_efficient_attention(q, k, v, attn_bias=bias)
    for part, one in zip(bias.split_queries(out), zip(queries, keys, values, strict=True), strict=True):
        assert torch.allclose(part, xops.memory_efficient_attention(*one), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(bias.split_kv(k), keys, strict=True))
    with pytest.raises(ValueError, match="split_queries"):
        bias.split(out)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("heads", [(3,), (2, 3)])
def test_parts_of_the_keys_are_merged(heads, stacked):
    leaves = qkv(7, 11, 2, heads)
    exact = doubles(leaves)
    query, key, value = leaves
    bounds = (0, 4, 5, 11)
    parts = [
        xops.memory_efficient_attention_partial(query, key[:, a:b], value[:, a:b])
        for a, b in pairwise(bounds)
    ]
    outs, lses = zip(*parts, strict=True)
    if stacked:
        outs, lses = torch.stack(outs), torch.stack(lses)
    out, lse = xops.merge_attentions(outs, lses)
    expected, exact_lse = reference(*exact)
    assert_close([lse], [exact_lse])
    assert_close(grads_of(out, leaves), grads_of(expected, exact))
    again, nothing = xops.merge_attentions(outs, lses, write_lse=False, output_dtype=torch.bfloat16)
    assert nothing is None
    assert torch.equal(again, out.bfloat16())


def test_output_dtype():
    leaves = [x.detach() for x in qkv(7, 11, dtype=torch.bfloat16)]
    exact = reference(*(x.double() for x in leaves))[0]
    assert xops.memory_efficient_attention(*leaves).dtype == torch.bfloat16
    wide = xops.memory_efficient_attention(*leaves, output_dtype=torch.float32)
    assert_close([wide], [exact])
    partial, lse = xops.memory_efficient_attention_partial(*leaves)
    assert partial.dtype == lse.dtype == torch.float32
    assert torch.equal(partial, wide)
    narrow = xops.memory_efficient_attention(*(x.float() for x in leaves), output_dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())


def test_dropout():
    query, value = torch.randn(1, 100, 4, 8), torch.ones(1, 100, 4, 1)
    torch.manual_seed(3)
    out = xops.memory_efficient_attention(query, query, value, p=0.25)
    assert abs(out.mean() - 1) < 0.02
    assert out.std() > 0.01
    torch.manual_seed(3)
    assert torch.equal(out, xops.memory_efficient_attention(query, query, value, p=0.25))
    for function in (
        xops.memory_efficient_attention_forward_requires_grad,
        xops.memory_efficient_attention_partial,
    ):
        with pytest.raises(NotImplementedError, match=r"got 0\.25"):
            function(query, query, value, p=0.25)


def test_rows_without_keys_are_zero():
    leaves = qkv(9, 7)
    bias = biases.BlockDiagonalMask.from_seqlens([4, 5], [7, 0])
    found = grads_of(xops.memory_efficient_attention(*leaves, attn_bias=bias), leaves)
    assert (found[0][:, 4:] == 0).all()
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(
    "name", ["LowerTriangularMask", "BlockDiagonalCausalMask", "BlockDiagonalGappyKeysMask"]
)
def test_compiles_whole(name):
    bias, keep = BIASES[name]()
    leaves = [x.detach() for x in qkv(*keep.shape)]
    torch.compiler.reset()
    compiled = torch.compile(xops.memory_efficient_attention, backend="aot_eager", fullgraph=True)
    expected = xops.memory_efficient_attention(*leaves, attn_bias=bias)
    assert torch.allclose(compiled(*leaves, attn_bias=bias), expected, atol=1e-6)


def test_explain():
    leaves = [x.detach().double() for x in qkv(7, 11)]
    found = xops.explain(*leaves, attn_bias=xops.LowerTriangularMask())
    assert found.backend == "reference"
    assert "float64" in found.reasons["cpu"][0]


class PagedBlockDiagonalPaddedKeysMask:
    pass


class Unheard:
    pass


def call(*shapes, **options):
    return xops.memory_efficient_attention(*(torch.zeros(shape) for shape in shapes), **options)


SQUARE = ((1, 9, 2, 8),) * 3


@pytest.mark.parametrize(
    "shapes, options, error, message",
    [
        (
            SQUARE,
            {"attn_bias": PagedBlockDiagonalPaddedKeysMask()},
            NotImplementedError,
            "attention_with_kv_cache",
        ),
        (SQUARE, {"attn_bias": Unheard()}, NotImplementedError, "got Unheard; pass the mask as a tensor"),
        (SQUARE, {"op": object()}, NotImplementedError, r"explain\(\) tells"),
        (SQUARE, {"attn_bias": torch.zeros(9, 9)}, ValueError, r"expected \[1, 2, 9, 9\], got \[9, 9\]"),
        (SQUARE, {"attn_bias": torch.ones(1, 2, 9, 9).bool()}, TypeError, "floating tensor"),
        (
            SQUARE,
            {"attn_bias": biases.BlockDiagonalMask.from_seqlens([3, 4])},
            ValueError,
            "expected 7 queries",
        ),
        (
            ((2, 9, 2, 8),) * 3,
            {"attn_bias": biases.BlockDiagonalMask.from_seqlens([3, 6])},
            ValueError,
            "batch of 1",
        ),
        (SQUARE, {"p": -0.5}, ValueError, "-0.5"),
        (((9, 8),) * 3, {}, ValueError, r"\[B, M, H, K\]"),
        (((1, 9, 4, 8), (1, 9, 2, 8), (1, 9, 2, 8)), {}, ValueError, "expand keys"),
        (((1, 9, 2, 8), (1, 9, 2, 8), (1, 8, 2, 8)), {}, ValueError, "as many values"),
        (((1, 9, 2, 8), (1, 9, 2, 4), (1, 9, 2, 8)), {}, ValueError, "head_dim 8, got 4"),
    ],
)
def test_refuses(shapes, options, error, message):
    with pytest.raises(error, match=message):
        call(*shapes, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: biases.LocalAttentionFromBottomRightMask(-1, 0), "window_left: expected 0 or more, got -1"),
        (lambda: block_diagonal().make_local_attention(0), "window_size: expected 1 or more, got 0"),
        (
            lambda: biases.BlockDiagonalMask.from_seqlens([3], [2]).make_causal_from_bottomright(),
            "got 2 keys and 3 queries",
        ),
        (
            lambda: biases.BlockDiagonalMask.from_seqlens([3], [2, 1]),
            "expected 1 lengths, as of queries, got 2",
        ),
        (
            lambda: biases.BlockDiagonalPaddedKeysMask.from_seqlens([3], 2, [3]),
            "at most kv_padding = 2 keys, got 3",
        ),
        (
            lambda: biases.BlockDiagonalGappyKeysMask.from_seqlens([3], [0], [3]),
            "one more than the 1 lengths",
        ),
        (
            lambda: block_diagonal().split_queries(torch.zeros(1, 8, 2)),
            r"expected \[1, 9, ...\], got \[1, 8, 2\]",
        ),
        (
            lambda: call(
                (1, 2, 1, 8),
                (1, 6, 1, 8),
                (1, 6, 1, 8),
                attn_bias=biases.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 2, 6], [3, 3]),
            ),
            "one behind the other",
        ),
    ],
)
def test_biases_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.zeros(9, 8)}, "grad: expected query's 4 dimensions"),
        ({"lse": torch.zeros(2, 2, 5)}, r"lse: expected \[1, 2, 9\], got \[2, 2, 5\]"),
    ],
)
def test_backward_refuses(change, message):
    tensors = {name: torch.zeros(1, 9, 2, 8) for name in ("grad", "output", "query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        xops.memory_efficient_attention_backward(**{"lse": torch.zeros(1, 2, 9), **tensors, **change})
    with pytest.raises(NotImplementedError, match=r"got 0\.5"):
        xops.memory_efficient_attention_backward(**tensors, lse=torch.zeros(1, 2, 9), p=0.5)


def test_is_xformers_by_its_names():
    module = importlib.import_module("fastattn.integrations.xformers")
    assert module.fmha is module
    assert module.fmha.attn_bias.LowerTriangularMask is module.LowerTriangularMask
    assert all(hasattr(module, name) for name in module.__all__)
