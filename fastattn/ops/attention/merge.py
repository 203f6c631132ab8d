"""Partial attention results over disjoint sets of keys, put together exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """What attention over all keys together would have returned, from its results over parts of them.

    ``lse = log Σ_n exp(lse_n)`` and ``out = Σ_n exp(lse_n - lse) out_n``, in float32 or wider; differentiable
    to any order in outs and lses. The order of the parts is the order of the sum.

    Args:
        outs: N ≥ 1 results ``[..., L_q, D_v]`` over disjoint sets of keys, as a sequence or stacked
            ``[N, ..., L_q, D_v]``; float32, bfloat16, float16 or float64, one dtype and one shape.
        lses: the N log-sum-exps ``[..., L_q]`` that belong to them, natural logarithm, as `attention(...,
            return_lse=True)` returns them; -inf where a part has nothing for a row, whatever that row of
            `outs` then holds. With attention sinks, give the sinks to one part alone.

    Returns:
        ``out`` ``[..., L_q, D_v]`` in the dtype of `outs`, and ``lse`` ``[..., L_q]`` in float32 or wider. A
        row that is empty in all parts has out 0, lse -inf and gradients 0.

    Raises:
        ValueError: no parts, or parts whose number or shapes do not fit.
        TypeError: parts of several dtypes, or not floating.

    Source: Dao, "FlashAttention-2", ICLR 2024 (arXiv 2307.08691), section 2.3.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
        >>> parts = [
        ...     fastattn.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        ...     for keys in (slice(0, 2), slice(2, 6))
        ... ]
        >>> out, lse = merge_attention(*zip(*parts))
        >>> torch.allclose(out, fastattn.attention(q, k, v), atol=1e-6)
        True
    """
    outs, lses = tuple(outs), tuple(lses)
    _check(outs, lses)
    dtype = torch.promote_types(torch.promote_types(outs[0].dtype, lses[0].dtype), torch.float32)
    parts = torch.stack(lses).to(dtype)  # [N, ..., L_q]
    peak = parts.detach().amax(0)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(parts - peak)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)

    merged = torch.zeros_like(outs[0], dtype=dtype)
    for out, weight in zip(outs, (weights / total).unsqueeze(-1), strict=True):
        # Not 0 · out: a kernel may leave anything where it had no keys.
        merged = merged + weight * out.to(dtype).masked_fill(weight == 0, 0.0)
    lse = (peak + total.log()).masked_fill(empty, float("-inf"))
    return merged.to(outs[0].dtype), lse


def _check(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention: expected as many outs as lses, at least one, got {len(outs)} and {len(lses)}"
        )
    for name, xs in (("outs", outs), ("lses", lses)):
        for x in xs:
            if x.dtype != xs[0].dtype or not x.is_floating_point():
                raise TypeError(f"{name}: expected one floating dtype, got {[str(x.dtype) for x in xs]}")
            if x.shape != xs[0].shape:
                raise ValueError(f"{name}: expected one shape, got {[list(x.shape) for x in xs]}")
    if outs[0].shape[:-1] != lses[0].shape:
        raise ValueError(
            f"lses: expected outs' shape without its last dimension {list(outs[0].shape[:-1])}, "
            f"got {list(lses[0].shape)}"
        )
