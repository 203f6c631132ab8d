"""Calls of torch's own `scaled_dot_product_attention` that come to our kernels, and go back."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.integrations import torch_override, torch_sdpa
from fastattn.testing import present_isas

BACKENDS = ["reference", *(["cpu"] if present_isas() else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    yield request.param
    torch_override.disable()
    assert not torch_override.is_enabled()


@pytest.fixture
def calls(monkeypatch):
    """Our kernels' calls, forward and backward, as torch's dispatcher makes them."""
    seen = []

    def spied(function, name):
        def spy(*args, **options):
            seen.append(name)
            return function(*args, **options)

        return spy

    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(torch_override, name, spied(getattr(torch_override, name), name))
    return seen


def qkv(*lead, q_length=9, k_length=11, dim=8, v_dim=8, dtype=torch.float32):
    lead = lead or (2, 3)
    shapes = [(*lead, q_length, dim), (*lead, k_length, dim), (*lead, k_length, v_dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def results(tensors, attn_mask=None, function=F.scaled_dot_product_attention, **options):
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if attn_mask is not None and attn_mask.requires_grad:
        attn_mask = attn_mask.detach().clone().requires_grad_()
        leaves.append(attn_mask)
    out = function(*leaves[:3], attn_mask=attn_mask, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


BOOL = torch.rand(9, 11, generator=torch.Generator().manual_seed(0)) > 0.3
FLOAT = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
CASES = {
    "plain": (qkv, {}),
    "causal": (qkv, {"is_causal": True}),
    "scale": (qkv, {"scale": 0.7}),
    "bool mask": (qkv, {"attn_mask": BOOL}),
    "float mask": (qkv, {"attn_mask": FLOAT}),
    "float mask with a gradient": (qkv, {"attn_mask": FLOAT.clone().requires_grad_()}),
    "value dim": (lambda: qkv(v_dim=5), {}),
    "grouped": (
        lambda: [torch.randn(2, 6, 9, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)],
        {"enable_gqa": True},
    ),
    "three dimensions": (lambda: qkv(3), {}),
    "five dimensions": (lambda: qkv(2, 2, 3), {"is_causal": True}),
    "bfloat16": (lambda: qkv(dtype=torch.bfloat16), {"is_causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_call_comes_to_us_and_goes_back(case, backend, calls):
    make, options = CASES[case]
    tensors = make()
    before = results(tensors, **options)
    assert calls == []
    with torch_override.override(backend):
        found = results(tensors, **options)
        assert calls == ["attention"]
        assert torch_override.explain(*tensors, **options).backend == backend
    after = results(tensors, **options)
    atol = 0.03 if tensors[0].dtype == torch.bfloat16 else 1e-5
    for ours, theirs, again in zip(found, before, after, strict=True):
        assert torch.allclose(ours, theirs, atol=atol)
        assert torch.equal(theirs, again)
    assert calls == ["attention"]
    assert torch_override.explain(*tensors, **options).backend == "torch"


@pytest.mark.parametrize("shape", [(9, 11), (1, 1, 9, 11), (2, 3, 9, 11), (2, 1, 1, 11)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_flash_ops_themselves(backend, calls, shape, is_causal, with_mask):
    """What compiled functions call: layouts, the log-sum-exp and the gradients are torch's own."""
    q, k, v = (x.detach() for x in qkv())
    mask = torch.randn(shape).masked_fill(torch.rand(shape) > 0.7, float("-inf")) if with_mask else None
    if with_mask and shape == (9, 11):
        mask[3] = float("-inf")
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad = torch.randn(q.shape)

    def run():
        out, lse = forward(q, k, v, is_causal=is_causal, attn_mask=mask, scale=0.4)
        return out, lse, *backward(grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=0.4)

    theirs = run()
    with torch_override.override(backend):
        ours = run()
        # One of each: ours forward, theirs backward.
        out, lse = forward(q, k, v, is_causal=is_causal, attn_mask=mask, scale=0.4)
    mixed = out, lse, *backward(grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=0.4)
    assert calls == ["attention", "attention_backward", "attention"]
    for found in (ours, mixed):
        for a, b in zip(found, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_the_flash_op_keeps_the_layout_of_the_query(backend, layout):
    q, k, v = (x.detach() for x in qkv())
    inverse = [layout.index(i) for i in range(4)]
    q = q.permute(layout).contiguous().permute(inverse)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    theirs = forward(q, k, v)[0]
    with torch_override.override(backend):
        ours = forward(q, k, v)[0]
    assert ours.stride() == theirs.stride() == torch.empty_like(q).stride()
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("grad", ["grad", "no_grad", "inference_mode"])
def test_with_and_without_gradients(backend, calls, grad):
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[
        grad
    ]
    tensors = qkv()
    with torch_override.override(backend), context():
        out = F.scaled_dot_product_attention(*tensors)
    assert calls == ["attention"]
    assert out.requires_grad == (grad == "grad")


def test_modules_of_torch(backend, calls):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    expected = layer(x)
    with torch_override.override(backend):
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert calls == ["attention"]


def test_autocast(backend, calls):
    with torch_override.override(backend), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*qkv()).dtype == torch.bfloat16
    assert calls == ["attention"]


def test_dropout_is_ours_by_torchs_seed(backend, calls):
    query = torch.randn(2, 4, 100, 16)
    value = torch.ones(2, 4, 100, 16)
    with torch_override.override(backend):
        torch.manual_seed(7)
        one = F.scaled_dot_product_attention(query, query, value, dropout_p=0.25)
        torch.manual_seed(7)
        assert torch.equal(one, F.scaled_dot_product_attention(query, query, value, dropout_p=0.25))
        torch.manual_seed(7)
        options = {"dropout_p": 0.25}
        ours = torch_sdpa.scaled_dot_product_attention(query, query, value, **options)
    assert abs(one.mean() - 1) < 0.02
    assert one.std() > 0.01
    assert torch.equal(one, ours) or backend == "reference"
    assert len(calls) == 2


class Labelled(torch.Tensor):
    pass


def tangent(*tensors):
    with torch.autograd.forward_ad.dual_level():
        query = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, *tensors[1:])


def math(*tensors):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors)


def wide(*tensors):
    return F.scaled_dot_product_attention(*(x.repeat_interleave(65, -1) for x in tensors))


def float64(*tensors):
    return F.scaled_dot_product_attention(*(x.double() for x in tensors))


def float64_with_mask(*tensors):
    return F.scaled_dot_product_attention(*(x.double() for x in tensors), attn_mask=FLOAT.double())


@pytest.mark.parametrize("function", [float64, float64_with_mask, math, wide, tangent])
def test_what_is_torchs_own_stays_bit_for_bit(backend, calls, function):
    tensors = [x.detach() for x in qkv()]
    expected = function(*tensors)
    with torch_override.override(backend):
        assert torch.equal(function(*tensors), expected)
    assert calls == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms(backend, calls):
    tensors = [x.detach() for x in qkv(2, 2, 3)]

    def loss(*tensors):
        return F.scaled_dot_product_attention(*tensors).square().sum()

    vmapped, grads = torch.func.vmap(F.scaled_dot_product_attention), torch.func.grad(loss, (0, 1, 2))
    expected = vmapped(*tensors), *grads(*tensors)
    with torch_override.override(backend):
        found = vmapped(*tensors), *grads(*tensors)
    assert calls == ["attention"] * 3  # one for each that vmap maps, one under grad
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_gradients_of_float64_are_torchs_own(backend, calls):
    tensors = qkv(dtype=torch.float64)
    expected = results(tensors, is_causal=True)
    with torch_override.override(backend):
        found = results(tensors, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert calls == []


def test_what_is_wrong_torch_says_itself(backend):
    query, key, value = (x.detach() for x in qkv())
    with torch_override.override(backend):
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, key[..., :4], value)
        with pytest.raises(RuntimeError, match=r"[Mm]ask"):
            F.scaled_dot_product_attention(query, key, value, attn_mask=torch.ones(9, 11, dtype=torch.int))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.double(), "got torch.float64"),
        (lambda x: x.to("meta"), "got meta"),
        (lambda x: x.as_subclass(Labelled), "got Labelled"),
        (lambda x: x.repeat_interleave(65, -1), "at most 512, got 520"),
        (lambda x: torch.nested.nested_tensor([x[0]], layout=torch.jagged), "nested"),
    ],
)
def test_explains_what_is_torchs(backend, change, message):
    tensors = [change(x.detach()) for x in qkv()]
    with torch_override.override(backend):
        found = torch_override.explain(*tensors)
    assert found.backend == "torch"
    assert message in found.reasons[backend][0]


def test_explains_where_torch_was_asked_for_another_kernel(backend):
    tensors = qkv()
    with torch_override.override(backend):
        with sdpa_kernel([SDPBackend.MATH]):
            assert "sdpa_kernel" in torch_override.explain(*tensors).reasons[backend][0]
        assert torch_override.explain(*tensors).backend == backend
        assert torch_override.explain(*tensors, dropout_p=1.0).backend == "torch"


def test_our_own_function_explains_itself():
    query, key, value = qkv()
    assert torch_sdpa.explain(query, key, value, is_causal=True) == fastattn.explain(query, key, value)
    with pytest.raises(TypeError, match="int32"):
        torch_sdpa.explain(query, key, value, torch.ones(9, 11, dtype=torch.int))


COMPILED = {
    "causal": {"is_causal": True},
    "mask": {"attn_mask": FLOAT},
    "mask with a gradient": {"attn_mask": FLOAT.clone().requires_grad_()},
    "value dim": {},
}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_while_it_is_on(backend, calls, case, compiler):
    """And used after it has been turned off: the function is torch's again."""
    tensors, options = qkv(v_dim=5 if case == "value dim" else 8), COMPILED[case]

    def function(*args, **options):
        return F.scaled_dot_product_attention(*args, **options)

    torch.compiler.reset()
    before = results(tensors, **options)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    untouched = results(tensors, **options, function=compiled)
    torch.compiler.reset()
    tag = torch.compiler.config.cache_key_tag
    with torch_override.override(backend):
        found = results(tensors, **options, function=compiled)
        again = results(tensors, **options, function=compiled)
        assert torch.compiler.config.cache_key_tag != tag
    assert torch.compiler.config.cache_key_tag == tag
    assert "attention" in calls
    for a, b, c in zip(found, again, before, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-5)
    calls.clear()
    after = results(tensors, **options, function=compiled)
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(after, untouched, strict=True))


@pytest.mark.slow
def test_compiled_code_from_the_cache_on_disk_is_given_up_as_well(backend):
    """Then nothing of ours is traced but by Dynamo."""
    tensors = qkv(v_dim=5)
    torch.compiler.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, backend="inductor", fullgraph=True)
    untouched = results(tensors, function=compiled)
    for _ in range(2):
        torch.compiler.reset()
        with torch_override.override(backend):
            assert torch.allclose(results(tensors, function=compiled)[0], untouched[0], atol=1e-5)
        after = results(tensors, function=compiled)
        assert all(torch.equal(a, b) for a, b in zip(after, untouched, strict=True))


def test_compiled_before_it_is_on(backend, calls):
    """A call of torch's flash kernel in a compiled graph is ours from when it is turned on."""
    tensors = qkv()
    torch.compiler.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    before = results(tensors, function=compiled)
    assert calls == []
    with torch_override.override(backend):
        found = results(tensors, function=compiled)
    assert calls == ["attention", "attention_backward"]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, before, strict=True))
    after = results(tensors, function=compiled)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(calls) == 2


def test_dynamic_shapes_compile_once(backend):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(F.scaled_dot_product_attention, backend=count, fullgraph=True, dynamic=True)
    with torch_override.override(backend):
        for length in (5, 8, 13):
            q, k, v = (x.detach() for x in qkv(q_length=length, k_length=length))
            expected = torch_sdpa.scaled_dot_product_attention(q, k, v)
            assert torch.allclose(compiled(q, k, v), expected, atol=1e-6)
    assert len(graphs) == 1


def test_global_switch_and_contexts_do_not_end_each_other(calls):
    tensors = [x.detach() for x in qkv()]

    def is_ours():
        calls.clear()
        F.scaled_dot_product_attention(*tensors)
        return bool(calls)

    torch_override.enable("reference")
    torch_override.enable("reference")
    with torch_override.override("reference"):
        torch_override.disable()
        assert is_ours()
        with torch_override.override("reference"):
            assert is_ours()
        assert is_ours()
        torch_override.enable("reference")
    assert is_ours()
    torch_override.disable()
    torch_override.disable()
    assert not is_ours()


def test_off_after_an_exception(calls):
    with pytest.raises(ZeroDivisionError), torch_override.override("reference"):
        _ = 1 / 0
    F.scaled_dot_product_attention(*qkv())
    assert not torch_override.is_enabled()
    assert calls == []


def test_holds_in_other_threads(backend, calls):
    tensors = [x.detach() for x in qkv()]
    with torch_override.override(backend):
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=tensors)
        thread.start()
        thread.join()
    assert calls == ["attention"]


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="torch before 2.11"
)
def test_torchs_own_registry(backend, calls):
    tensors = [x.detach() for x in qkv()]
    torch_override.register("FASTATTN_TEST", backend=backend)
    assert "FASTATTN_TEST" in torch.nn.attention.list_flash_attention_impls()
    assert not torch_override.is_enabled()
    before = F.scaled_dot_product_attention(*tensors)
    torch.nn.attention.activate_flash_attention_impl("FASTATTN_TEST")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "FASTATTN_TEST"
        assert torch.allclose(F.scaled_dot_product_attention(*tensors), before, atol=1e-5)
        assert calls == ["attention"]
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.equal(F.scaled_dot_product_attention(*tensors), before)
    assert calls == ["attention"]


def test_a_torch_without_a_registry_says_what_to_use(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match=r"2\.11 or later.*torch_override\.enable"):
        torch_override.register()


def test_a_backend_that_is_not_here_leaves_torch_alone(monkeypatch):
    with pytest.raises(ValueError, match="'no such'"):
        torch_override.enable("no such")
    monkeypatch.setattr("fastattn._backends.unavailable", lambda name: ["none was built"] * (name == "cpu"))
    with pytest.raises(NotImplementedError, match="none was built; torch keeps its own"):
        torch_override.enable()
    assert not torch_override.is_enabled()


def test_a_failure_to_turn_it_on_leaves_all_as_it_was(monkeypatch, calls):
    tensors = [x.detach() for x in qkv()]
    impl = torch.library.Library.impl

    def failing(library, name, *args, **options):
        if name == torch_override._BACKWARD and "other" in found:
            found.discard("other")
            raise RuntimeError("no room")
        return impl(library, name, *args, **options)

    found = {"other"}
    monkeypatch.setattr(torch.library.Library, "impl", failing)
    plain = F.scaled_dot_product_attention(*tensors)
    for turn_on in (torch_override.enable, lambda name: torch_override.override(name).__enter__()):
        found.add("other")
        with pytest.raises(RuntimeError, match="no room"):
            turn_on("reference")
        assert not torch_override.is_enabled()
        assert torch.equal(F.scaled_dot_product_attention(*tensors), plain)
        assert calls == []
    with torch_override.override("reference"):
        F.scaled_dot_product_attention(*tensors)
        assert calls == ["attention"]
    assert not torch_override.is_enabled()


def test_second_derivatives_raise(backend):
    if backend == "reference":
        pytest.skip("the reference has every derivative")
    tensors = qkv()
    with torch_override.override(backend):
        out = F.scaled_dot_product_attention(*tensors)
        (grad,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.sum().backward()
