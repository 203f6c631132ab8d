"""Rotary position embedding of queries and keys, with its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ops.rotary import rotary


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by their positions, by cosines and sines that are computed once.

    The constructor is that of flash-attn's `RotaryEmbedding`; queries and keys are in this package's layout.
    It has no parameters, and nothing in the state dict. Its tables stay float32 when the model is cast.

    Args:
        dim: dimensions of a head that are turned, even; the rest of a head passes through.
        base: pair i turns by ``position * base ** (-2 i / dim)``, in radians.
        interleaved: the pairs are the dimensions (0, 1), (2, 3), … (GPT-J); else (0, dim/2), … (Llama).
        scale_base: makes it xPos (Sun et al., arXiv 2212.10554): with ``z = (2 i + 0.4 dim) / (1.4 dim)``
            queries of position p are scaled by ``z ** (p / scale_base)`` and keys by the inverse; None: not
            scaled. In float16 keys overflow from positions of about ``9 * scale_base`` on.
        device: of the tables.
        max_length: how many positions there are. An int `start` may go beyond them outside of
            `torch.compile`: the tables then grow.

    Source: Su et al., "RoFormer", 2021 (arXiv 2104.09864).

    Example:
        >>> import torch, fastattn
        >>> rotary = fastattn.nn.RotaryEmbedding(64)
        >>> q, k = torch.randn(1, 8, 10, 64), torch.randn(1, 2, 10, 64)
        >>> q, k = rotary(q, k, start=5)
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: expected an even number from 2 on, got {dim}")
        if max_length < 1:
            raise ValueError(f"max_length: expected 1 or more, got {max_length}")
        if base <= 0 or (scale_base is not None and scale_base <= 0):
            raise ValueError(f"base, scale_base: expected numbers above 0, got {base} and {scale_base}")
        self.dim, self.base, self.interleaved, self.scale_base = dim, base, interleaved, scale_base
        self._make_tables(max_length, torch.get_default_device() if device is None else torch.device(device))

    @property
    def max_length(self) -> int:
        """How many positions the tables have."""
        return self.q_cos.shape[0]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        start: int | Tensor = 0,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same positions, turned.

        Args:
            q: ``[B, H, L, D]``, or packed ``[T, H, D]`` with `positions` or `cu_seqlens`.
            k: ``[B, H_kv, L, D]``, or ``[T, H_kv, D]``.
            start, positions, cu_seqlens: as in `fastattn.rotary`.

        Returns:
            q and k, in their shapes and dtypes.

        Raises: as `fastattn.rotary` does.
        """
        length = q.shape[2] if q.dim() == 4 else q.shape[0]
        counted = start + length if isinstance(start, int) and positions is None else 0
        if not torch.compiler.is_compiling() and counted > self.max_length:
            self._make_tables(max(counted, 2 * self.max_length), self.q_cos.device)
        options: dict[str, Any] = {
            "interleaved": self.interleaved,
            "start": start,
            "positions": positions,
            "cu_seqlens": cu_seqlens,
        }
        q = rotary(q, self.q_cos, self.q_sin, **options)
        return q, rotary(k, self.k_cos, self.k_sin, **options)

    def extra_repr(self) -> str:
        """What it was made with."""
        scaled = "" if self.scale_base is None else f", scale_base={self.scale_base}"
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}{scaled}"

    @torch.inference_mode(False)  # tables that grow in inference are of use in training afterwards
    def _make_tables(self, length: int, device: torch.device) -> None:
        # In float64: a large position times a frequency keeps its digits.
        pair = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device)
        position = torch.arange(length, dtype=torch.float64, device=device)[:, None]
        angle = position * self.base ** (-pair / self.dim)
        scale = torch.ones_like(angle)
        if self.scale_base is not None:
            scale = ((pair + 0.4 * self.dim) / (1.4 * self.dim)) ** (position / self.scale_base)
        tables = (angle.cos() * scale, angle.sin() * scale, angle.cos() / scale, angle.sin() / scale)
        for name, table in zip(("q_cos", "q_sin", "k_cos", "k_sin"), tables, strict=True):
            self.register_buffer(name, table.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Moved or cast: the tables are made again where they are, in float32."""
        super()._apply(fn, recurse)
        self._make_tables(self.max_length, self.q_cos.device)
        return self
