"""The constraints masks are made of, and the positions they are measured in.

Most leave a query one interval of keys. What is an interval is all that the kernels need to know of it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Positions are below this, as the first is below 2^31: a window of more is one of all, and nothing overflows.
FAR = 2**32
# First key kept and the first behind it, int64 [B or 1, L_q or 1] each; None where there is no bound.
Interval = tuple[Tensor | None, Tensor | None]


def whole_number(name: str, n: Any, least: int, hint: str = "") -> int:
    """`n`, or `FAR` where that is less.

    Raises:
        TypeError: not an int.
        ValueError: below `least`.
    """
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        if isinstance(n, bool) or not isinstance(n, numbers.Integral):
            raise TypeError(
                f"{name}: expected an int{hint}, got {n if isinstance(n, float) else type(n).__name__}"
            )
        n = int(n)
    if n < least:
        raise ValueError(f"{name}: expected {least} or more{hint}, got {n}")
    return FAR if type(n) is int and n > FAR else n


class Positions:
    """Where the queries of one problem stand among its keys.

    Args:
        q_length: L_q.
        k_length: L_k.
        q_start: position of the first query, an int or an integer tensor ``[B]``; None for alignment by
            corner.
        k_start: position of the first key.
        device: of the tensors made.
        documents: where these are packed, positions count from the start of each.
        rows: indices of the queries that are asked for, int64 ``[R]``; all L_q if None. Below, L_q is their
            number.
    """

    def __init__(
        self,
        q_length: int,
        k_length: int,
        q_start: int | Tensor | None,
        k_start: int | None,
        device: torch.device | str,
        documents: Documents | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.q_length, self.k_length, self.device, self.rows = q_length, k_length, device, rows
        self.explicit = q_start is not None or k_start is not None
        self.k_start = 0 if k_start is None else k_start
        self.q_start: int | Tensor = 0 if q_start is None else q_start
        if isinstance(self.q_start, Tensor):
            self.q_start = self.q_start.to(torch.int64)
        if documents is not None and self.explicit:
            raise ValueError(
                "q_start, k_start: expected None with documents(...), whose positions count from each "
                "document's start"
            )
        self.packing: tuple[Tensor, ...] | None = None
        if documents is not None:
            self.packing = documents.packing(q_length, k_length, device)
            if rows is not None:
                self.packing = tuple(x.index_select(1, rows) for x in self.packing)

    def queries(self) -> Tensor:
        """Index of each query: int64 ``[1, L_q]``."""
        rows = torch.arange(self.q_length, device=self.device) if self.rows is None else self.rows
        return rows[None]

    def diagonal(self, bottom_right: bool) -> Tensor:
        """Index of the key that stands where a query does, there or not: int64 ``[B or 1, L_q]``."""
        if self.packing is not None:
            q_first, q_end, k_first, k_end = self.packing
            corner = (k_end - k_first) - (q_end - q_first) if bottom_right else 0
            return self.queries() - q_first + k_first + corner
        if self.explicit:
            start = self.q_start[:, None] if isinstance(self.q_start, Tensor) else self.q_start
            return self.queries() + start - self.k_start
        return self.queries() + (self.k_length - self.q_length if bottom_right else 0)

    def first(self) -> Tensor:
        """Index of the key at position 0, there or not: int64 ``[B or 1, L_q or 1]``."""
        if self.packing is not None:
            return self.packing[2]
        return torch.full((1, 1), -self.k_start, dtype=torch.int64, device=self.device)


@dataclass(frozen=True, eq=False)
class Constraint:
    """One condition on query and key. Those of one kind that can be one are joined by `join`."""

    def tensors(self) -> list[Tensor]:
        return [x for x in (getattr(self, f.name) for f in fields(self)) if isinstance(x, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Constraint:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(x) for name, x in own.items() if isinstance(x, Tensor)}
        return replace(self, **changed) if changed else self

    def join(self, other: Constraint) -> Constraint | None:
        return None

    def interval(self, positions: Positions) -> Interval | None:
        """The keys left to each query; None where these are not an interval."""
        raise NotImplementedError

    def to_dense(self, positions: Positions) -> Tensor:
        """bool, broadcastable to ``[B, H, L_q, L_k]``, True = may attend."""
        found = self.interval(positions)
        assert found is not None
        key = torch.arange(positions.k_length, device=positions.device)
        keep = torch.ones((1, 1, 1, positions.k_length), dtype=torch.bool, device=positions.device)
        if found[0] is not None:
            keep = keep & (key >= found[0][:, None, :, None])
        if found[1] is not None:
            keep = keep & (key < found[1][:, None, :, None])
        return keep


@dataclass(frozen=True, eq=False)
class Band(Constraint):
    """Key position between query position - left and query position + right."""

    left: int | None
    right: int | None
    bottom_right: bool

    def join(self, other: Constraint) -> Constraint | None:
        if not isinstance(other, Band) or other.bottom_right != self.bottom_right:
            return None
        return Band(_less(self.left, other.left), _less(self.right, other.right), self.bottom_right)

    def interval(self, positions: Positions) -> Interval | None:
        diagonal = positions.diagonal(self.bottom_right)
        return (
            None if self.left is None else diagonal - self.left,
            None if self.right is None else diagonal + self.right + 1,
        )


def _less(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


@dataclass(frozen=True, eq=False)
class Chunk(Constraint):
    """Key position in the same `size` positions as the query's."""

    size: int
    bottom_right: bool

    def interval(self, positions: Positions) -> Interval | None:
        first = positions.first()
        position = positions.diagonal(self.bottom_right) - first
        start = first + torch.div(position, self.size, rounding_mode="floor") * self.size
        return start, start + self.size


@dataclass(frozen=True, eq=False)
class Prefix(Constraint):
    """Key position below `count`, an int or int64 ``[B]``."""

    count: int | Tensor

    def interval(self, positions: Positions) -> Interval | None:
        count = self.count[:, None] if isinstance(self.count, Tensor) else self.count
        return None, positions.first() + count


@dataclass(frozen=True, eq=False)
class Lengths(Constraint):
    """Key index below `lengths`, int64 ``[B]``."""

    lengths: Tensor

    def join(self, other: Constraint) -> Constraint | None:
        if not isinstance(other, Lengths):
            return None
        if other.lengths.shape != self.lengths.shape:
            raise ValueError(
                "key_padding(lengths) & key_padding(lengths): expected the same batch, "
                f"got {list(self.lengths.shape)} and {list(other.lengths.shape)}"
            )
        return Lengths(torch.minimum(self.lengths, other.lengths))

    def interval(self, positions: Positions) -> Interval | None:
        return None, self.lengths[:, None]


@dataclass(frozen=True, eq=False)
class Documents(Constraint):
    """Key of the query's own document: by int64 ``[N + 1]`` bounds, or by int64 ``[B or 1, L]`` positions."""

    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    position_ids: Tensor | None

    def join(self, other: Constraint) -> Constraint | None:
        if isinstance(other, Documents) and other is not self:
            raise ValueError("documents(...) & documents(...): expected one, positions count from its start")
        return self if other is self else None

    def interval(self, positions: Positions) -> Interval | None:
        assert positions.packing is not None
        return positions.packing[2], positions.packing[3]

    def packing(
        self, q_length: int, k_length: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First query, end of queries, first key and end of keys of each query's document: int64
        ``[B or 1, L_q]``. A query of no document has an empty one."""
        if self.position_ids is not None:
            ids = self.position_ids
            if ids.shape[1] != q_length or ids.shape[1] != k_length:
                raise ValueError(
                    f"documents(position_ids=): expected [B, L] with L = L_q = L_k, got {list(ids.shape)} "
                    f"with L_q = {q_length} and L_k = {k_length}"
                )
            index = torch.arange(q_length, device=ids.device).expand(ids.shape)
            begins = torch.ones_like(ids, dtype=torch.bool)
            begins[:, 1:] = ids[:, 1:] != ids[:, :-1] + 1
            first = torch.where(begins, index, 0).cummax(1).values
            ends = torch.ones_like(begins)
            ends[:, :-1] = begins[:, 1:]
            last = torch.where(ends, index + 1, q_length).flip(1).cummin(1).values.flip(1)
            return first, last, first, last
        assert self.cu_seqlens is not None and self.cu_seqlens_k is not None
        cu_q, cu_k = self.cu_seqlens, self.cu_seqlens_k
        # Mapped by vmap where the bounds are: searchsorted warns of what it has to lay out itself.
        index = torch.arange(q_length, device=device) + torch.zeros_like(cu_q[:1])
        document = torch.searchsorted(
            cu_q[1:].clone(memory_format=torch.contiguous_format), index, right=True
        )
        following = (document + 1).clamp(max=cu_q.shape[0] - 1)
        found = (cu_q[document], cu_q[following], cu_k[document], cu_k[following])
        return tuple(x[None] for x in found)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Blocks(Constraint):
    """Block of queries and keys that `blocks`, bool ``[B or 1, H or 1, N_q, N_k]``, keeps."""

    blocks: Tensor
    q_size: int
    k_size: int

    def join(self, other: Constraint) -> Constraint | None:
        return self._combine(other, torch.logical_and) if isinstance(other, Blocks) else None

    def either(self, other: Blocks) -> Blocks | None:
        """What one of the two keeps, where that is blocks again."""
        return self._combine(other, torch.logical_or)

    def _combine(self, other: Blocks, how: Callable[[Tensor, Tensor], Tensor]) -> Blocks | None:
        """Both on the finer of their grids; None where neither block size is a multiple of the other."""
        sizes = []
        for mine, theirs in ((self.q_size, other.q_size), (self.k_size, other.k_size)):
            if mine % theirs != 0 and theirs % mine != 0:
                return None
            sizes.append(min(mine, theirs))
        rows = max(self.blocks.shape[2], other.blocks.shape[2])
        columns = max(self.blocks.shape[3], other.blocks.shape[3])
        parts = []
        for x in (self, other):
            grid = (-(-rows * sizes[0] // x.q_size), -(-columns * sizes[1] // x.k_size))
            if x.blocks.shape[2:] != grid or not _broadcast(self.blocks.shape[:2], other.blocks.shape[:2]):
                raise ValueError(
                    "block_sparse(blocks) joined with another: expected blocks of the same lengths, batch "
                    f"and heads, got {list(self.blocks.shape)} of size {(self.q_size, self.k_size)} and "
                    f"{list(other.blocks.shape)} of size {(other.q_size, other.k_size)}"
                )
            parts.append(x._on_grid(rows, columns, sizes[0], sizes[1]))
        return Blocks(how(parts[0], parts[1]), sizes[0], sizes[1])

    def _on_grid(self, rows: int, columns: int, q_size: int, k_size: int) -> Tensor:
        """bool ``[B or 1, H or 1, rows, columns]``, for blocks of sizes that divide its own."""
        keep = self.blocks
        for dim, length, ratio in ((2, rows, self.q_size // q_size), (3, columns, self.k_size // k_size)):
            if ratio > 1:
                keep = keep.index_select(dim, torch.arange(length, device=keep.device) // ratio)
        return keep

    def interval(self, positions: Positions) -> Interval | None:
        return None

    def to_dense(self, positions: Positions) -> Tensor:
        if positions.rows is None:
            return self._on_grid(positions.q_length, positions.k_length, 1, 1)
        some = replace(self, blocks=self.blocks.index_select(2, positions.rows // self.q_size), q_size=1)
        return some._on_grid(positions.rows.shape[0], positions.k_length, 1, 1)


@dataclass(frozen=True, eq=False)
class Dense(Constraint):
    """A bool tensor broadcastable to ``[B, H, L_q, L_k]``, True = may attend."""

    keep: Tensor

    def join(self, other: Constraint) -> Constraint | None:
        if not isinstance(other, Dense):
            return None
        if not _broadcast(self.keep.shape, other.keep.shape):
            raise ValueError(
                "mask & mask: expected bool tensors that broadcast, "
                f"got {list(self.keep.shape)} and {list(other.keep.shape)}"
            )
        return Dense(self.keep & other.keep)

    def interval(self, positions: Positions) -> Interval | None:
        return None

    def to_dense(self, positions: Positions) -> Tensor:
        keep = self.keep[(None,) * (4 - self.keep.dim())]
        return keep if positions.rows is None or keep.shape[2] == 1 else keep.index_select(2, positions.rows)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(a), reversed(b), strict=False))
