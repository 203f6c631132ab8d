"""The op inside torch's subsystems."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.ops.attention.problem import resolve
from fastattn.testing import present_isas
from tests.attention.cases import device_of, route

pytestmark = pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")
OPS = torch.ops.fastattn


def qkv(length: int = 20, grad: bool = True, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, length, 8, generator=g).to(dtype).requires_grad_(grad) for _ in range(3))


def causal(q, k, v):
    return fastattn.attention(q, k, v, mask=fastattn.causal())


def problem(q: torch.Tensor, k: torch.Tensor, plain: bool, dropout: bool) -> tuple:
    """An op's trailing arguments."""
    mask, bias, sinks = fastattn.causal(), fastattn.Bias(), None
    if not plain:
        blocks = fastattn.block_sparse(torch.rand(3, 3) > 0.3, 8)
        mask = mask & fastattn.documents(torch.tensor([0, 7, 20])) & blocks & (torch.rand(2, 1, 20, 20) > 0.3)
        bias = fastattn.alibi(torch.rand(4)) + torch.randn(1, 4, 20, 20)
        sinks = torch.randn(4)
    seed = torch.tensor([5]) if dropout else None
    rate = 0.25 if dropout else 0.0
    return (*resolve(q, k, mask, bias, sinks, seed, None, None, 0.3, 0.0 if plain else 2.0, rate), "cpu")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(plain: bool, dropout: bool) -> None:
    q, k, v = qkv(grad=False)
    options = problem(q, k, plain, dropout)
    torch.library.opcheck(OPS.attention_forward, (q, k, v, *options))
    out, lse = OPS.attention_forward(q, k, v, *options)
    saved = (torch.randn_like(out), torch.randn_like(lse).nan_to_num(), q, k, v, out, lse, *options)
    for wanted in (8,) if plain else (1, 2, 4, 8, 15):
        torch.library.opcheck(OPS.attention_backward, (*saved, wanted))


def everything(q, k, v, bias, lengths):
    mask = fastattn.causal() & fastattn.key_padding(lengths)
    out, lse = fastattn.attention(q, k, v, mask=mask, bias=bias, dropout=0.1, seed=3, return_lse=True)
    return out.transpose(1, 2).flatten(2).sin(), lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    bias, lengths = torch.randn(1, 4, 20, 20), torch.tensor([20, 9])
    results = []
    for f in (everything, torch.compile(everything, backend=backend, fullgraph=True)):
        leaves = [*qkv(), bias.clone().requires_grad_()]
        out, lse = f(*leaves, lengths)
        (out.sum() + lse.sum()).backward()
        results.append([out.detach(), lse.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_one_tensor_as_q_k_and_v() -> None:
    """Dynamo refused the same tensor twice as an input of an autograd function."""
    torch._dynamo.reset()
    grads = []
    for f in (causal, torch.compile(causal, backend="aot_eager", fullgraph=True)):
        x = qkv()[0]
        f(x, x, x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("turned", [False, True])
def test_compile_with_a_mask_joined_to_a_tensor(turned: bool) -> None:
    """Dynamo took `mask & tensor` for a torch op that returns no tensor."""

    def f(q, k, v, keep):
        mask = keep & fastattn.causal() if turned else fastattn.causal() & keep
        return fastattn.attention(q, k, v, mask=mask)

    torch._dynamo.reset()
    keep = torch.rand(20, 20) > 0.3
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv(), keep), f(*qkv(), keep))


def test_compile_draws_a_fresh_seed_each_call() -> None:
    torch._dynamo.reset()
    f = torch.compile(
        lambda q, k, v: fastattn.attention(q, k, v, dropout=0.5), backend="aot_eager", fullgraph=True
    )
    q, k, v = qkv(grad=False)
    assert not torch.equal(f(q, k, v), f(q, k, v))


def test_no_recompile_for_a_new_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for length in (7, 33, 64, 65):
        out, lse = f(*qkv(length), torch.randn(1, 4, length, length), torch.tensor([length, 3]))
        (out.sum() + lse.sum()).backward()
        assert out.shape == (2, length, 32)
    assert counter.frame_count == 1


def test_export_with_a_dynamic_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return causal(q, k, v)

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Model(), qkv(grad=False), dynamic_shapes=({2: length},) * 3)
    assert [n.target for n in program.graph.nodes if "fastattn" in str(n.target)] == [
        OPS.attention_forward.default
    ]
    inputs = qkv(51, grad=False)
    torch.testing.assert_close(program.module()(*inputs), causal(*inputs))


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = causal(q, k, v)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert causal(q, k.bfloat16(), v).dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.abs().sum() > 0


def test_flop_counter() -> None:
    q, k, v = qkv()
    with FlopCounterMode(display=False) as counted:
        causal(q, k, v).sum().backward()
    matmul = 2 * 2 * 4 * 20 * 20 * 8  # B, H, L_q, L_k, D: the full rectangle, as torch counts
    found = counted.get_flop_counts()["Global"]
    assert found == {OPS.attention_forward: 2 * matmul, OPS.attention_backward: 5 * matmul}


def test_selective_checkpointing_saves_the_kernel() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func is OPS.attention_forward.default
            return func(*args, **(kwargs or {}))

    def calls(**options) -> int:
        with Count() as count:
            checkpoint(lambda *x: causal(*x).sin(), *qkv(), use_reentrant=False, **options).sum().backward()
        return count.calls

    saving = partial(create_selective_checkpoint_contexts, [OPS.attention_forward.default])
    assert calls() == 2
    assert calls(context_fn=saving) == 1


def test_checkpoint_drops_the_same_elements_again() -> None:
    q, k, v = qkv()
    call = lambda q: fastattn.attention(q, k.detach(), v.detach(), dropout=0.5)  # noqa: E731
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(call(q).square().sum(), q)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(checkpoint(call, q, use_reentrant=False).square().sum(), q)
    assert torch.equal(plain, again)


def test_vmap_on_triton() -> None:
    with route("triton") as backend:
        device = device_of(backend)
        f = lambda q, k, v: fastattn.attention(q, k, v, mask=fastattn.causal(), backend=backend)  # noqa: E731
        q, k, v = (torch.randn(3, 1, 2, 9, 8, device=device) for _ in range(3))
        found = torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).square().sum()))(q, k, v)
        want = torch.stack(
            [
                torch.func.grad(lambda q, k, v: causal(q, k, v).square().sum())(*x)
                for x in zip(q, k, v, strict=True)
            ]
        )
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_export_on_triton() -> None:
    """From CPU tensors, where it has to be asked for."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.attention(q, k, v, mask=fastattn.causal(), backend="triton")

    with route("triton") as backend:
        inputs = [x.to(device_of(backend)) for x in qkv(9, grad=False)]
        length = torch.export.Dim("length", min=2, max=4096)
        program = torch.export.export(Model(), tuple(inputs), dynamic_shapes=({2: length},) * 3)
        inputs = [x.to(device_of(backend)) for x in qkv(17, grad=False)]
        torch.testing.assert_close(program.module()(*inputs), causal(*inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0), (0, None, None, None), (None, 1, 2, 0), (2, 0, None, None)], ids=str
)
def test_vmap(in_dims: tuple) -> None:
    def f(q, k, v, keep):
        return fastattn.attention(q, k, v, mask=fastattn.causal() & keep)

    shape = {None: (2, 4, 9, 8), 0: (3, 2, 4, 9, 8), 1: (2, 3, 4, 9, 8), 2: (2, 4, 3, 9, 8)}
    q, k, v = (torch.randn(shape[d]) for d in in_dims[:3])
    keep = torch.rand(*([3] if in_dims[3] == 0 else []), 1, 4, 9, 9) > 0.3
    found = torch.vmap(f, in_dims)(q, k, v, keep)
    pick = lambda x, d, i: x if d is None else x.select(d, i)  # noqa: E731
    for i in range(3):
        want = f(*(pick(x, d, i) for x, d in zip((q, k, v, keep), in_dims, strict=True)))
        torch.testing.assert_close(found[i], want)


def test_vmap_of_grad() -> None:
    q, k, v = (torch.randn(3, 1, 2, 9, 8) for _ in range(3))
    per_sample = torch.func.grad(lambda q, k, v: causal(q, k, v).square().sum(), argnums=(0, 1, 2))
    found = torch.vmap(per_sample)(q, k, v)
    for i in range(3):
        for a, b in zip(found, per_sample(q[i], k[i], v[i]), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (0, 0, None, 1)], ids=str)
def test_vmap_of_grad_with_bias(in_dims: tuple, batch: int) -> None:
    def loss(q, k, v, bias):
        mask = fastattn.key_padding(torch.tensor([9, 4][:batch])) & fastattn.causal()
        return fastattn.attention(q, k, v, bias=bias, mask=mask).square().sum()

    make = lambda d, *shape: torch.randn(*shape[:d], 3, *shape[d:]) if d is not None else torch.randn(shape)  # noqa: E731
    q, k, v = (make(d, batch, 2, 9, 8) for d in in_dims[:3])
    bias = make(in_dims[3], 1, 2, 9, 9)
    per_sample = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    found = torch.vmap(per_sample, in_dims)(q, k, v, bias)
    pick = lambda x, d, i: x if d is None else x.select(d, i)  # noqa: E731
    for i in range(3):
        want = per_sample(*(pick(x, d, i) for x, d in zip((q, k, v, bias), in_dims, strict=True)))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a[i], b)


def test_vmap_with_dropout_is_an_error() -> None:
    """Folded into the batch, a sample would drop other elements forward than backward drops alone."""
    q = torch.randn(3, 1, 2, 9, 8)
    with pytest.raises(NotImplementedError, match="vmap expects dropout 0"):
        torch.vmap(lambda q: fastattn.attention(q, q, q, dropout=0.5, seed=1))(q)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["linear", "square"])
def test_a_second_derivative_is_an_error(loss) -> None:
    """It was 0, unnoticed, where the gradient of out does not depend on q."""
    q, k, v = qkv()
    (grad,) = torch.autograd.grad(loss(causal(q, k, v)), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (grad.square().sum() + q.sum()).backward()
    inner = torch.func.grad(lambda q: loss(causal(q, k.detach(), v.detach())))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda q: inner(q).square().sum())(q.detach())


def test_profiler_names_the_ops() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        causal(*qkv()).sum().backward()
    names = {e.key for e in profile.key_averages()}
    assert {"fastattn::attention_forward", "fastattn::attention_backward"} <= names


def test_lse_gradient() -> None:
    """z-loss: only lse has a gradient."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv()]
        lse = fastattn.attention(*leaves, mask=fastattn.causal(), return_lse=True)[1]
        lse.square().mean().backward()
        grads.append([leaves[0].grad.float(), leaves[1].grad.float()])
        assert leaves[2].grad is None or (leaves[2].grad == 0).all()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in qkv(grad=False))
    options = resolve(q, k, fastattn.causal(), fastattn.Bias(), None, None, None, None, 1.0, 0.0, 0.0)
    out, lse = OPS.attention_forward(q, k, v, *options, "cpu")
    assert out.shape == q.shape and lse.shape == q.shape[:3]
