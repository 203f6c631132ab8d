"""Every spelling is found and gives the same, in training and evaluation, static and dynamic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.compiler
from fastattn.compiler.backend import backend
from tests.compiler.look_alikes import LOOK_ALIKES
from tests.compiler.spellings import SPELLINGS, Spelling

HEADS, DIM = 4, 16
# Masks that are known only where their size is, as they are computed to see what they are.
COMPUTED = {"window_by_distance", "bias_of_other_bits"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def inputs(
    length: int, batch: int = 2, dtype: torch.dtype = torch.float32, grad: bool = True
) -> list[Tensor]:
    found = [torch.randn(batch, HEADS, length, DIM).to(dtype) for _ in range(3)]
    return [x.requires_grad_(grad) for x in found]


def results(function: Any, given: list[Tensor]) -> list[Tensor]:
    """The result and, of inputs that ask for them, the gradients."""
    out = function(*given)
    if not given[0].requires_grad:
        return [out]
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), given, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)),
    ]


def check(function: Spelling, compiled: Any, given: list[Tensor]) -> None:
    """Compiled and eager against float64: no further from it than twice eager's own error, and a rounding."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    exact, naive, ours = results(function, wide), results(function, given), results(compiled, given)
    for e, n, o in zip(exact, naive, ours, strict=True):
        scale = e.abs().max().clamp(min=1)
        eps = torch.finfo(n.dtype).eps
        allowed = 2 * (n.double() - e).abs().max() + 8 * eps * scale
        assert (o.double() - e).abs().max() <= allowed
        assert o.dtype == n.dtype and o.shape == n.shape


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("grad", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_spelling(name: str, grad: bool, dynamic: bool) -> None:
    function, words = SPELLINGS[name]
    compiled = torch.compile(
        function, backend=partial(backend, then="eager"), dynamic=dynamic, fullgraph=True
    )
    for length in (13, 17) if dynamic and grad else (13,):
        check(function, compiled, inputs(length, grad=grad))
    found = fastattn.compiler.report()
    assert found.rewritten == found.seen, found
    assert found.seen == 1, "compiled anew for another length"
    assert found.records[0].mask == ("bool mask" if dynamic and name in COMPUTED else words)


@pytest.mark.parametrize(
    "name", ["softmax_in_float32", "cast_there_and_back", "tril_masked_fill", "repeat_kv", "softcapped"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    function, words = SPELLINGS[name]
    compiled = torch.compile(function, backend=partial(backend, then="eager"), fullgraph=True)
    check(function, compiled, inputs(13, dtype=dtype))
    assert [record.mask for record in fastattn.compiler.report().records] == [words]


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alike_is_left(name: str) -> None:
    function, reason = LOOK_ALIKES[name]
    compiled = torch.compile(function, backend=partial(backend, then="eager"), fullgraph=True)
    given = inputs(13)
    for ours, theirs in zip(results(compiled, given), results(function, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    found = fastattn.compiler.report()
    assert found.rewritten == 0
    assert reason in str(found)


def test_float64_is_left() -> None:
    function = SPELLINGS["matmul_scale_after"][0]
    compiled = torch.compile(function, backend=partial(backend, then="eager"), fullgraph=True)
    compiled(*inputs(5, dtype=torch.float64))
    assert "expected float32, bfloat16 or float16, got torch.float64" in str(fastattn.compiler.report())


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (lambda scores, t: scores / 0, "a division by 0"),
        (lambda scores, t: torch.tanh(scores / t.item()), "a number that the values of tensors decide"),
    ],
    ids=["zero", "item"],
)
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_are_left(by: Any, reason: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        out: Tensor = by(q @ k.mT, t).softmax(-1) @ v
        return out

    given = [*inputs(5, grad=False), torch.tensor(0.5)]
    compiled = torch.compile(function, backend=partial(backend, then="eager"), fullgraph=True)
    torch.testing.assert_close(compiled(*given), function(*given), equal_nan=True)
    assert reason in str(fastattn.compiler.report())


def test_what_is_not_foreseen_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("fastattn.compiler.rewrite.masking_of", broken)
    function = SPELLINGS["tril_masked_fill"][0]
    given = inputs(5, grad=False)
    compiled = torch.compile(function, backend=partial(backend, then="eager"), fullgraph=True)
    torch.testing.assert_close(compiled(*given), function(*given))
    assert "unexpected IndexError: tuple index out of range" in str(fastattn.compiler.report())
