"""Attention masks as data: what may attend to what, in a form every backend can skip blocks by.

A mask is made of constraints, joined by ``&`` and ``|``; a bool tensor may stand for any of them:

>>> import torch, fastattn
>>> mask = fastattn.causal() & fastattn.key_padding(torch.tensor([3, 5]))
>>> mask.to_dense(batch=2, q_length=5, k_length=5).shape
torch.Size([2, 1, 5, 5])
>>> streaming = fastattn.sliding_window(2, 0) | fastattn.causal() & fastattn.prefix(1)
>>> streaming.to_dense(batch=1, q_length=5, k_length=5)[0, 0, 4].int()
tensor([1, 0, 1, 1, 1], dtype=torch.int32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn.ops.attention.constraints import (
    FAR,
    Band,
    Blocks,
    Chunk,
    Constraint,
    Dense,
    Documents,
    Lengths,
    Positions,
    Prefix,
    whole_number,
)

Align = Literal["bottom_right", "top_left"]
Clause = tuple[Constraint, ...]


@dataclass(frozen=True, eq=False)
class Mask:
    """What a query may attend to: a key that every constraint of one of the clauses keeps.

    Build one with `causal`, `sliding_window`, `prefix`, `chunked`, `documents`, `key_padding`,
    `block_sparse` or a bool tensor, and ``&`` and ``|``. ``Mask()`` masks nothing.

    Attributes:
        clauses: a disjunction of conjunctions of `Constraint`.
    """

    clauses: tuple[Clause, ...] = ((),)

    def __and__(self, other: Mask | Tensor) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        other = as_mask(other)
        return Mask(tuple(_join(a, b) for a in self.clauses for b in other.clauses))

    def __or__(self, other: Mask | Tensor) -> Mask:
        """What either keeps.

        With a `block_sparse` or a bool tensor in one of the two, `attention` makes one bool tensor
        ``[B or 1, H or 1, L_q, L_k]`` of them; only two `block_sparse` of which one's block size is a
        multiple of the other's stay blocks.
        """
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        clauses = _alternatives(self.clauses, as_mask(other).clauses)
        return Mask() if any(len(clause) == 0 for clause in clauses) else Mask(clauses)

    __rand__ = __and__
    __ror__ = __or__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """``mask & tensor`` under `torch.compile`, which takes an operator with a tensor to be torch's."""
        if func in (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and):
            return as_mask(args[0]) & as_mask(args[1])
        if func in (Tensor.__or__, Tensor.__ror__, Tensor.bitwise_or):
            return as_mask(args[0]) | as_mask(args[1])
        return NotImplemented

    @property
    def documents(self) -> Documents | None:
        """The documents that positions count from.

        Raises:
            ValueError: the clauses of the mask do not have the same.
        """
        found = [next((c for c in clause if isinstance(c, Documents)), None) for clause in self.clauses]
        if any(one is not found[0] for one in found):
            raise ValueError(
                "documents: expected the same documents(...) in every part of a mask joined by |, "
                "where a compact bias counts positions from their start"
            )
        return found[0]

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`."""
        return self.map(lambda x: x.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Mask:
        """The same mask with every tensor in it replaced by what `change` makes of it."""
        # What several clauses share, they share still.
        changed = {id(c): c.map(change) for clause in self.clauses for c in clause}
        return Mask(tuple(tuple(changed[id(c)] for c in clause) for clause in self.clauses))

    def to_dense(
        self,
        *,
        batch: int,
        q_length: int,
        k_length: int,
        q_start: int | Tensor | None = None,
        k_start: int | None = None,
        device: torch.device | str | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | None:
        """The same mask as one bool tensor.

        Args:
            batch: B; checked against nothing, a mask that is the same for all keeps a batch size of 1.
            q_length: L_q.
            k_length: L_k.
            q_start: position of the first query, as in `fastattn.attention`.
            k_start: position of the first key, as in `fastattn.attention`.
            device: where to make it; the device of the mask's tensors if None.
            rows: int64 ``[R]``, the queries to make it for, instead of all L_q.

        Returns:
            bool, broadcastable to ``[B, H, L_q, L_k]``, True = may attend; None where nothing is masked.
        """
        if device is None:
            device = next((x.device for clause in self.clauses for c in clause for x in c.tensors()), "cpu")
        keep: Tensor | None = None
        for clause in self.clauses:
            if not clause:
                return None
            packed = documents_of(clause)
            positions = Positions(q_length, k_length, q_start, k_start, device, packed, rows)
            all_of = clause[0].to_dense(positions)
            for constraint in clause[1:]:
                all_of = all_of & constraint.to_dense(positions)
            keep = all_of if keep is None else keep | all_of
        return keep


def documents_of(clause: Clause) -> Documents | None:
    """The documents that a clause's positions count from."""
    return next((c for c in clause if isinstance(c, Documents)), None)


def _join(a: Clause, b: Clause) -> Clause:
    """Both clauses; those of their constraints that are one when joined, joined."""
    joined = list(a)
    for constraint in b:
        for i, mine in enumerate(joined):
            both = mine.join(constraint)
            if both is not None:
                joined[i] = both
                break
        else:
            joined.append(constraint)
    return tuple(joined)


def _alternatives(a: tuple[Clause, ...], b: tuple[Clause, ...]) -> tuple[Clause, ...]:
    """The clauses of both; blocks that are clauses of their own and can be joined are."""
    found = list(a)
    for clause in b:
        for i, mine in enumerate(found):
            if len(mine) == len(clause) == 1:
                one, other = mine[0], clause[0]
                both = one.either(other) if isinstance(one, Blocks) and isinstance(other, Blocks) else None
                if both is not None:
                    found[i] = (both,)
                    break
        else:
            found.append(clause)
    return tuple(found)


def causal(align: Align = "bottom_right") -> Mask:
    """A query attends to the keys at and before its own position.

    Args:
        align: which corner the diagonal ends in when L_q ≠ L_k. ``"bottom_right"`` (flash-attn): the last
            query sees the last key, query i sees keys ``j <= i + L_k - L_q``. ``"top_left"``
            (`torch.nn.functional.scaled_dot_product_attention`): the first query sees the first key,
            ``j <= i``. With L_q = L_k they are the same. Not used where positions are given
            (`fastattn.attention(q_start=)`).

    Returns:
        A mask, to be passed as `fastattn.attention(..., mask=)` or joined with others by ``&`` and ``|``.

    Raises:
        ValueError: for another `align`.

    Example:
        >>> causal().to_dense(batch=1, q_length=2, k_length=3)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
        >>> causal("top_left").to_dense(batch=1, q_length=2, k_length=3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    return Mask(((Band(None, 0, _is_bottom_right("causal", align)),),))


def sliding_window(left: int | None, right: int | None, align: Align = "bottom_right") -> Mask:
    """A query attends to the keys from `left` positions before its own to `right` behind it, both included.

    The work is proportional to the window: ``sliding_window(255, 0)`` is causal attention to 256 keys, its
    own among them.

    Args:
        left: how many positions back; None for all.
        right: how many positions ahead; None for all.
        align: as in `causal`.

    Returns:
        A mask.

    Raises:
        TypeError: not an int or None.
        ValueError: a negative number, or another `align`.

    Source: Beltagy et al., "Longformer", 2020 (arXiv 2004.05150).

    Example:
        >>> sliding_window(1, 0).to_dense(batch=1, q_length=3, k_length=3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    hint = ", or None for all"
    if left is not None:
        left = whole_number("sliding_window(left=)", left, 0, hint)
    if right is not None:
        right = whole_number("sliding_window(right=)", right, 0, hint)
    return Mask(((Band(left, right, _is_bottom_right("sliding_window", align)),),))


def prefix(n: int | Tensor) -> Mask:
    """Every query attends to the first `n` keys.

    With causal attention to the rest this is the prefix language model: ``causal() | prefix(n)``.

    Args:
        n: how many; an int, or an integer tensor ``[B]`` for a number of each sequence's own.

    Returns:
        A mask.

    Raises:
        ValueError: a negative int, or a tensor that is not one-dimensional.
        TypeError: not an int or an integer tensor.

    Source: Raffel et al., "T5", 2020 (arXiv 1910.10683), §3.2.1.

    Example:
        >>> (causal() | prefix(2)).to_dense(batch=1, q_length=3, k_length=3)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    if isinstance(n, Tensor):
        return Mask(((Prefix(_integers("prefix(n)", n).clamp(0, FAR)),),))
    return Mask(((Prefix(whole_number("prefix(n)", n, 0, ", or an integer tensor [B]")),),))


def chunked(size: int, align: Align = "bottom_right") -> Mask:
    """A query attends to the keys in its own chunk of `size` positions.

    Chunks are counted from the first key. Joined with `causal` this is the local attention of Llama 4.

    Args:
        size: positions a chunk.
        align: as in `causal`: which key a query's own position is.

    Returns:
        A mask.

    Raises:
        TypeError: `size` is not an int.
        ValueError: `size` below 1, or another `align`.

    Example:
        >>> (causal() & chunked(2)).to_dense(batch=1, q_length=4, k_length=4)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    size = whole_number("chunked(size)", size, 1)
    return Mask(((Chunk(size, _is_bottom_right("chunked", align)),),))


def documents(
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
) -> Mask:
    """Documents packed behind one another in one sequence: a query attends to the keys of its own.

    Positions count from each document's start: `causal`, `sliding_window`, `chunked`, `prefix` and the
    compact biases joined with it act inside every document as they would on the document alone, with their
    `align` between its own queries and keys. Queries behind the last document attend to nothing.

    Args:
        cu_seqlens: integer tensor ``[N + 1]``: document n has the queries from ``cu_seqlens[n]`` to before
            ``cu_seqlens[n + 1]``, the first is 0. The same for all sequences of the batch.
        cu_seqlens_k: the same for the keys, with as many documents; `cu_seqlens` if None.
        position_ids: instead of these, an integer tensor ``[B, L]`` or ``[1, L]`` for L queries and L keys:
            a new document begins wherever it does not go on counting by one.

    Returns:
        A mask.

    Raises:
        TypeError: not integer tensors.
        ValueError: shapes that do not fit, or not just one of `cu_seqlens` and `position_ids` given.

    Example:
        >>> documents(torch.tensor([0, 1, 3])).to_dense(batch=1, q_length=3, k_length=3)[0, 0].int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    if (cu_seqlens is None) == (position_ids is None):
        raise ValueError("documents: expected cu_seqlens or position_ids, and not both")
    if position_ids is not None:
        if cu_seqlens_k is not None:
            raise ValueError(
                "documents(position_ids=): expected no cu_seqlens_k, queries and keys are the same"
            )
        return Mask(((Documents(None, None, _integers("documents(position_ids=)", position_ids, 2)),),))
    assert cu_seqlens is not None
    cu_q = _integers("documents(cu_seqlens)", cu_seqlens)
    cu_k = cu_q if cu_seqlens_k is None else _integers("documents(cu_seqlens_k)", cu_seqlens_k)
    if cu_k.shape != cu_q.shape or cu_q.shape[0] < 1:
        raise ValueError(
            "documents: expected cu_seqlens and cu_seqlens_k of one shape [N + 1], "
            f"got {list(cu_q.shape)} and {list(cu_k.shape)}"
        )
    return Mask(((Documents(cu_q, cu_k, None),),))


def key_padding(lengths: Tensor) -> Mask:
    """Each sequence of the batch has its own number of keys; those behind it are padding.

    Args:
        lengths: integer tensor ``[B]``, 0 <= lengths <= L_k. On CPU, outside of `torch.compile` and `vmap`,
            `attention` raises for others; elsewhere, where reading them would stop the queue or break the
            graph, every backend takes the nearest that fits.

    Returns:
        A mask.

    Raises:
        TypeError: `lengths` is not an integer tensor.
        ValueError: `lengths` is not one-dimensional.

    Example:
        >>> key_padding(torch.tensor([1, 3])).to_dense(batch=2, q_length=1, k_length=3)[:, 0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    hint = "; a [B, L_k] bool tensor is a mask of its own: pass keep[:, None, None, :]"
    return Mask(((Lengths(_integers("key_padding(lengths)", lengths, hint=hint)),),))


def block_sparse(blocks: Tensor, block_size: int | tuple[int, int]) -> Mask:
    """Blocks of queries attend to blocks of keys, or not; what is not is not computed.

    Args:
        blocks: bool ``[N_q, N_k]`` or ``[B, H, N_q, N_k]`` (B and H may be 1), True = may attend, with
            ``N_q = ceil(L_q / block_size)`` and ``N_k = ceil(L_k / block_size)``.
        block_size: queries and keys a block; two ints where they are not the same. Multiples of 32 keys and
            of 96 queries are skipped without waste on every CPU.

    Returns:
        A mask. Joined by ``&`` it stays blocks, which take no memory for the matrix. Joined by ``|``, with
        anything but another whose block size is a multiple or a divisor of its own, or by ``&`` with one of
        which that is not true, it makes one bool tensor ``[B or 1, H or 1, L_q, L_k]``.

    Raises:
        TypeError: `blocks` is not a bool tensor, or `block_size` not an int or two.
        ValueError: `blocks` has neither 2 nor 4 dimensions, or a block size is below 1.

    Source: Dao et al., "FlashAttention", NeurIPS 2022 (arXiv 2205.14135), §3.3.

    Example:
        >>> blocks = torch.tensor([[True, False], [True, True]])
        >>> block_sparse(blocks, 2).to_dense(batch=1, q_length=4, k_length=3)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1],
                [1, 1, 1]], dtype=torch.int32)
    """
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2:
        raise TypeError(f"block_sparse(block_size): expected an int or two, got {block_size}")
    q_size, k_size = (whole_number("block_sparse(block_size)", n, 1, ", or two") for n in pair)
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
        got = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
        raise TypeError(f"block_sparse(blocks): expected a bool tensor, got {got}")
    if blocks.dim() not in (2, 4):
        raise ValueError(
            f"block_sparse(blocks): expected [N_q, N_k] or [B, H, N_q, N_k], got {list(blocks.shape)}"
        )
    return Mask(((Blocks(blocks[(None,) * (4 - blocks.dim())], q_size, k_size),),))


def as_mask(mask: Any) -> Mask:
    """A `Mask` of what `fastattn.attention(mask=)` takes: a mask, a bool tensor or None.

    Raises:
        TypeError: not a mask, a bool tensor or None.
    """
    if mask is None:
        return Mask()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected a bool tensor (True = may attend), got {mask.dtype}; "
                "an additive float mask is passed as bias="
            )
        return Mask(((Dense(mask),),))
    hint = (
        "; masks are made by a call: mask=fastattn.causal()"
        if callable(mask) or isinstance(mask, str)
        else ""
    )
    raise TypeError(f"mask: expected a fastattn mask, a bool tensor or None, got {type(mask).__name__}{hint}")


def _is_bottom_right(name: str, align: str) -> bool:
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f"{name}(align=): expected one of ['bottom_right', 'top_left'], got {align!r}")
    return align == "bottom_right"


def _integers(name: str, x: Tensor, dim: int = 1, hint: str = "") -> Tensor:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    if x.dim() != dim:
        shape = "one dimension" if dim == 1 else f"{dim} dimensions"
        raise ValueError(f"{name}: expected {shape}, got {list(x.shape)}{hint}")
    return x.to(torch.int64)
