"""Cross entropy and distillation of a linear layer's logits, which are not held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops.cross_entropy import cpu, linear_cross_entropy, linear_kl_div
from tests.cross_entropy.losses import BACKENDS, assert_right, textbook, textbook_kl_div, using
from tests.cross_entropy.test_cross_entropy import FEATURES

KERNELS = [name for name in BACKENDS if name != "reference"]
SHAPES = [((1, 1, 3), "mean"), ((7, 63, 8), "sum"), ((5, 100, 5), "none"), ((8, 33, 16), "mean")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most three rows at a time, whatever there are of classes."""
    from fastattn.ops.cross_entropy import triton
    from fastattn.ops.cross_entropy.chunks import Chunks

    for module in (cpu, triton):
        monkeypatch.setattr(module, "Chunks", lambda rows, most: Chunks(rows, 3))
    yield


def problem(rows: int, classes: int, dim: int) -> tuple[dict[str, Tensor], Tensor]:
    target = torch.randint(classes, (rows,))
    target[1::5] = -100
    x, weight = torch.randn(rows, dim).double(), torch.randn(classes, dim).double()
    return {"x": x, "weight": weight, "bias": torch.randn(classes).double()}, target


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    return textbook(F.linear(x, weight, bias), target, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.usefixtures("chunks_of_three")
def test_against_torch(backend: str, dtype: torch.dtype, feature: str) -> None:
    options = FEATURES[feature] | {"ignore_index": -100}
    with using(backend) as name:
        for shape, reduction in SHAPES[2:3] if name == "triton" else SHAPES:
            tensors, target = problem(*shape)
            given = {"target": target, "reduction": reduction} | options
            ours = partial(linear_cross_entropy, backend=name, **given)
            assert_right(ours, partial(plain, **given), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.usefixtures("chunks_of_three")
def test_torchs_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies numbers of 16 bits faster, the logits are of them too."""
    monkeypatch.setenv("FASTATTN_GEMM", "torch")
    monkeypatch.setattr(cpu, "_PRODUCT_ROWS", 40)
    for shape, reduction in SHAPES:
        tensors, target = problem(*shape)
        given = {"target": target, "reduction": reduction, "label_smoothing": 0.1}
        ours = partial(linear_cross_entropy, backend="cpu", **given)
        assert_right(ours, partial(plain, **given), tensors, dtype, rounded=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [
        *((torch.float32, name) for name in ("batchmean", "mean", "sum", "none")),
        *((x, "mean") for x in DTYPES[1:]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("chunks_of_three")
def test_distillation_against_torch(backend: str, dtype: torch.dtype, reduction: str) -> None:
    with using(backend) as name:
        for rows, classes, temperature in ((1, 1, 1.0), (7, 63, 2.0)):
            tensors, target = problem(rows, classes, 8)
            student = {"student_x": tensors["x"], "student_weight": tensors["weight"]}
            teacher = {
                "teacher_x": torch.randn(rows, 6).to(dtype),
                "teacher_weight": torch.randn(classes, 6).to(dtype),
            }
            given = {"temperature": temperature, "reduction": reduction, "mask": target != -100}

            ours = partial(linear_kl_div, **teacher, backend=name, **given)
            assert_right(ours, partial(textbook_kl_div, **teacher, **given), student, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_which_gradients_are_wanted(backend: str, reduction: str) -> None:
    tensors, target = problem(6, 9, 4)
    tensors = {name: x.float() for name, x in tensors.items()}
    want = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    plain(**want, target=target, reduction=reduction).sum().backward()
    with using(backend) as name:
        for wanted in (["x"], ["weight"], ["bias"], ["x", "bias"]):
            leaves = {key: x.clone().requires_grad_(key in wanted) for key, x in tensors.items()}
            linear_cross_entropy(**leaves, target=target, reduction=reduction, backend=name).sum().backward()
            for key, x in leaves.items():
                if key in wanted:
                    torch.testing.assert_close(x.grad, want[key].grad)
                else:
                    assert x.grad is None
        with torch.no_grad():
            found = linear_cross_entropy(**leaves, target=target, reduction=reduction, backend=name)
            torch.testing.assert_close(found, plain(**leaves, target=target, reduction=reduction))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_a_tied_weight(backend: str) -> None:
    base, target = torch.randn(11, 2 * 8), torch.randint(11, (2, 3))
    for layout in (lambda e: e[:, ::2], lambda e: e[:, :8], lambda e: e[:, :8].t().contiguous().t()):
        found, want = [], []
        for grads, run in ((found, True), (want, False)):
            embedding = layout(base).detach().requires_grad_()
            x = embedding[target].tanh()  # [2, 3, 8]: the head is the embedding
            if run:
                with using(backend) as name:
                    loss = linear_cross_entropy(x, embedding, target, backend=name)
            else:
                loss = F.cross_entropy(F.linear(x, embedding).flatten(0, 1), target.flatten())
            loss.backward()
            grads += [loss.detach(), embedding.grad]
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_counts(backend: str) -> None:
    with using(backend) as name:
        for rows in (0, 3):
            x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
            bias = torch.randn(5, requires_grad=True)
            target = torch.full((rows,), -100)
            loss = linear_cross_entropy(x, weight, target, bias, backend=name)
            assert torch.isnan(loss)
            loss.backward()
            for leaf in (x, weight, bias):
                assert torch.equal(leaf.grad, torch.zeros_like(leaf))
                leaf.grad = None
            assert linear_cross_entropy(x, weight, target, reduction="sum", backend=name) == 0
            assert linear_cross_entropy(x, weight, target, reduction="none", backend=name).shape == (rows,)
            mask = torch.zeros(rows, dtype=torch.bool)
            loss = linear_kl_div(x, weight, x.detach(), weight.detach(), mask=mask, backend=name)
            assert loss == 0
            loss.backward()
            assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend: str) -> None:
    x, weight, mask = (
        torch.randn(3, 4),
        torch.randn(5, 4, requires_grad=True),
        torch.tensor([True, False, True]),
    )
    x[1] = torch.nan
    with using(backend) as name:
        if name == "reference":
            pytest.skip("0 · NaN is NaN in torch's products")
        loss = linear_kl_div(x, weight, 2 * x, weight.detach(), mask=mask, backend=name)
        want = linear_kl_div(x[mask], weight, 2 * x[mask], weight.detach(), backend=name)
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_the_losses_gradient_is(backend: str) -> None:
    """Gradients made in forward are multiplied by it, once for each backward, whoever holds them."""
    tensors, target = problem(6, 9, 4)
    x, weight = tensors["x"].float().requires_grad_(), tensors["weight"].float().requires_grad_()
    dx, dweight = torch.autograd.grad(plain(x, weight, None, target), (x, weight))
    with using(backend) as name:
        linear = lambda: linear_cross_entropy(x, weight, target, backend=name)  # noqa: E731
        for factor in (1.0, 0.25):
            found = torch.autograd.grad(factor * linear(), (x, weight))
            torch.testing.assert_close(found, (factor * dx, factor * dweight))
        loss = linear()
        for times in (1, 2, 3):
            loss.backward(retain_graph=times < 3)
            torch.testing.assert_close(weight.grad, times * dweight)
            torch.testing.assert_close(x.grad, times * dx)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_there_is_no_second_derivative(backend: str, reduction: str) -> None:
    tensors, target = problem(6, 9, 4)
    x, weight = tensors["x"].float().requires_grad_(), tensors["weight"].float()
    with using(backend) as name:
        for loss in (
            linear_cross_entropy(x, weight, target, reduction=reduction, backend=name),
            linear_kl_div(
                x, weight, x.detach(), weight, reduction=reduction.replace("mean", "batchmean"), backend=name
            ),
            fastattn.cross_entropy(x, target % 4, reduction=reduction, backend=name),
        ):
            (dx,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative on this backend"):
                torch.autograd.grad(dx.square().sum(), x)


def test_gradcheck_of_the_reference() -> None:
    tensors, target = problem(4, 5, 3)
    x, weight, bias = (x.requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(x, weight, target, bias, z_loss=0.1), (x, weight, bias)
    )
    teacher = torch.randn(4, 2).double(), torch.randn(5, 2).double()
    assert torch.autograd.gradcheck(lambda x, w: linear_kl_div(x, w, *teacher, temperature=2.0), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range(backend: str) -> None:
    with using(backend) as name, pytest.raises(IndexError, match="5"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([5, 0]), backend=name)


def test_the_module() -> None:
    x, head, target = torch.randn(2, 3, 4), torch.nn.Linear(4, 5), torch.randint(5, (2, 3))
    module = fastattn.nn.LinearCrossEntropyLoss(z_loss=0.1)
    want = linear_cross_entropy(x, head.weight, target, head.bias, z_loss=0.1)
    torch.testing.assert_close(module(x, head.weight, target, head.bias), want)
    assert not list(module.parameters())
    assert "z_loss=0.1" in repr(module)


def test_memory_is_that_of_a_chunk() -> None:
    """No tensor of the logits' size is made; the largest is a chunk's of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    rows, classes = 512, 1000
    x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(classes, 4, requires_grad=True)
    before = cpu._LOGITS_BYTES
    cpu._LOGITS_BYTES = 4 * classes * 100
    try:
        with Sizes():
            linear_cross_entropy(x, weight, torch.randint(classes, (rows,)), backend="cpu").backward()
    finally:
        cpu._LOGITS_BYTES = before
    assert max(sizes) <= 100 * classes


X, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.zeros(5, 4), Y), {}, r"weight: expected \[V, 3\] for x \[2, 3\], got \[5, 4\]"),
        ((X, W, Y, torch.zeros(3)), {}, r"bias: expected \[5\], got \[3\]"),
        ((X, W.bfloat16(), Y), {}, "weight: expected torch.float32 on cpu, as x, got torch.bfloat16"),
        ((X.long(), W, Y), {}, "x: expected float32"),
        ((X, W, Y[:1]), {}, r"target: expected \[2\]"),
        ((X, W, X), {}, "probabilities"),
        ((X, W, Y), {"reduction": "batchmean"}, "reduction: expected one of"),
    ],
)
def test_errors(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, W, X, torch.zeros(4, 3)), {}, "teacher_weight: expected 5 classes, as the student's, got 4"),
        ((X, W, X[:1], W), {}, r"teacher_x: expected \[2, D_teacher\], got \[1, 3\]"),
        ((X, W, X, torch.zeros(5, 2)), {}, r"teacher_weight: expected \[V, 3\] for teacher_x"),
        ((X, W, X, W.double()), {}, "teacher_weight: expected torch.float32"),
        ((X, W, X, W), {"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ((X, W, X, W), {"mask": Y}, r"mask: expected bool \[2\], got torch.int64 \[2\]"),
        (
            (X, W, X, torch.zeros(5, 3, requires_grad=True)),
            {},
            "teacher_weight: expected one that requires no",
        ),
    ],
)
def test_distillation_errors(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kl_div(*arguments, **options)
