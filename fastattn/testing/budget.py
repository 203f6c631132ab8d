"""The error budget: |ours - f64| <= 2 · |plain PyTorch in the same dtype - f64| + a rounding band."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import api
from fastattn.ops.attention.biases import Alibi, Bias, ByDistance, RelativePosition, as_bias
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.philox import drop_threshold, dropout_keep


class Errors(NamedTuple):
    """Largest absolute errors of one tensor against float64, and the size of what it should be.

    Attributes:
        name: ``out``, ``lse``, or the gradient's: ``dq``, ``dk``, ``dv``, ``dsinks``, ``dbias``, ``dslopes``,
            ``dtable``.
        ours: error of the backend under test.
        plain: error of plain PyTorch in the same dtype.
        scale: largest absolute value of the float64 result; of a slope's gradient no less than the longest
            distance.
        dtype: of the tensor.
        lse: largest absolute log-sum-exp of the problem.
    """

    name: str
    ours: float
    plain: float
    scale: float
    dtype: torch.dtype
    lse: float

    @property
    def budget(self) -> float:
        """What `ours` may be: the band is one rounding to the dtype, and some in the accumulators' float32.

        Accumulators are taken to be at least of size 1, as they are for inputs of unit variance: a gradient
        may be small because large terms cancel. And as ``P = exp(S - lse)``, P has lse's rounding,
        eps · abs(lse).
        """
        roundings = max(32, 4 * self.lse)
        band = torch.finfo(self.dtype).eps * self.scale
        return 2 * self.plain + band + roundings * torch.finfo(torch.float32).eps * max(self.scale, 1)


def assert_within_budget(errors: list[Errors]) -> None:
    """Raise AssertionError naming every tensor whose error is over its budget (NaN is over any)."""
    unfit = [e.name for e in errors if not math.isfinite(e.plain)]
    assert not unfit, f"plain PyTorch's own error is not finite, so there is no budget: {unfit}"
    over = [e for e in errors if not e.ours <= e.budget]
    assert not over, "; ".join(f"{e.name}: error {e.ours:.3e} over budget {e.budget:.3e}" for e in over)


def attention_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> list[Errors]:
    """Errors of `fastattn.attention`, forward and every gradient, lse's included.

    Args: those of `fastattn.attention`; with dropout, a seed. `options` are scale, softcap, q_start and
        k_start.

    Returns:
        One `Errors` each for out, lse, dq, dk, dv and what else there is of dsinks, dbias (the dense part's),
        dslopes and dtable.
    """
    bias = as_bias(bias)
    extras = {"sinks": sinks} if sinks is not None else {}
    inputs = {"q": q, "k": k, "v": v, **extras, **_tensors(bias)}
    generator = torch.Generator(q.device).manual_seed(0)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator, device=q.device, dtype=torch.float64)
    dlse = torch.randn(q.shape[:3], generator=generator, device=q.device, dtype=torch.float64)

    def results(function: Callable[..., Any], double: bool, **own: Any) -> list[Tensor]:
        leaves = {
            name: x.detach().to(torch.float64 if double else x.dtype).requires_grad_()
            for name, x in inputs.items()
        }
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        given = {"mask": mask, "bias": _with_tensors(bias, leaves), "sinks": leaves.get("sinks")}
        out, lse = function(q, k, v, **given, dropout=dropout, **options, **own)
        # An empty row's lse is -inf and has no gradient: leave it out of the loss.
        reached = torch.where(torch.isinf(lse), 0.0, lse.double() * dlse)
        ((out.double() * dout.to(inputs["q"].dtype).double()).sum() + reached.sum()).backward()
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves.values()]
        return [out.detach(), lse.detach(), *grads]

    ours = results(api.attention, False, seed=seed, return_lse=True, backend=backend)
    plain = results(_textbook, False, seed=seed)
    exact = results(_textbook, True, seed=seed)
    names = ["out", "lse", *("d" + name for name in inputs)]
    lse = size(exact[1])
    # The terms of a slope's gradient are distances times those of a score's.
    far = {name: float(k.shape[2]) for name in names if name.startswith("dslopes")}
    return [
        Errors(name, distance(a, c), distance(b, c), max(size(c), far.get(name, 0.0)), a.dtype, lse)
        for name, a, b, c in zip(names, ours, plain, exact, strict=True)
    ]


_NAMES: Final[dict[type[ByDistance], str]] = {Alibi: "slopes", RelativePosition: "table"}


def _tensors(bias: Bias) -> dict[str, Tensor]:
    """What of the bias has a gradient, by name; a second table is ``table1``."""
    found = {} if bias.dense is None else {"bias": bias.dense}
    for i, part in enumerate(bias.compact):
        name = _NAMES[type(part)]
        found[name if name not in found else f"{name}{i}"] = part.parameter
    return found


def _with_tensors(bias: Bias, tensors: dict[str, Tensor]) -> Bias:
    """The same bias of other tensors, by the names that `_tensors` gave them."""
    names = iter(name for name in _tensors(bias) if name != "bias")
    compact = tuple(part.of(tensors[next(names)]) for part in bias.compact)
    return Bias(tensors.get("bias"), compact)


def _textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None,
    bias: Bias,
    sinks: Tensor | None,
    dropout: float,
    seed: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The equation with every intermediate in q's dtype: what the budget is measured from."""
    group, k_length = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = as_mask(mask)
    place: dict[str, Any] = {
        "q_length": q.shape[2],
        "k_length": k_length,
        "q_start": q_start,
        "k_start": k_start,
    }
    added = bias.to_dense(**place, documents=mask.documents if bias.compact else None)
    if added is not None:
        # A bias of more digits is not rounded before it is added.
        scores = (scores + added).to(q.dtype)
    keep = mask.to_dense(**place, batch=q.shape[0], device=q.device)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)), -1)
    empty = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty, float("-inf"))
    probs = torch.softmax(scores, -1).masked_fill(empty[..., None], 0.0)[..., :k_length]
    if dropout > 0:
        assert seed is not None and not isinstance(q_start, Tensor)
        shape = (*q.shape[:3], k_length)
        kept = dropout_keep(torch.tensor([seed], device=q.device), dropout, shape, q_start or 0, k_start or 0)
        probs = probs * kept * (65536 / (65536 - drop_threshold(dropout)))
    return probs @ v, lse


def distance(found: Tensor, exact: Tensor) -> float:
    """Largest |found - exact|; infinities must agree, NaN is infinitely far."""
    found = found.double()
    apart = torch.where(found == exact, 0.0, (found - exact).abs()).nan_to_num(nan=math.inf)
    return float(apart.max()) if apart.numel() else 0.0


def size(exact: Tensor) -> float:
    """Largest finite |exact|."""
    finite = exact[exact.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
