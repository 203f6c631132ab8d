"""Cross entropy of given logits: against torch's in float64, on every backend and instruction set."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops.cross_entropy import cross_entropy
from tests.cross_entropy.losses import BACKENDS, assert_right, textbook, using

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 2.0},
    "z-loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01, "ignore_index": 0},
}
SHAPES = [(1, 1, "mean"), (5, 63, "sum"), (7, 100, "none"), (3, 257, "mean")]


def problem(rows: int, classes: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(rows, classes, dtype=torch.float64)
    target = torch.randint(classes, (rows,))
    target[1::5] = ignore_index
    return logits, target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("feature", "weighted"), [*((name, False) for name in FEATURES), ("plain", True), ("all", True)]
)
def test_against_torch(backend: str, dtype: torch.dtype, feature: str, weighted: bool) -> None:
    options = FEATURES[feature]
    with using(backend) as name:
        for rows, classes, reduction in SHAPES[2:3] if name == "triton" else SHAPES:
            if classes == 1:
                options = {key: value for key, value in options.items() if key != "ignore_index"}
            logits, target = problem(rows, classes, options.get("ignore_index", -100))
            weight = torch.rand(classes).add(0.5).double() if weighted else None
            given = {"target": target, "weight": weight, "reduction": reduction} | options
            ours, plain = partial(cross_entropy, backend=name, **given), partial(textbook, **given)
            assert_right(ours, plain, {"logits": logits}, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_longer_than_a_block(backend: str) -> None:
    """Statistics are joined across blocks, whichever has the largest logit, or none at all."""
    with using(backend) as name:
        logits, target = problem(6, 4099)
        logits[0, :2100], logits[2, 2100:] = -torch.inf, -torch.inf
        logits[3] *= 30
        target[:] = torch.tensor([4000, -100, 3, 4098, 0, 2048])
        options = {"target": target, "reduction": "none"}
        ours, plain = partial(cross_entropy, backend=name, **options), partial(textbook, **options)
        assert_right(ours, plain, {"logits": logits}, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str) -> None:
    logits, target = torch.randn(2, 5, 12), torch.randint(6, (2, 5))
    with using(backend) as name:
        for view in (logits[..., ::2], logits[..., :6], torch.randn(6, 5, 2).transpose(0, 2)):
            x = view.detach().requires_grad_()
            loss = cross_entropy(x, target, reduction="none", backend=name)
            assert loss.shape == (2, 5)
            (found,) = torch.autograd.grad(loss.sum(), x)
            want = F.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none").view(2, 5)
            (dx,) = torch.autograd.grad(want.sum(), x)
            torch.testing.assert_close((loss, found), (want, dx))
        one = cross_entropy(logits[0, 0], torch.tensor(3), backend=name)
        torch.testing.assert_close(one, F.cross_entropy(logits[0, 0], torch.tensor(3)))
        int32 = cross_entropy(logits, target.int(), backend=name)
        torch.testing.assert_close(int32, F.cross_entropy(logits.flatten(0, 1), target.flatten()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_logits_are_left(backend: str) -> None:
    logits, target = torch.randn(3, 7, requires_grad=True), torch.tensor([1, 2, 3])
    before = logits.detach().clone()
    with using(backend) as name:
        cross_entropy(logits, target, softcap=2.0, backend=name).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_counts(backend: str) -> None:
    with using(backend) as name:
        for rows in (0, 3):
            logits, target = torch.randn(rows, 5, requires_grad=True), torch.full((rows,), -100)
            loss = cross_entropy(logits, target, label_smoothing=0.1, backend=name)
            assert torch.isnan(loss)
            loss.backward()
            assert torch.equal(logits.grad, torch.zeros(rows, 5))
            assert cross_entropy(logits, target, reduction="sum", backend=name) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [5, -1])
def test_a_target_out_of_range(backend: str, wrong: int) -> None:
    with using(backend) as name, pytest.raises(IndexError, match=f"{wrong}"):
        cross_entropy(torch.randn(2, 5), torch.tensor([wrong, 0]), backend=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_and_nan_logits(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[-inf] * 5, [inf, 0, 0, 0, 0], [nan, 0, 1, 2, 3], [0, nan, 0, 0, 0], [-inf, 0, 1, 2, 3]]
    )
    target = torch.tensor([0, 1, 2, 3, 1])
    with using(backend) as name:
        found = cross_entropy(logits, target, reduction="none", backend=name)
        torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction="none"), equal_nan=True)


def test_gradcheck_of_the_reference() -> None:
    logits, target = problem(4, 6)
    options = FEATURES["all"] | {"ignore_index": -100}

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x, target, torch.linspace(0.5, 2, 6), **options)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


def test_the_module() -> None:
    weight = torch.rand(5)
    logits, target = torch.randn(3, 5), torch.tensor([1, -100, 3])
    module = fastattn.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    torch.testing.assert_close(module(logits, target), theirs(logits, target))
    assert set(module.state_dict()) == set(theirs.state_dict())
    assert "label_smoothing=0.1" in repr(module)


X, Y = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.zeros(2, 3)), {}, "probabilities are for torch.nn.functional.cross_entropy"),
        ((X, torch.tensor([0, 1, 2])), {}, r"target: expected \[2\] for \[2, 3\], got \[3\]"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4).long()), {}, r"logits.movedim\(1, -1\)"),
        ((X, Y.to(torch.int16)), {}, "target: expected int64 or int32, got torch.int16"),
        ((X, Y.to("meta")), {}, "target: expected it on cpu, got meta"),
        ((X.long(), Y), {}, "logits: expected float32"),
        ((torch.zeros(2, 0), Y), {}, "V >= 1"),
        ((X, Y, torch.ones(2)), {}, r"weight: expected floating \[3\]"),
        ((X, Y, torch.ones(3, requires_grad=True)), {}, "weight: expected one that requires no gradient"),
        ((X, Y), {"reduction": "max"}, "reduction: expected one of .*, got 'max'"),
        ((X, Y), {"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ((X, Y), {"softcap": -1.0}, "softcap: expected a positive number or None"),
        ((X, Y), {"z_loss": -1.0}, "z_loss: expected"),
        ((X, Y), {"backend": "gpu"}, "backend: expected one of"),
    ],
)
def test_errors(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(*arguments, **options)


def test_explain() -> None:
    assert fastattn.explain(cross_entropy, X, Y, backend="cpu").isa
    assert fastattn.explain(cross_entropy, X.double(), Y).backend == "reference"
    with pytest.raises(NotImplementedError, match="float64"):
        cross_entropy(X.double(), Y, backend="cpu")
    with pytest.raises(TypeError, match="target: expected a tensor, got list"):
        cross_entropy(X, [0, 1])
