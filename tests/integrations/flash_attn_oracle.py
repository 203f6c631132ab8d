"""What flash-attn documents, in plain float64 PyTorch: nothing of fastattn is in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible(q_length: int, k_length: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """bool ``(q_length, k_length)``: the documented inequalities, bottom right corners aligned."""
    i = torch.arange(q_length)[:, None] + k_length - q_length
    j = torch.arange(k_length)
    left, right = window
    keep = torch.ones(q_length, k_length, dtype=torch.bool)
    if left >= 0:
        keep &= j >= i - left
    if right >= 0:
        keep &= j <= i + right
    if causal:
        keep &= j <= i
    return keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    dropped: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out ``(B, S, H, D)``, lse ``(B, H, S)`` and probabilities ``(B, H, S, S_k)``, all in float64.

    `dropped` ``(B, H, S, S_k)`` says what dropout zeroes. A row without keys is 0, its lse -inf.
    """
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    q_length, k_length = q.shape[1], k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        i, j = torch.arange(q_length)[:, None], torch.arange(k_length)
        slopes = alibi_slopes.double().expand(q.shape[0], -1)[:, :, None, None]
        scores = scores - slopes * (i + k_length - q_length - j).abs()
    keep = visible(q_length, k_length, causal, window_size)
    empty = ~keep.any(-1)[:, None]
    scores = scores.masked_fill(~keep & ~empty, -math.inf)
    probabilities = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty[:, 0], -math.inf)
    weights = probabilities
    if dropped is not None:
        weights = probabilities.masked_fill(dropped, 0.0) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse, probabilities


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x ``(B, S, H, D)`` turned by the angles at ``positions`` (B, S), as complex numbers."""
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        real, imaginary = turned[..., ::2], turned[..., 1::2]
    else:
        real, imaginary = turned[..., :half], turned[..., half:]
    angle = torch.complex(cos, sin)[positions][:, :, None]
    found = torch.complex(real, imaginary) * angle
    if interleaved:
        turned = torch.view_as_real(found).flatten(-2)
    else:
        turned = torch.cat((found.real, found.imag), -1)
    return torch.cat((turned, rest), -1)


def assert_close(found: Tensor, exact: Tensor, name: str = "") -> None:
    """Within a rounding of found's dtype of what is exact; -inf where that is."""
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
    band = tolerance[found.dtype]
    torch.testing.assert_close(
        found.double(), exact.double(), atol=band, rtol=band, msg=lambda text: f"{name}: {text}"
    )
