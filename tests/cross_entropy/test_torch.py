"""What torch does with the ops: checks, compiles, maps, counts, casts them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops.cross_entropy import cross_entropy, linear_cross_entropy, linear_kl_div


def tensors(rows: int = 5, classes: int = 11, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(classes, (rows,))
    target[1] = -100
    return torch.randn(rows, dim), torch.randn(classes, dim), target


def test_opcheck() -> None:
    x, weight, target = tensors()
    logits, dloss, bias = x @ weight.t(), torch.rand(5), torch.randn(11)
    options = (-100, 0.1, 2.0, 0.1)
    ops = torch.ops.fastattn
    lse = torch.logsumexp(2.0 * torch.tanh(logits / 2.0), -1)
    torch.library.opcheck(ops.cross_entropy_forward, (logits, target, None, *options, "cpu"))
    torch.library.opcheck(ops.cross_entropy_backward, (dloss, lse, logits, target, bias, *options, "cpu"))
    for wanted in (0, 7):
        given = dloss if wanted else None
        torch.library.opcheck(
            ops.linear_cross_entropy, (x, weight, target, bias, given, *options, wanted, "cpu")
        )
        torch.library.opcheck(ops.linear_kl_div, (x, weight, x, weight, given, 2.0, wanted & 3, "cpu"))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits": lambda x, w, y: cross_entropy(x @ w.t(), y, label_smoothing=0.1),
    "linear": lambda x, w, y: linear_cross_entropy(x, w, y, softcap=5.0),
    "linear-none": lambda x, w, y: linear_cross_entropy(x, w, y, reduction="none").sum(),
    "kl-div": lambda x, w, y: linear_kl_div(
        x, w, 2 * x.detach(), w.detach(), mask=y != -100, temperature=2.0
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_compile_fullgraph_without_recompiling(loss: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[loss], backend=counter, fullgraph=True, dynamic=True)
    x, weight, target = tensors(9)
    compiled(x.requires_grad_(), weight.requires_grad_(), target)
    frames = counter.frame_count
    for rows in (5, 7, 12):
        x, weight, target = tensors(rows)
        found, want = [], []
        for results, run in ((found, compiled), (want, LOSSES[loss])):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            value = 3 * run(*leaves, target)
            results += [value.detach(), *torch.autograd.grad(value, leaves)]
        torch.testing.assert_close(found, want)
    assert counter.frame_count == frames


@pytest.mark.parametrize("loss", LOSSES)
def test_transforms(loss: str) -> None:
    """grad, vmap, and each of the other."""
    run = LOSSES[loss]
    x, weight, target = torch.randn(3, 5, 4), torch.randn(11, 4), torch.randint(11, (3, 5))
    want = torch.stack([run(x[i], weight, target[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(run, (0, None, 0))(x, weight, target), want)

    both = (0, 1)
    each = [torch.func.grad(run, both)(x[i], weight, target[i]) for i in range(3)]
    dx, dweight = (torch.stack(parts) for parts in zip(*each, strict=True))
    found = torch.vmap(torch.func.grad(run, both), (0, None, 0))(x, weight, target)
    torch.testing.assert_close(found, (dx, dweight))

    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    torch.vmap(run, (0, None, 0))(*leaves, target).sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], [dx, dweight.sum(0)])


def test_autocast() -> None:
    x, weight, target = tensors()
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target)
        want = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target)
        given = cross_entropy(x, target % 4)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    torch.testing.assert_close(given, F.cross_entropy(x, target % 4))
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, target = tensors()
    product = 2 * 5 * 11 * 4
    x.requires_grad_(), weight.requires_grad_()
    for reduction, forward, both in (("mean", 3, 3), ("none", 1, 4)):
        with FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy(x, weight, target, reduction=reduction)
            assert counter.get_total_flops() == forward * product
            loss.sum().backward()
        assert counter.get_total_flops() == both * product
    with FlopCounterMode(display=False) as counter:
        linear_kl_div(x, weight, x.detach(), weight.detach())
    assert counter.get_total_flops() == 4 * product


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight, target = tensors()
    results = []
    for run in (
        linear_cross_entropy,
        lambda *args: checkpoint(linear_cross_entropy, *args, use_reentrant=False),
    ):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        (2 * run(*leaves, target)).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_explain() -> None:
    x, weight, target = tensors()
    assert fastattn.explain(linear_cross_entropy, x, weight, target).backend == "cpu"
    assert (
        fastattn.explain(linear_kl_div, x.double(), weight.double(), x.double(), weight.double()).backend
        == "reference"
    )


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_under_a_scaled_loss(scale: float) -> None:
    x, weight, target = torch.randn(4096, 32), 0.1 * torch.randn(512, 32), torch.randint(512, (4096,))
    found = []
    for loss, dtype in (
        (linear_cross_entropy, torch.float16),
        (lambda x, w, t: F.cross_entropy((x @ w.t()).float(), t), torch.float16),
        (lambda x, w, t: F.cross_entropy(x @ w.t(), t), torch.float64),
    ):
        tensors = [a.half().to(dtype).requires_grad_() for a in (x, weight)]
        (loss(*tensors, target) * scale).backward()
        found.append([a.grad.double() for a in tensors])
    for ours, theirs, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cross_entropy(x, torch.tensor([1, 0])),
        lambda x: linear_cross_entropy(x, x, torch.tensor([1, 0])),
    ],
)
def test_forward_mode_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        loss(torch.autograd.forward_ad.make_dual(x, x))


def test_a_compiled_loss_without_grad() -> None:
    x, weight, target = tensors()
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            of_head, of_logits = linear_cross_entropy(x, weight, target), cross_entropy(x, target % 4)
        return of_head + of_logits + x.sum()

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, loss(x))


def test_batched_gradients() -> None:
    x, weight, target = tensors()
    x.requires_grad_()
    many = torch.tensor([1.0, 2.0])
    (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, target), x, many, is_grads_batched=True)
    (want,) = torch.autograd.grad(F.cross_entropy(x @ weight.t(), target), x, many, is_grads_batched=True)
    torch.testing.assert_close(found, want)


def test_the_module_refuses_what_may_be_torchs_layout() -> None:
    with pytest.raises(ValueError, match=r"tells \[..., V\] from torch's"):
        fastattn.nn.CrossEntropyLoss()(torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.int64))
