"""Philox-4x32-10 in PyTorch: which attention probabilities dropout zeroes.

The same function of (seed, batch, head, query position, key position) as `csrc/common/philox.h`, where
the layout of the counter is written down. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_M0: Final = 0xD2511F53
_M1: Final = 0xCD9E8D57
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85
_U32: Final = 0xFFFFFFFF


def _mul_hi_lo(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    product = x * constant  # wraps modulo 2^64, as the unsigned product would
    return (product >> 32) & _U32, product & _U32


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four int64 tensors that broadcast together, each value below 2^32.
        seed: int64 ``[1]``, the 64-bit key.

    Returns:
        Four int64 tensors of words below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return c0, c1, c2, c3


def drop_threshold(dropout: float) -> int:
    """`dropout` in 65,536ths, rounded: a key is dropped where its 16 random bits are below it."""
    return min(round(dropout * 65536), 65535)


def dropout_keep(
    seed: Tensor, dropout: float, shape: tuple[int, int, int, int], q_start: int = 0, k_start: int = 0
) -> Tensor:
    """Which probabilities survive dropout.

    Args:
        seed: int64 ``[1]``.
        dropout: probability in [0, 1), taken in 65,536ths.
        shape: (B, H, L_q, L_k).
        q_start: position of the first query.
        k_start: position of the first key.

    Returns:
        bool ``[B, H, L_q, L_k]``, True = kept.
    """
    batch, heads, q_length, k_length = shape
    device = seed.device
    first, offset = k_start // 128, k_start % 128
    groups = (offset + k_length + 127) // 128
    # Counter word 0 of the 16 lanes of each group of 128 keys.
    c0 = torch.arange(16 * groups, device=device) + 16 * first
    c1 = torch.arange(q_length, device=device)[:, None] + q_start
    c2 = torch.arange(heads, device=device)[:, None, None]
    c3 = torch.arange(batch, device=device)[:, None, None, None]
    words = torch.stack(torch.broadcast_tensors(*philox((c0, c1, c2, c3), seed)), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)  # [B, H, L_q, 16 g, 8]
    # lane l, half-word t of group g belongs to key 128 g + 16 t + l
    bits = halves.unflatten(-2, (groups, 16)).transpose(-1, -2).flatten(-3)
    keep: Tensor = bits[..., offset : offset + k_length] >= drop_threshold(dropout)
    return keep
