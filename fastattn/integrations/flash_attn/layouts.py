"""Where flash-attn keeps batch, heads and length, and where `fastattn.attention` does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Layout(ABC):
    """The way from flash-attn's tensors to ``[B, H, L, D]`` and back: views, or where there is none, copies.

    "Queries" are q, out and their gradients; "keys" are k, v and theirs.
    """

    @abstractmethod
    def queries(self, x: Tensor) -> Tensor:
        """flash-attn's layout as ``[B, H, L_q, D]``."""

    @abstractmethod
    def keys(self, x: Tensor) -> Tensor:
        """flash-attn's layout as ``[B, H_kv, L_k, D]``."""

    @abstractmethod
    def from_queries(self, x: Tensor) -> Tensor:
        """``[B, H, L_q, D]`` as flash-attn's layout."""

    @abstractmethod
    def from_keys(self, x: Tensor) -> Tensor:
        """``[B, H_kv, L_k, D]`` as flash-attn's layout."""

    @abstractmethod
    def lse(self, lse: Tensor) -> Tensor:
        """flash-attn's log-sum-exp as ``[B, H, L_q]``."""

    @abstractmethod
    def from_lse(self, lse: Tensor) -> Tensor:
        """``[B, H, L_q]`` as flash-attn's log-sum-exp."""

    @abstractmethod
    def key_positions(self, k: Tensor) -> Tensor:
        """Where each key of `k` ``[B, H_kv, L_k, D]`` stands in its sequence: int64 ``[B or 1, L_k]``."""

    @abstractmethod
    def key_count(self, k: Tensor) -> int:
        """Keys of the longest sequence."""

    @abstractmethod
    def by_sequence(self, x: Tensor) -> Tensor:
        """``[B, H, L_q, N]`` as ``[sequences, H, longest of queries, N]``, with 0 where there are none."""


class Dense(Layout):
    """``(batch, length, heads, head_dim)``; the log-sum-exp is ``(batch, heads, length)``."""

    def queries(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    keys = from_queries = from_keys = queries

    def lse(self, lse: Tensor) -> Tensor:
        return lse

    from_lse = lse

    def by_sequence(self, x: Tensor) -> Tensor:
        return x

    def key_positions(self, k: Tensor) -> Tensor:
        return torch.arange(k.shape[2], device=k.device)[None]

    def key_count(self, k: Tensor) -> int:
        return k.shape[2]


def require(fits: Tensor, message: str) -> None:
    """RuntimeError unless all of `fits`; what is read for it waits for the device."""
    if torch.compiler.is_compiling():
        torch._assert_async(fits.all(), message)
    elif not bool(fits.all()):
        raise RuntimeError(message)


class Sequences:
    """Where the sequences of a packed tensor ``(total, ...)`` are.

    Args:
        bounds: int ``[N + 1]``, flash-attn's cu_seqlens: sequence n has the places from ``bounds[n]`` to
            before ``bounds[n + 1]``.
        longest: places of the longest, flash-attn's max_seqlen.
        skipped: int ``[N]``, places at the start of each that are not used; None for none.
        used: int ``[N]``, places used, those skipped among them; None for all.

    Raises:
        TypeError: `bounds` is not an integer tensor.
        ValueError: `bounds` is not one-dimensional, or without a sequence.
    """

    def __init__(
        self,
        bounds: Tensor,
        longest: int | Tensor,
        skipped: Tensor | None = None,
        used: Tensor | None = None,
    ) -> None:
        if bounds.is_floating_point() or bounds.dtype == torch.bool:
            raise TypeError(f"cu_seqlens: expected int32, got {bounds.dtype}")
        if bounds.dim() != 1 or bounds.shape[0] < 2:
            raise ValueError(f"cu_seqlens: expected (batch_size + 1,), one or more, got {list(bounds.shape)}")
        self.bounds = bounds.long()
        self._longest = longest
        start, end = self.bounds[:-1], self.bounds[1:]
        self.first = start if skipped is None else start + skipped
        self.end = end if used is None else torch.maximum(torch.minimum(start + used, end), self.first)
        self.whole = skipped is None and used is None

    def __len__(self) -> int:
        return self.bounds.shape[0] - 1

    @property
    def longest(self) -> int:
        # Read where it is needed, which is seldom: from a tensor it waits for the device.
        return int(self._longest)

    def check_longest(self) -> None:
        """RuntimeError where `longest` is not the longest: what is behind it would be dropped in silence."""
        fits = self.end - self.first <= self.longest
        require(fits, f"max_seqlen: expected the length of the longest sequence, got {self.longest}")

    def places(self, total: int) -> tuple[Tensor, Tensor]:
        """Sequence of each of `total` places and position in it, int64 ``[total]``; -1 in none."""
        index = torch.arange(total, device=self.bounds.device)
        sequence = torch.searchsorted(self.bounds[1:], index, right=True)
        inside = sequence.clamp(max=len(self) - 1)
        position = index - self.first[inside]
        real = (sequence < len(self)) & (position >= 0) & (index < self.end[inside])
        return torch.where(real, inside, -1), torch.where(real, position, -1)

    def slots(self, total: int, flush_right: bool) -> Tensor:
        """Index of each of `total` places among ``N · longest`` padded; in none, the one behind these."""
        sequence, position = self.places(total)
        if flush_right:
            position = position + (self.longest - (self.end - self.first))[sequence]
        real = (sequence >= 0) & (position >= 0) & (position < self.longest)
        return torch.where(real, sequence * self.longest + position, len(self) * self.longest)

    def pad(self, x: Tensor, flush_right: bool) -> Tensor:
        """``(total, ...)`` as ``(N, longest, ...)``, with 0 before or behind the shorter ones.

        Raises:
            RuntimeError: `longest` is not the longest.
        """
        self.check_longest()
        empty = x.new_zeros((len(self) * self.longest + 1, *x.shape[1:]))
        rows: Tensor = empty.index_copy(0, self.slots(x.shape[0], flush_right), x)
        return rows[:-1].view(len(self), self.longest, *x.shape[1:])

    def unpad(self, x: Tensor, total: int, flush_right: bool, nothing: float = 0.0) -> Tensor:
        """``(N, longest, ...)`` as ``(total, ...)``, with `nothing` in places of no sequence."""
        rows = torch.cat((x.flatten(0, 1), x.new_full((1, *x.shape[2:]), nothing)))
        return rows.index_select(0, self.slots(total, flush_right))


class Packed(Layout):
    """``(total, heads, head_dim)`` as a batch of one; the log-sum-exp is ``(heads, total)``."""

    def __init__(self, q: Sequences, k: Sequences) -> None:
        self.q, self.k = q, k

    def queries(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    keys = queries

    def from_queries(self, x: Tensor) -> Tensor:
        return x[0].transpose(0, 1)

    from_keys = from_queries

    def lse(self, lse: Tensor) -> Tensor:
        return lse[None]

    def from_lse(self, lse: Tensor) -> Tensor:
        return lse[0]

    def key_positions(self, k: Tensor) -> Tensor:
        return self.k.places(k.shape[2])[1][None]

    def key_count(self, k: Tensor) -> int:
        self.k.check_longest()
        return self.k.longest

    def by_sequence(self, x: Tensor) -> Tensor:
        return self.q.pad(self.from_queries(x), flush_right=False).transpose(1, 2)


class Padded(Layout):
    """The packed layout where each sequence must be an entry of the batch: copied to ``[N, H, longest, D]``.

    The padding comes first, so that the last query and the last key of each are in the bottom right corner.

    Args:
        q: the sequences of the queries.
        k: the sequences of the keys.
        totals: places of the packed queries and keys.
    """

    def __init__(self, q: Sequences, k: Sequences, totals: tuple[int, int]) -> None:
        self.q, self.k, self.totals = q, k, totals

    def queries(self, x: Tensor) -> Tensor:
        return self.q.pad(x, flush_right=True).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return self.k.pad(x, flush_right=True).transpose(1, 2)

    def from_queries(self, x: Tensor) -> Tensor:
        return self.q.unpad(x.transpose(1, 2), self.totals[0], flush_right=True)

    def from_keys(self, x: Tensor) -> Tensor:
        return self.k.unpad(x.transpose(1, 2), self.totals[1], flush_right=True)

    def lse(self, lse: Tensor) -> Tensor:
        return self.queries(lse.transpose(0, 1)[..., None])[..., 0]

    def from_lse(self, lse: Tensor) -> Tensor:
        rows = self.q.unpad(lse.transpose(1, 2), self.totals[0], flush_right=True, nothing=-math.inf)
        return rows.transpose(0, 1)

    def key_positions(self, k: Tensor) -> Tensor:
        index = torch.arange(k.shape[2], device=k.device)
        return index - (k.shape[2] - (self.k.end - self.k.first))[:, None]

    def key_count(self, k: Tensor) -> int:
        return k.shape[2]

    def by_sequence(self, x: Tensor) -> Tensor:
        return self.q.pad(self.from_queries(x), flush_right=False).transpose(1, 2)
