"""Attention of float8 tensors, forward only. Speaks to people."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.attention import api
from fastattn.ops.attention.biases import Bias, as_bias
from fastattn.ops.attention.checks import check_inputs, check_options
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.attention.problem import resolve


def attention_float8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of q · q_scale, k · k_scale and v · v_scale, which are stored in float8_e4m3fn.

    On a GPU that has such products (sm_89 and newer) q kᵀ is taken in float8; the probabilities and v are
    multiplied in float16. Elsewhere the values are widened: on a GPU tile by tile, on a CPU beforehand.

    Args:
        q: float8_e4m3fn ``[B, H, L_q, D]``.
        k: float8_e4m3fn ``[B, H_kv, L_k, D]``.
        v: float8_e4m3fn ``[B, H_kv, L_k, D_v]``.
        q_scale: factor on q, floating, broadcastable to ``[B, H]``: 0 dimensions for one of the whole tensor,
            ``[H]`` for one of each head; 1 if None.
        k_scale, v_scale: the same on k and v, broadcastable to ``[B, H_kv]``.
        mask, bias, scale, softcap, sinks, q_start, k_start, return_lse, backend: as in `attention`.

    Returns:
        ``out`` bfloat16 ``[B, H, L_q, D_v]``; with `return_lse` also ``lse`` float32 ``[B, H, L_q]``.

    Raises:
        TypeError: q, k or v is not float8_e4m3fn, or a scale is not floating.
        ValueError: shapes that do not fit.
        NotImplementedError: something requires a gradient, which float8 has none of; or `backend` can't.

    Example:
        >>> import torch, fastattn
        >>> x = torch.randn(1, 2, 5, 16)
        >>> scale = x.abs().amax((2, 3)) / 448  # what float8_e4m3fn holds
        >>> x8 = (x / scale[..., None, None]).to(torch.float8_e4m3fn)
        >>> fastattn.attention_float8(x8, x8, x8, q_scale=scale, k_scale=scale, v_scale=scale).dtype
        torch.bfloat16
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype != torch.float8_e4m3fn:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a tensor of float8_e4m3fn, got {got}")
    # Of shapes alone from here on, as `attention` checks them.
    like = [torch.empty((), dtype=torch.bfloat16, device=x.device).expand(x.shape) for x in (q, k, v)]
    mask_, bias_ = as_mask(mask), as_bias(bias)
    check_inputs(*like)
    check_options(like[0], like[1], mask_, bias_, softcap, sinks, 0.0, q_start, k_start)
    scales = [
        _per_head(name, given, x)
        for name, given, x in (("q_scale", q_scale, q), ("k_scale", k_scale, k), ("v_scale", v_scale, v))
    ]
    parameters = (part.parameter for part in bias_.compact)
    sources = (q, k, v, q_scale, k_scale, v_scale, sinks, bias_.dense, *parameters)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in sources):
        raise NotImplementedError(
            "fastattn.attention_float8 has no gradient: expected a call under torch.no_grad(), or nothing "
            "that requires one; fastattn.attention has every gradient"
        )
    chosen = choice.choose(like[0], backend)
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if chosen == "triton":
        problem = resolve(
            *(like[0], like[1], mask_, bias_, sinks, None, q_start, k_start),
            *(factor, float(softcap or 0.0), 0.0),
        )
        out, lse = torch.ops.fastattn.attention_float8(q, k, v, *scales, *problem, chosen)
    else:
        wide = [
            x.to(torch.float32) if by is None else x.to(torch.float32) * by[..., None, None]
            for x, by in zip((q, k, v), scales, strict=True)
        ]
        with choice.no_autocast(q.device):
            found = api.attention(
                *wide,
                mask=mask_,
                bias=bias_,
                scale=factor,
                softcap=softcap,
                sinks=sinks,
                q_start=q_start,
                k_start=k_start,
                return_lse=True,
                backend=chosen,
            )
        assert isinstance(found, tuple)
        out, lse = found[0].to(torch.bfloat16), found[1]
    return (out, lse) if return_lse else out


def _per_head(name: str, scale: Tensor | None, x: Tensor) -> Tensor | None:
    """float32 ``[B, H]`` of x's heads, contiguous."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {got}")
    shape = x.shape[:2]
    sizes = zip(reversed(scale.shape), reversed(shape), strict=False)
    if scale.dim() > 2 or scale.device != x.device or any(n not in (1, full) for n, full in sizes):
        raise ValueError(
            f"{name}: expected a tensor on {x.device} that broadcasts to {list(shape)} (batch, heads), "
            f"got {list(scale.shape)} on {scale.device}"
        )
    return scale.to(torch.float32).expand(shape).contiguous()
