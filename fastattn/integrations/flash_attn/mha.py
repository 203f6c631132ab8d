"""The modules of `flash_attn.modules.mha` that are attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi: a geometric series, interleaved from two where `nheads` is not a power of 2.

    Source: Press et al., "Train short, test long", ICLR 2022 (arXiv 2108.12409).

    Example:
        >>> get_alibi_slopes(3)
        [0.0625, 0.00390625, 0.25]
    """
    power = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power == nheads:
        return slopes
    return slopes + get_alibi_slopes(2 * power)[::2][: nheads - power]


class _Attention(nn.Module):
    """What the two modules share."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Sequence[int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            # The module may have been cast.
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.to(torch.float32),
            "window_size": self.window_size,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """Attention of a packed qkv, with dropout in training alone.

    Args:
        causal: a token sees those before it and itself.
        softmax_scale: factor on q kᵀ; ``1 / sqrt(headdim)`` if None.
        attention_dropout: probability with which a probability is zeroed in training.
        window_size: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`; a buffer, not saved.
        deterministic: taken and not needed.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> FlashSelfAttention(causal=True)(torch.randn(2, 5, 3, 4, 8)).shape
        torch.Size([2, 5, 4, 8])
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Sequence[int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of each sequence to itself.

        Args:
            qkv: ``(batch_size, seqlen, 3, nheads, headdim)``, or with `cu_seqlens` ``(total, 3, nheads,
                headdim)``.
            causal: in place of the module's, if not None.
            cu_seqlens: int32 ``(batch_size + 1,)``.
            max_seqlen: places of the longest sequence.

        Returns:
            ``(batch_size, seqlen, nheads, headdim)`` or ``(total, nheads, headdim)``.

        Raises:
            ValueError: `cu_seqlens` without `max_seqlen`.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            out = flash_attn_qkvpacked_func(qkv, **options)
        else:
            if max_seqlen is None:
                raise ValueError("max_seqlen: expected an int with cu_seqlens, got None")
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        assert isinstance(out, Tensor)
        return out


class FlashCrossAttention(_Attention):
    """Attention of q to a packed kv, with dropout in training alone.

    Args: as `FlashSelfAttention`, in flash-attn's order.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> FlashCrossAttention()(torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 2, 8)).shape
        torch.Size([2, 5, 4, 8])
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Sequence[int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attention of q to kv.

        Args:
            q: ``(batch_size, seqlen, nheads, headdim)``, or with `cu_seqlens` ``(total_q, nheads, headdim)``.
            kv: ``(batch_size, seqlen_k, 2, nheads_k, headdim)``, or ``(total_k, 2, nheads_k, headdim)``.
            causal: in place of the module's, if not None.
            cu_seqlens: int32 ``(batch_size + 1,)``, of q.
            max_seqlen: queries of the longest sequence.
            cu_seqlens_k: int32 ``(batch_size + 1,)``, of kv.
            max_seqlen_k: keys of the longest sequence.

        Returns:
            q's shape.

        Raises:
            ValueError: `cu_seqlens` without the other three.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            out = flash_attn_kvpacked_func(q, kv, **options)
        else:
            if max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
                raise ValueError(
                    "cu_seqlens: expected max_seqlen, cu_seqlens_k and max_seqlen_k with it, got "
                    f"{max_seqlen}, {cu_seqlens_k} and {max_seqlen_k}"
                )
            bounds = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
            out = flash_attn_varlen_kvpacked_func(q, kv, *bounds, **options)
        assert isinstance(out, Tensor)
        return out
