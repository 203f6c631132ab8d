"""`flash_attn.layers.rotary` on `fastattn.rotary`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.ops.rotary import rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotary position embedding of the first rotary_dim dimensions.

    Args:
        x: ``(batch_size, seqlen, nheads, headdim)``, or ``(total_seqlen, nheads, headdim)`` with
            `cu_seqlens`.
        cos: ``(seqlen_rotary, rotary_dim / 2)``, of the positions from 0.
        sin: as cos.
        interleaved: the pairs are dimensions (0, 1), (2, 3), … (GPT-J) and not the two halves (GPT-NeoX).
        inplace: write the result into x, and return x.
        seqlen_offsets: position of the first token of each sequence: an int, or int ``(batch_size,)``.
        cu_seqlens: int32 ``(batch_size + 1,)``, where packed sequences begin and end.
        max_seqlen: taken and not needed.

    Returns:
        x rotated, in its shape and dtype; differentiable in x, cos and sin.

    Raises:
        ValueError: shapes that do not fit; positions that cos has no row for.

    Source: flash-attn 2.8; Su et al., "RoFormer", 2021 (arXiv 2104.09864).

    Example:
        >>> import torch
        >>> angle = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        >>> apply_rotary_emb(torch.randn(2, 5, 3, 8), angle.cos(), angle.sin(), seqlen_offsets=3).shape
        torch.Size([2, 5, 3, 8])
    """
    if cu_seqlens is None:
        turned = rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved, start=seqlen_offsets)
        turned = turned.transpose(1, 2)
    else:
        turned = rotary(x, cos, sin, interleaved=interleaved, start=seqlen_offsets, cu_seqlens=cu_seqlens)
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last dimension as (-b, a); which are pairs is as in `apply_rotary_emb`."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """flash-attn's reference for `apply_rotary_emb`, whose cos and sin may be ``(batch_size, seqlen, …)``."""
    width = 2 * cos.shape[-1]
    if width > x.shape[-1]:
        raise ValueError(f"cos: expected at most {x.shape[-1] // 2} columns, got {cos.shape[-1]}")
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else t.repeat(*(1,) * (t.dim() - 1), 2)).unsqueeze(-2)
        for t in (cos, sin)
    )
    turned = x[..., :width]
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, x[..., width:]), dim=-1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`flash_attn.ops.triton.rotary.apply_rotary`: `apply_rotary_emb`, or with `conjugate` its inverse."""
    return apply_rotary_emb(
        x, cos, -sin if conjugate else sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of a packed qkv, in place.

    Args:
        qkv: ``(batch_size, seqlen, 3, nheads, headdim)``, or
            ``(batch_size, seqlen, num_heads_q + 2 · num_heads_k, headdim)``.
        cos: as in `apply_rotary_emb`.
        sin: as cos.
        cos_k: for k, where it is another (xPos).
        sin_k: as cos_k.
        interleaved: as in `apply_rotary_emb`.
        seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: heads of q, for the second layout.

    Returns:
        `qkv` itself.

    Raises:
        ValueError: another shape, or no `num_heads_q` where it is needed.

    Source: flash-attn 2.8.
    """
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.dim() == 4 and num_heads_q is not None and qkv.shape[2] > num_heads_q:
        heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd:
            raise ValueError(f"qkv: expected num_heads_q + 2 · num_heads_k heads, got {qkv.shape[2]}")
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    else:
        raise ValueError(
            "qkv: expected (batch_size, seqlen, 3, nheads, headdim), or with num_heads_q "
            f"(batch_size, seqlen, num_heads_q + 2 · num_heads_k, headdim), "
            f"got {list(qkv.shape)} and num_heads_q={num_heads_q}"
        )
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates k of a packed kv ``(batch_size, seqlen, 2, nheads, headdim)``, in place; returns `kv`."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv: expected (batch_size, seqlen, 2, nheads, headdim), got {list(kv.shape)}")
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with its tables, which grow as they are needed.

    Args:
        dim: dimensions rotated.
        base: of the geometric series of wavelengths.
        interleaved: as in `apply_rotary_emb`.
        scale_base: xPos, which damps the scores with the distance, if not None; 512 is usual.
        device: of the buffers.

    Source: flash-attn 2.8; Su et al., "RoFormer", 2021 (arXiv 2104.09864); Sun et al., "A
    length-extrapolatable transformer", 2022 (arXiv 2212.10554).

    Example:
        >>> import torch
        >>> RotaryEmbedding(8)(torch.randn(2, 5, 3, 4, 16)).shape
        torch.Size([2, 5, 3, 4, 16])
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponent

    # The names that subclasses in other packages override and read.
    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # The model may have been cast: a frequency in half precision is off by whole turns far from 0.
        frequency = self.inv_freq
        if frequency.dtype != torch.float32:
            frequency = self._compute_inv_freq(device)
        angle = position[:, None] * frequency
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = angle.cos().to(dtype), angle.sin().to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(position) ** power[:, None]
        self._cos_cached, self._sin_cached = (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)
        self._cos_k_cached = (angle.cos() / scale).to(dtype)
        self._sin_k_cached = (angle.sin() / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q and k in place.

        Args:
            qkv: as in `apply_rotary_emb_qkv_`; with `kv`, q ``(batch_size, seqlen, nheads, headdim)``.
            kv: ``(batch_size, seqlen, 2, nheads_k, headdim)``, or None.
            seqlen_offset: position of the first token of each sequence: an int, or int ``(batch_size,)``.
            max_seqlen: positions to have tables for; needed where `seqlen_offset` is a tensor.
            num_heads_q: as in `apply_rotary_emb_qkv_`.

        Returns:
            `qkv`, or with `kv` both.

        Raises:
            ValueError: `seqlen_offset` is a tensor, and there are neither tables nor a `max_seqlen`.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen: expected an int where seqlen_offset is a tensor, got None")
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
