"""`fastattn.scaled_dot_product_attention` against torch's, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

import fastattn

# query, key, value; options
SHAPES = {
    "square": ((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), {}),
    "one row, one key": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), {}),
    "odd": ((2, 3, 63, 33), (2, 3, 100, 33), (2, 3, 100, 33), {}),
    "longer query": ((1, 2, 100, 16), (1, 2, 37, 16), (1, 2, 37, 16), {}),
    "value dim": ((2, 2, 7, 12), (2, 2, 257, 12), (2, 2, 257, 5), {}),
    "grouped heads": ((2, 6, 17, 8), (2, 2, 19, 8), (2, 2, 19, 8), {"enable_gqa": True}),
    "multi-query": ((2, 4, 17, 8), (2, 1, 19, 8), (2, 1, 19, 8), {"enable_gqa": True}),
    "broadcast key head": ((2, 4, 17, 8), (2, 1, 19, 8), (2, 1, 19, 8), {}),
    "broadcast query head": ((2, 1, 17, 8), (2, 4, 19, 8), (2, 4, 19, 8), {}),
    "broadcast value head": ((2, 4, 17, 8), (2, 4, 19, 8), (2, 1, 19, 8), {}),
    "broadcast batch": ((1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {}),
    "two dimensions": ((5, 8), (7, 8), (7, 6), {}),
    "three dimensions": ((4, 5, 8), (4, 7, 8), (4, 7, 8), {}),
    "three dimensions, grouped": ((4, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True}),
    "five dimensions": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8), {}),
    "five, broadcast": ((3, 1, 4, 5, 8), (1, 2, 4, 7, 8), (2, 4, 7, 8), {}),
    "ranks differ": ((2, 4, 5, 8), (7, 8), (7, 8), {}),
    "scale": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": 0.3}),
}
MASKS = ["none", "causal", "bool", "float", "float with -inf"]


def run(function, tensors, mask, options, dtype):
    """Output and gradients of query, key, value and a float mask."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype, copy=True).requires_grad_()
        leaves.append(mask)
    out = function(*leaves[:3], attn_mask=mask, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def assert_matches_torch(tensors, mask, options, dtype=torch.float32, torch_options=None):
    torch_options = options if torch_options is None else torch_options
    ours = run(fastattn.scaled_dot_product_attention, tensors, mask, options, dtype)
    theirs = run(F.scaled_dot_product_attention, tensors, mask, torch_options, dtype)
    exact = run(F.scaled_dot_product_attention, tensors, mask, torch_options, torch.float64)
    for name, a, b, c in zip(["out", "dq", "dk", "dv", "dmask"], ours, theirs, exact, strict=False):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        assert_as_right(name, a, b, c)


def assert_as_right(name, ours, torchs, exact):
    """Our error against float64 is at most twice torch's in the same dtype, plus a rounding band."""
    error, plain = (float((x.double() - exact).abs().max()) for x in (ours, torchs))
    eps, size = torch.finfo(ours.dtype).eps, float(exact.abs().max())
    budget = 2 * plain + eps * size + 32 * min(eps, torch.finfo(torch.float32).eps) * max(size, 1)
    assert error <= budget, f"{name}: error {error:.3e} over budget {budget:.3e}"


def make_mask(kind, shape):
    if kind == "bool":
        return torch.rand(shape) > 0.3
    mask = torch.randn(shape)
    return mask.masked_fill(torch.rand(shape) > 0.7, float("-inf")) if kind == "float with -inf" else mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", SHAPES)
def test_matches_torch(case, mask):
    torch.manual_seed(0)
    *shapes, options = SHAPES[case]
    tensors = [torch.randn(shape) for shape in shapes]
    attn_mask = None
    if mask == "causal":
        options = {**options, "is_causal": True}
    elif mask != "none":
        attn_mask = make_mask(mask, (tensors[0].shape[-2], tensors[1].shape[-2]))
    assert_matches_torch(tensors, attn_mask, options)


@pytest.mark.parametrize("kind", ["bool", "float", "float with -inf"])
@pytest.mark.parametrize(
    "shape",
    [(5, 7), (1, 7), (5, 1), (3, 5, 7), (1, 1, 7), (2, 1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 5, 1)],
)
def test_mask_broadcasts(shape, kind):
    torch.manual_seed(0)
    tensors = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert_matches_torch(tensors, make_mask(kind, shape), {})


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 5, 7), (4, 1, 5, 7), (2, 1, 1, 5, 7), (1, 4, 3, 1, 7), (1, 1, 3, 5, 7)]
)
def test_mask_broadcasts_over_two_batch_dimensions(shape, kind):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 3, length, 8) for length in (5, 7, 7)]
    assert_matches_torch(tensors, make_mask(kind, shape), {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
def test_dtypes(mask, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, length, 24).to(dtype).double() for length in (33, 65, 65)]
    attn_mask = None if mask == "causal" else make_mask(mask, (33, 65))
    if mask == "float":
        attn_mask = attn_mask.to(dtype).double()
    assert_matches_torch(tensors, attn_mask, {"is_causal": mask == "causal"}, dtype)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_and_causal_both_hold(kind):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, length, 8) for length in (9, 11, 11)]
    mask = make_mask(kind, (9, 11))
    band = torch.ones(9, 11, dtype=torch.bool).tril()
    both = mask & band if kind == "bool" else mask.masked_fill(~band, float("-inf"))
    ours = fastattn.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=True)
    assert torch.equal(ours, fastattn.scaled_dot_product_attention(*tensors, attn_mask=both))


@pytest.mark.parametrize("is_causal", [False, True])
def test_negative_scale(is_causal):
    """torch 2.13 on CPU gives NaN when it is causal as well."""
    query, key, value = (torch.randn(1, 2, length, 8) for length in (9, 11, 11))
    out = fastattn.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=-0.3)
    expected = F.scaled_dot_product_attention(-query, key, value, is_causal=is_causal, scale=0.3)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys_are_zero(kind):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[[0, 3]] = False
    if kind == "float":
        mask = torch.zeros(5, 7).masked_fill(~mask, float("-inf"))
    tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for length in (5, 7, 7)]
    out = fastattn.scaled_dot_product_attention(*tensors, attn_mask=mask)
    out.sum().backward()
    assert (out[:, :, [0, 3]] == 0).all()
    assert (tensors[0].grad[:, :, [0, 3]] == 0).all()
    assert all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize(
    "shapes", [((0, 2, 5, 8), (0, 2, 7, 8)), ((2, 2, 0, 8), (2, 2, 7, 8)), ((2, 2, 5, 8), (2, 2, 0, 8))]
)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_empty(shapes, lead):
    query, key = (torch.randn(*lead, *shape) for shape in shapes)
    expected = F.scaled_dot_product_attention(query, key, key)
    out = fastattn.scaled_dot_product_attention(query, key, key)
    assert out.shape == expected.shape
    assert torch.equal(out, torch.zeros_like(out))


def test_dropout_is_always_applied_and_seeded_by_torch():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 100, 16), torch.randn(2, 4, 130, 16)
    value = torch.ones(2, 4, 130, 1)
    one, other = (fastattn.scaled_dot_product_attention(query, key, value, dropout_p=0.25) for _ in range(2))
    assert not torch.equal(one, other)
    # With values of 1 a row's output is its sum of kept probabilities over 1 - p, of mean 1.
    assert abs(one.mean() - 1) < 0.02
    assert one.std() > 0.01
    torch.manual_seed(7)
    first = fastattn.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    torch.manual_seed(7)
    assert torch.equal(first, fastattn.scaled_dot_product_attention(query, key, value, dropout_p=0.25))


def test_no_copy_of_four_dimensional_views(monkeypatch):
    """`[B, L, 3, H, D]` projections and broadcast batches reach the kernels as the views they are."""
    seen = []

    def spy(q, k, v, **options):
        seen.append([x.data_ptr() for x in (q, k, v)])
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr("fastattn.integrations.torch_sdpa.attention", spy)
    qkv = torch.randn(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
    fastattn.scaled_dot_product_attention(*qkv)
    fastattn.scaled_dot_product_attention(qkv[0], qkv[1, :1], qkv[2, :1])
    fastattn.scaled_dot_product_attention(*qkv[:, 0])
    for pointers in seen:
        assert pointers == [x.data_ptr() for x in qkv]


def test_autocast_as_torch():
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(*tensors)
        expected = F.scaled_dot_product_attention(*tensors)
    assert out.dtype == expected.dtype == torch.bfloat16


@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
@pytest.mark.parametrize("rank", [4, 5])
def test_compiles_whole(rank, mask):
    torch.manual_seed(0)
    tensors = [torch.randn(*(2, 1)[: rank - 3], 4, length, 8) for length in (5, 7, 7)]
    options = {
        "is_causal": mask == "causal",
        "attn_mask": make_mask("bool" if mask == "causal" else mask, (5, 7)),
    }
    torch.compiler.reset()
    compiled = torch.compile(fastattn.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    expected = fastattn.scaled_dot_product_attention(*tensors, **options)
    assert torch.allclose(compiled(*tensors, **options), expected, atol=1e-6)


def randn(*shape, **options):
    return torch.randn(shape, **options)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((randn(8), randn(8), randn(8)), {}, ValueError, r"at least 2 dimensions, got \[\[8\]"),
        ((randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 8)), {}, ValueError, "enable_gqa=True"),
        (
            (randn(2, 4, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
            {"enable_gqa": True},
            ValueError,
            "heads",
        ),
        ((randn(2, 1, 5, 8), randn(3, 1, 7, 8), randn(3, 1, 7, 8)), {}, ValueError, "broadcast together"),
        ((randn(2, 1, 5, 8), randn(2, 1, 7, 9), randn(2, 1, 7, 9)), {}, ValueError, "head_dim 8, got 9"),
        # torch 2.13 reads past value's end here
        (
            (randn(2, 1, 5, 8), randn(2, 1, 7, 8), randn(2, 1, 6, 8)),
            {},
            ValueError,
            r"\[1, 7\], got \[1, 6\]",
        ),
        ((randn(2, 1, 5, 8), randn(2, 1, 7, 8).double(), randn(2, 1, 7, 8)), {}, TypeError, "float64"),
        (
            (randn(2, 1, 5, 8),) * 3,
            {"attn_mask": torch.ones(5, dtype=torch.bool)},
            ValueError,
            "2 to 4 dimensions",
        ),
        (
            (randn(2, 1, 5, 8),) * 3,
            {"attn_mask": torch.ones(6, 5, dtype=torch.bool)},
            ValueError,
            "broadcastable",
        ),
        ((randn(2, 1, 5, 8),) * 3, {"attn_mask": randn(3, 1, 5, 5)}, ValueError, "broadcastable"),
        (
            (randn(2, 2, 1, 5, 8),) * 3,
            {"attn_mask": randn(3, 1, 1, 5, 5)},
            ValueError,
            r"got \[3, 1, 1, 5, 5\]",
        ),
        (
            (randn(2, 1, 5, 8),) * 3,
            {"attn_mask": torch.ones(5, 5, dtype=torch.int)},
            TypeError,
            "torch.int32",
        ),
        ((randn(2, 1, 5, 8),) * 3, {"dropout_p": -0.1}, ValueError, "-0.1"),
        ((randn(2, 1, 5, 8),) * 3, {"dropout_p": 1.0}, ValueError, "1.0"),
    ],
)
def test_errors_name_expected_and_given(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.scaled_dot_product_attention(*arguments, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors(is_causal):
    parts = [[torch.randn(n, 2, 8) for n in (3, 9)] for _ in range(3)]
    nested = [torch.nested.nested_tensor(x, layout=torch.jagged).transpose(1, 2) for x in parts]
    found = fastattn.scaled_dot_product_attention(*nested, is_causal=is_causal, scale=0.3)
    for got, *own in zip(found.transpose(1, 2).unbind(), *parts, strict=True):
        alone = [x.transpose(0, 1) for x in own]
        want = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=is_causal, scale=0.3)
        torch.testing.assert_close(got.transpose(0, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_refused():
    nested, one_head = (
        torch.nested.nested_tensor([torch.randn(n, heads, 8) for n in (3, 5)], layout=torch.jagged).transpose(
            1, 2
        )
        for heads in (2, 1)
    )
    with pytest.raises(NotImplementedError, match="attn_mask: expected None with nested"):
        fastattn.scaled_dot_product_attention(nested, nested, nested, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="same heads"):
        fastattn.scaled_dot_product_attention(nested, one_head, one_head)
    with pytest.raises(TypeError, match="expected q, k and v nested"):
        fastattn.scaled_dot_product_attention(nested, torch.randn(2, 2, 5, 8), nested)
    strided = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"layout=torch\.jagged"):
        fastattn.scaled_dot_product_attention(strided, strided, strided)
