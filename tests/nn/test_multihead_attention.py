"""`fastattn.MultiheadAttention` against torch's: outputs, weights and every gradient."""

import copy

import pytest
import torch
from torch import nn

import fastattn

EMBED, HEADS, BATCH, LENGTH, KEYS = 24, 3, 2, 9, 13

MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 10, "vdim": 7},
    "kdim, no bias": {"kdim": 10, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both appended": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS = [
    {},
    {"padding": "bool"},
    {"padding": "float"},
    {"padding": "float -inf"},
    {"attn": "bool 2"},
    {"attn": "bool 3"},
    {"attn": "float 2"},
    {"attn": "float 3"},
    {"attn": "bool 2", "padding": "bool"},
    {"attn": "bool 3", "padding": "bool"},
    {"attn": "float 2", "padding": "float"},
    {"attn": "float 3", "padding": "float -inf"},
    {"attn": "bool 2", "padding": "float"},
    {"attn": "float 2", "padding": "bool"},
]


def pair(**options):
    """torch's module and ours with the same parameters, biases included."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    ours = fastattn.MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_inputs(which, module, unbatched=False):
    """query, key, value; the same tensor object where attention is of a sequence to itself."""

    def sequence(length, dim):
        shape = (BATCH, length, dim) if module.batch_first else (length, BATCH, dim)
        return torch.randn((length, dim) if unbatched else shape)

    query = sequence(LENGTH, EMBED)
    if which == "self":
        return query, query, query
    key = sequence(KEYS, module.kdim)
    return query, key, (key if which == "shared" else sequence(KEYS, module.vdim))


def make_masks(keys, padding=None, attn=None, unbatched=False):
    """Key 0 is open to everyone: torch gives NaN where nothing is."""
    masks = {}
    if padding is not None:
        masked = torch.rand(BATCH, keys) < 0.4
        masked[:, 0] = False
        masked = masked[0] if unbatched else masked
        floating = torch.zeros(masked.shape).masked_fill(masked, float("-inf"))
        if padding == "float":
            floating = floating + torch.randn(masked.shape)
        masks["key_padding_mask"] = masked if padding == "bool" else floating
    if attn is not None:
        shape = (LENGTH, keys) if attn.endswith("2") else ((1 if unbatched else BATCH) * HEADS, LENGTH, keys)
        masked = torch.rand(shape) < 0.3
        masked[..., 0] = False
        floating = torch.randn(shape).masked_fill(masked, float("-inf"))
        masks["attn_mask"] = masked if attn.startswith("bool") else floating
    return masks


def run(module, inputs, masks, dtype, **options):
    """out, weights, and gradients of inputs, float masks and parameters."""
    module = copy.deepcopy(module).to(dtype)
    leaves = {id(x): x.to(dtype, copy=True).requires_grad_() for x in inputs}
    masks = {
        name: mask.to(dtype, copy=True).requires_grad_() if mask.is_floating_point() else mask
        for name, mask in masks.items()
    }
    out, weights = module(*(leaves[id(x)] for x in inputs), **masks, **options)
    results = {"out": out.detach(), "weights": None if weights is None else weights.detach()}
    loss = 0.0
    for result in (out, weights):
        if result is not None:
            number = torch.randn(
                result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            loss = loss + (result.double() * number).sum()
    loss.backward()
    results.update({f"input {i}": x.grad for i, x in enumerate(leaves.values())})
    results.update({name: mask.grad for name, mask in masks.items() if mask.is_floating_point()})
    results.update({name: parameter.grad for name, parameter in module.named_parameters()})
    return results


def assert_matches_torch(theirs, ours, inputs, masks, **options):
    found = run(ours, inputs, masks, torch.float32, **options)
    plain = run(theirs, inputs, masks, torch.float32, **options)
    exact = run(theirs, inputs, masks, torch.float64, **options)
    assert found.keys() == plain.keys()
    for name, expected in exact.items():
        if expected is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == plain[name].shape, name
        error, torchs = (float((x[name].double() - expected).abs().max()) for x in (found, plain))
        size = max(float(expected.abs().max()), 1)
        assert error <= 2 * torchs + 32 * torch.finfo(torch.float32).eps * size, f"{name}: {error} {torchs}"


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("module", MODULES)
def test_matches_torch(module, masks, need_weights):
    theirs, ours = pair(**MODULES[module])
    which = "shared" if module in ("plain", "zero_attn") else "cross"
    inputs = make_inputs(which, theirs)
    assert_matches_torch(theirs, ours, inputs, make_masks(KEYS, **masks), need_weights=need_weights)


@pytest.mark.parametrize("which", ["self", "shared", "cross"])
@pytest.mark.parametrize(
    "batch_first, unbatched", [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("average", [False, True])
def test_layouts(which, batch_first, unbatched, average):
    theirs, ours = pair(batch_first=batch_first)
    inputs = make_inputs(which, theirs, unbatched)
    masks = make_masks(inputs[1].shape[0 if unbatched or not batch_first else 1], "bool", "bool 3", unbatched)
    assert_matches_torch(theirs, ours, inputs, masks, average_attn_weights=average)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float -inf"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True}])
def test_causal_hint(options, padding, need_weights):
    """Ours with the hint, with and without the mask it speaks of, is torch's with the mask alone.

    (torch's own with the hint hides the appended keys from most queries unless weights are asked for.)
    """
    theirs, ours = pair(**options)
    inputs = make_inputs("self", theirs)
    masks = make_masks(LENGTH, padding)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    with torch.no_grad():
        expected = theirs(*inputs, **masks, need_weights=True, attn_mask=causal)
        for attn_mask in (causal, causal == float("-inf"), None):
            found = ours(*inputs, **masks, need_weights=need_weights, attn_mask=attn_mask, is_causal=True)
            assert torch.allclose(found[0], expected[0], atol=1e-6)
            if need_weights:
                assert torch.allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", [None, "bool", "float", "float -inf"])
@pytest.mark.parametrize("kind", ["bool 2", "bool 3", "float 2", "float 3"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True}])
def test_causal_hint_leaves_the_mask_in_force(options, need_weights, kind, padding):
    """A window of the last three keys and a float's values stay; torch reads them where it needs the mask."""
    theirs, ours = pair(**options)
    inputs = make_inputs("self", theirs)
    masks = make_masks(LENGTH, padding)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    window = (distance < 0) | ((distance > 2) & (torch.arange(LENGTH) > 0))  # key 0 is open: no empty rows
    if kind.endswith("3"):
        window = window.repeat(BATCH * HEADS, 1, 1)
        window[0] = distance < 0
    floating = torch.randn(window.shape).masked_fill(window, float("-inf"))
    masks["attn_mask"] = window if kind.startswith("bool") else floating
    expected = run(theirs, inputs, masks, torch.float32, need_weights=need_weights)
    # Where torch has neither padding nor weights to give, or keys appended, its hint replaces the mask.
    hint = (need_weights or padding is not None) and not options
    if hint:
        hinted = run(theirs, inputs, masks, torch.float32, need_weights=need_weights, is_causal=True)
        assert torch.equal(hinted["out"], expected["out"])
    found = run(ours, inputs, masks, torch.float32, need_weights=need_weights, is_causal=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.allclose(found[name], value, atol=2e-5), name


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_hint_holds_besides_a_mask_that_is_not_causal(kind, options):
    _, ours = pair(**options)
    query, key, value = make_inputs("cross", ours)
    masked = make_masks(KEYS, attn=f"{kind} 3")["attn_mask"]
    later = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    both = masked | later if kind == "bool" else masked.masked_fill(later, float("-inf"))
    found = ours(query, key, value, attn_mask=masked, is_causal=True)
    expected = ours(query, key, value, attn_mask=both)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_encoder_layer_calls_it_where_the_fast_path_is_off(monkeypatch):
    """As the docstring says: in eval mode without gradients torch's layer reads the parameters alone."""
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, batch_first=True)
    layer.self_attn = fastattn.MultiheadAttention(EMBED, 4, batch_first=True)
    layer.eval()
    calls = []
    forward = fastattn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastattn.MultiheadAttention, "forward", lambda *a, **k: calls.append(True) or forward(*a, **k)
    )
    x = torch.randn(BATCH, LENGTH, EMBED)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        fast = layer(x)
        assert not calls
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            assert torch.allclose(layer(x), fast, atol=2e-6)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
    assert calls


@pytest.mark.parametrize("need_weights", [False, True])
def test_query_with_all_keys_masked(need_weights):
    mha = fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1] = True
    out, weights = mha(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    out.sum().backward()
    assert torch.equal(out[1], mha.out_proj.bias.expand(LENGTH, EMBED))
    assert x.grad.isfinite().all()
    if need_weights:
        assert (weights[1] == 0).all()
        assert torch.allclose(weights[0].sum(-1), torch.ones(LENGTH))


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_is_torchs_module(options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(0)
    ours = fastattn.MultiheadAttention(EMBED, HEADS, **options)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    theirs.load_state_dict(ours.state_dict())


def test_dropout_in_training_alone():
    mha = fastattn.MultiheadAttention(EMBED, HEADS, dropout=0.5)
    x = torch.randn(50, BATCH, EMBED)
    one, weights = mha(x, x, x)
    assert not torch.equal(one, mha(x, x, x)[0])
    assert torch.allclose(weights.sum(-1), torch.ones(BATCH, 50))  # before dropout
    mha.eval()
    assert torch.equal(mha(x, x, x)[0], mha(x, x, x)[0])


def test_dropout_has_torchs_mean():
    theirs, ours = pair(dropout=0.4)
    query, key = torch.randn(1, 1, EMBED).expand(4000, 1, EMBED), torch.randn(40, 1, EMBED)
    with torch.no_grad():
        expected = theirs.eval()(query[:1], key, key)[0]
        for module in (theirs.train(), ours.train()):
            out = module(query, key, key, need_weights=False)[0]
            assert torch.allclose(out.mean(0), expected[0], atol=6 * float(out.std(0).max()) / 4000**0.5)


def largest_tensor(call):
    """Elements of the largest tensor any torch function returns inside `call`."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(x, torch.Tensor):
                    self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
            return found

    with Watch() as watch:
        call()
    return watch.largest


@pytest.mark.parametrize("padding", [None, "bool", "float", "float -inf"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_square_of_the_length_in_memory(padding, is_causal):
    """Nothing larger than the packed projection is made, forward or backward (in the C++ backend)."""
    length = 500
    x = torch.randn(BATCH, length, EMBED, requires_grad=True)
    if fastattn.explain(*(x.view(BATCH, length, 1, EMBED).transpose(1, 2),) * 3).backend == "reference":
        pytest.skip("the reference backend holds the matrix of probabilities")
    mha = fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    masks = make_masks(length, padding)

    def call():
        out, _ = mha(x, x, x, **masks, need_weights=False, is_causal=is_causal)
        out.sum().backward()

    assert largest_tensor(call) <= 3 * x.numel() < length * length


@pytest.mark.parametrize("attn", ["bool 2", "float 2"])
@pytest.mark.parametrize("padding", ["bool", "float -inf"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_are_not_joined_per_batch(attn, padding, is_causal):
    """A given L × S mask stays that: it is not joined with the padding to one mask per sequence."""
    length = 300
    x = torch.randn(8, length, EMBED)
    if fastattn.explain(*(x.view(8, length, 1, EMBED).transpose(1, 2),) * 3).backend == "reference":
        pytest.skip("the reference backend holds the matrix of probabilities")
    mha = fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    attn_mask = torch.rand(length, length) < 0.5
    masked = torch.rand(8, length) < 0.5
    if attn == "float 2":
        attn_mask = torch.randn(length, length)
    if padding == "float -inf":
        masked = torch.zeros(8, length).masked_fill(masked, float("-inf"))

    def call():
        mha(x, x, x, key_padding_mask=masked, attn_mask=attn_mask, need_weights=False, is_causal=is_causal)

    assert largest_tensor(call) <= max(3 * x.numel(), length * length)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", [{}, {"attn": "float 3", "padding": "bool"}], ids=str)
def test_weights_of_large_problems_are_averaged_in_parts(monkeypatch, masks):
    monkeypatch.setattr("fastattn.ops.attention.weights._TOGETHER", 2 * BATCH * LENGTH * KEYS)
    theirs, ours = pair()
    inputs = make_inputs("cross", theirs)
    masks = make_masks(KEYS, **masks)
    assert_matches_torch(theirs, ours, inputs, masks)


def test_averaged_weights_need_no_matrix_of_every_head(monkeypatch):
    """In training as well, whether or not the weights are used."""
    length = 100
    one_head = BATCH * length * length
    monkeypatch.setattr("fastattn.ops.attention.weights._TOGETHER", one_head)
    x = torch.randn(BATCH, length, EMBED, requires_grad=True)
    if fastattn.explain(*(x.view(BATCH, length, 1, EMBED).transpose(1, 2),) * 3).backend == "reference":
        pytest.skip("the reference backend holds the matrix of probabilities")
    mha = fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True)

    def call():
        out, weights = mha(x, x, x)
        (out.sum() + weights.square().sum()).backward()

    assert largest_tensor(call) == one_head


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
def test_inside_torchs_encoder(masks, norm_first, training):
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, **options)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    ours = copy.deepcopy(theirs)
    for mine in ours.layers:
        before = mine.self_attn
        mine.self_attn = fastattn.MultiheadAttention(EMBED, 4, batch_first=True)
        mine.self_attn.load_state_dict(before.state_dict())
    ours.train(training)
    x = torch.randn(BATCH, LENGTH, EMBED)
    given = {}
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4]])
    if masks in ("causal", "both"):
        given["mask"] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert torch.allclose(ours(x, **given), theirs(x, **given), atol=2e-6)
    with torch.no_grad():
        assert torch.allclose(ours(x, **given), theirs(x, **given), atol=2e-6)


def test_nested_tensors_take_torchs_path():
    """What `nn.TransformerEncoder` makes of a padded batch in inference."""
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(theirs)
    for mine in ours.layers:
        before = mine.self_attn
        mine.self_attn = fastattn.MultiheadAttention(EMBED, 4, batch_first=True)
        mine.self_attn.load_state_dict(before.state_dict())
    ours.eval()
    x = torch.randn(BATCH, LENGTH, EMBED)
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4]])
    with torch.no_grad():
        found, expected = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))
    assert torch.allclose(found, expected, atol=2e-6)


def test_inside_torchs_decoder():
    theirs = nn.TransformerDecoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        module = fastattn.MultiheadAttention(EMBED, 4, batch_first=True)
        module.load_state_dict(getattr(ours, name).state_dict())
        setattr(ours, name, module)
    x, memory = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, KEYS, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for hint in (False, True):
        found, expected = (m(x, memory, tgt_mask=causal, tgt_is_causal=hint) for m in (ours, theirs))
        assert torch.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("attn", [None, "bool 2", "float 2", "causal", "causal bool 2", "causal float 3"])
@pytest.mark.parametrize("padding", [None, "bool", "float -inf"])
def test_compiles_whole(padding, attn):
    mha = fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    is_causal = attn is not None and attn.startswith("causal")
    masks = make_masks(LENGTH, padding, attn.removeprefix("causal").strip() or None if attn else None)
    masks["is_causal"] = is_causal
    torch.compiler.reset()
    compiled = torch.compile(mha, backend="aot_eager", fullgraph=True, dynamic=False)
    out, _ = compiled(x, x, x, need_weights=False, **masks)
    assert torch.allclose(out, mha(x, x, x, **masks)[0], atol=1e-6)


def test_autocast():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    with torch.autocast("cpu", torch.bfloat16):
        found, weights = ours(x, x, x)
        expected, _ = theirs(x, x, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, atol=2e-2)
    assert torch.allclose(weights.float().sum(-1), torch.ones(BATCH, LENGTH), atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    theirs, ours = pair()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(LENGTH, BATCH, EMBED, dtype=dtype)
    found, expected = ours(x, x, x), theirs(x, x, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a, b, atol=8 * torch.finfo(dtype).eps)


def test_forward_hooks_of_the_output_projection_run():
    mha = fastattn.MultiheadAttention(EMBED, HEADS)
    seen = []
    mha.out_proj.register_forward_hook(lambda *_: seen.append(True))
    x = torch.randn(LENGTH, EMBED)
    mha(x, x, x)
    assert seen


@pytest.mark.parametrize(
    "shapes, options, error, message",
    [
        (((5,), (5,), (5,)), {}, ValueError, "2-D"),
        (((5, 2, 24), (7, 24), (7, 24)), {}, ValueError, r"\[7, 24\]"),
        (((5, 2, 23), (7, 2, 24), (7, 2, 24)), {}, ValueError, r"query.* 24, got \[5, 2, 23\]"),
        (((5, 2, 24), (7, 2, 24), (6, 2, 24)), {}, ValueError, r"\[7, 2\], got \[6, 2, 24\]"),
        (((5, 2, 24), (7, 3, 24), (7, 3, 24)), {}, ValueError, "batch 2"),
        (
            ((5, 2, 24), (7, 2, 24), (7, 2, 24)),
            {"attn_mask": torch.ones(7, 5)},
            ValueError,
            r"\[5, 7\], got \[7, 5\]",
        ),
        (
            ((5, 2, 24), (7, 2, 24), (7, 2, 24)),
            {"attn_mask": torch.ones(2, 5, 7)},
            ValueError,
            r"\[6, 5, 7\]",
        ),
        (((5, 2, 24), (7, 2, 24), (7, 2, 24)), {"attn_mask": torch.ones(7)}, ValueError, r"got \[7\]"),
        (
            ((5, 2, 24), (7, 2, 24), (7, 2, 24)),
            {"key_padding_mask": torch.ones(2, 5)},
            ValueError,
            r"\[2, 7\]",
        ),
        (((5, 2, 24), (7, 2, 24), (7, 2, 24)), {"key_padding_mask": torch.ones(7)}, ValueError, r"\[2, 7\]"),
        (((5, 24), (7, 24), (7, 24)), {"key_padding_mask": torch.ones(1, 7)}, ValueError, r"\[7\]"),
        (((5, 24), (7, 24), (7, 24)), {"key_padding_mask": torch.ones(7).int()}, TypeError, "torch.int32"),
        (((5, 24), (7, 24), (7, 24)), {"attn_mask": torch.ones(5, 7).int()}, TypeError, "torch.int32"),
    ],
)
def test_errors_name_expected_and_given(shapes, options, error, message):
    mha = fastattn.MultiheadAttention(EMBED, HEADS)
    with pytest.raises(error, match=message):
        mha(*(torch.randn(shape) for shape in shapes), **options)
