"""The error budget: |ours - f64| <= 2 · |plain PyTorch in the same dtype - f64| + a rounding band."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import api, reference
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.attention.philox import drop_threshold, dropout_keep


class Errors(NamedTuple):
    """Largest absolute errors of one tensor against float64, and the size of what it should be.

    Attributes:
        name: ``out``, ``lse``, ``dq``, ``dk``, ``dv`` or ``dbias``.
        ours: error of the backend under test.
        plain: error of plain PyTorch in the same dtype.
        scale: largest absolute value of the float64 result.
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
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> list[Errors]:
    """Errors of `fastattn.attention`, forward and every gradient, lse's included.

    Args: those of `fastattn.attention`; with dropout, a seed.

    Returns:
        One `Errors` each for out, lse, dq, dk, dv and, where there is a bias, dbias.
    """
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    generator = torch.Generator(q.device).manual_seed(0)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator, device=q.device, dtype=torch.float64)
    dlse = torch.randn(q.shape[:3], generator=generator, device=q.device, dtype=torch.float64)

    def results(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = function(*leaves)  # type: ignore[operator]
        # An empty row's lse is -inf and has no gradient: leave it out of the loss.
        reached = torch.where(torch.isinf(lse), 0.0, lse.double() * dlse)
        ((out.double() * dout.to(q.dtype).double()).sum() + reached.sum()).backward()
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
        return [out.detach(), lse.detach(), *grads]

    options = {"mask": mask, "scale": scale, "dropout": dropout, "seed": seed}

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = api.attention(q, k, v, bias=bias, return_lse=True, backend=backend, **options)  # type: ignore[arg-type]
        assert isinstance(found, tuple)
        return found

    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    seed_tensor = None if seed is None else torch.tensor([seed])

    def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.attention(q, k, v, as_mask(mask), bias, factor, dropout, seed_tensor)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _plain_attention(q, k, v, as_mask(mask), bias, factor, dropout, seed_tensor)

    names = ["out", "lse", "dq", "dk", "dv", "dbias"]
    right = results(exact, torch.float64)
    triples = zip(names, results(ours, q.dtype), results(plain, q.dtype), right, strict=False)
    lse = _size(right[1])
    return [
        Errors(name, _distance(a, c), _distance(b, c), _size(c), a.dtype, lse) for name, a, b, c in triples
    ]


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Textbook attention with every intermediate in q's dtype: what the budget is measured from."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    keep = mask.to_dense(batch=q.shape[0], q_length=q.shape[2], k_length=k.shape[2], device=q.device)
    empty = torch.zeros((), dtype=torch.bool)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
        empty = ~keep.any(-1)
    probs = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty, float("-inf"))
    if dropout > 0:
        assert seed is not None
        kept = dropout_keep(seed, dropout, (*q.shape[:3], k.shape[2]))
        probs = probs * kept * (65536 / (65536 - drop_threshold(dropout)))
    return probs @ v, lse


def _distance(found: Tensor, exact: Tensor) -> float:
    """Largest |found - exact|; infinities must agree, NaN is infinitely far."""
    found = found.double()
    apart = torch.where(found == exact, 0.0, (found - exact).abs()).nan_to_num(nan=math.inf)
    return float(apart.max()) if apart.numel() else 0.0


def _size(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
