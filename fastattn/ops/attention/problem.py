"""From masks and biases to what kernels are given: intervals of keys, blocks, and vectors over distance.

A `Problem` holds the trailing arguments of the ops in `library.py`. Everything here is PyTorch on tensors of
at most ``B · (L_q + L_k)`` elements, is traced by the compiler like any of the model's own code, and gives
gradients to what compact biases are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.biases import Bias
from fastattn.ops.attention.constraints import Band, Blocks, Constraint, Dense, Documents, Lengths, Positions
from fastattn.ops.attention.masks import Clause, Mask, documents_of


class Problem(NamedTuple):
    """What attention is computed over. A key is seen where all of band, ranges, blocks and mask keep it.

    Attributes:
        mask: bool, broadcastable to ``[B, H, L_q, L_k]``, True = may attend.
        blocks: bool ``[B or 1, H or 1, N_q, N_k]``, of `block_q` queries and `block_k` keys each.
        ranges: int32 ``[B or 1, K, L_q or 1, 2]``: a query sees the keys from first to before second of any
            of its K pairs.
        bias: added to the scores, broadcastable to ``[B, H, L_q, L_k]``.
        relative: float32 ``[B or 1, H or 1, R]``, added to the scores by distance: for query i and key j its
            entry ``j - i + L_q`` of R = L_q + L_k, or with `origin` ``j - origin[i] + L_q + L_k`` of
            R = 2 (L_q + L_k) + 1.
        origin: int32 ``[B or 1, L_q]``, the key at distance 0 of each query.
        sinks: float32 ``[1, H]``.
        seed: int64 ``[1]``.
        left, right: how many keys before and behind its own a query sees; -1 for all.
        bottom_right: its own is key ``i + L_k - L_q``; if not, ``i + q_start - k_start``.
        q_start, k_start: positions of the first query and key, which dropout goes by.
        block_q, block_k: queries and keys a block.
        scale: factor on q kᵀ.
        softcap: 0 for none.
        dropout: probability.
    """

    mask: Tensor | None
    blocks: Tensor | None
    ranges: Tensor | None
    bias: Tensor | None
    relative: Tensor | None
    origin: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    left: int
    right: int
    bottom_right: bool
    q_start: int
    k_start: int
    block_q: int
    block_k: int
    scale: float
    softcap: float
    dropout: float


def resolve(
    q: Tensor,
    k: Tensor,
    mask: Mask,
    bias: Bias,
    sinks: Tensor | None,
    seed: Tensor | None,
    q_start: int | Tensor | None,
    k_start: int | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Problem:
    """The problem of arguments that have been checked."""
    q_length, k_length = q.shape[2], k.shape[2]
    if isinstance(q_start, Tensor):
        q_start = q_start.to(torch.int64)
    where = (q_length, k_length, q_start, k_start, q.device)
    common, alternatives = _factor(mask)
    # A band is two numbers where one line through the matrix is everybody's diagonal.
    explicit = q_start is not None or k_start is not None
    band = Band(None, None, True)
    if documents_of(common) is None and not isinstance(q_start, Tensor):
        bands = [c for c in common if isinstance(c, Band)]
        if explicit:
            bands = [replace(c, bottom_right=False) for c in bands]
        if bands and all(c.bottom_right == bands[0].bottom_right for c in bands):
            band = bands[0]
            for other in bands[1:]:
                band = band.join(other)  # type: ignore[assignment]
            common = tuple(c for c in common if not isinstance(c, Band))

    dense, blocks = _not_intervals(common, where)
    if any(isinstance(c, (Blocks, Dense)) for clause in alternatives for c in clause):
        shared = documents_of(common)
        whole = alternatives if shared is None else tuple((shared, *clause) for clause in alternatives)
        either = Mask(whole).to_dense(
            batch=q.shape[0],
            q_length=q_length,
            k_length=k_length,
            q_start=q_start,
            k_start=k_start,
            device=q.device,
        )
        assert either is not None
        dense = either if dense is None else dense & either
        alternatives = ()
    ranges = _ranges(common, alternatives, where)
    relative, origin = _by_distance(bias, mask, where)
    return Problem(
        mask=dense,
        blocks=None if blocks is None else blocks.blocks,
        ranges=ranges,
        bias=bias.dense,
        relative=relative,
        origin=origin,
        sinks=None if sinks is None else sinks.to(torch.float32)[None],
        seed=seed,
        left=-1 if band.left is None else band.left,
        right=-1 if band.right is None else band.right,
        bottom_right=not explicit and band.bottom_right,
        q_start=0 if q_start is None or isinstance(q_start, Tensor) else q_start,
        k_start=0 if k_start is None else k_start,
        block_q=1 if blocks is None else blocks.q_size,
        block_k=1 if blocks is None else blocks.k_size,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
    )


Where = tuple[int, int, "int | Tensor | None", "int | None", torch.device]


def _factor(mask: Mask) -> tuple[Clause, tuple[Clause, ...]]:
    """The constraints that all clauses share, and what else one of them has to fulfil."""
    first = mask.clauses[0]
    if len(mask.clauses) == 1:
        return first, ()
    # In clauses of different documents the same constraint counts from different positions.
    alike = all(documents_of(clause) is documents_of(first) for clause in mask.clauses)
    common = tuple(
        c
        for c in first
        if (alike or isinstance(c, (Lengths, Blocks, Dense)))
        and all(any(c is d for d in clause) for clause in mask.clauses)
    )
    rest = tuple(tuple(c for c in clause if not any(c is d for d in common)) for clause in mask.clauses)
    return common, () if any(len(clause) == 0 for clause in rest) else rest


def _not_intervals(clause: Clause, where: Where) -> tuple[Tensor | None, Blocks | None]:
    """The clause's dense mask and its blocks; further blocks, of other sizes, are in the dense mask."""
    dense: Tensor | None = None
    blocks: Blocks | None = None
    for constraint in clause:
        if isinstance(constraint, Blocks) and blocks is None:
            blocks = constraint
        elif isinstance(constraint, (Blocks, Dense)):
            found = constraint.to_dense(Positions(*where))
            dense = found if dense is None else dense & found
    return dense, blocks


def _ranges(common: Clause, alternatives: tuple[Clause, ...], where: Where) -> Tensor | None:
    if not common and not alternatives:
        return None
    pairs = []
    for clause in alternatives or ((),):
        whole = (*common, *clause)
        intervals: list[Constraint] = [c for c in whole if not isinstance(c, (Blocks, Dense))]
        if not intervals:
            return None
        positions = Positions(*where, documents_of(whole))
        first, end = None, None
        for constraint in intervals:
            found = constraint.interval(positions)
            assert found is not None
            first = _meet(torch.maximum, first, found[0])
            end = _meet(torch.minimum, end, found[1])
        k_length, device = where[1], where[4]
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
        first = nothing if first is None else first.clamp(0, k_length)
        end = nothing + k_length if end is None else end.clamp(0, k_length)
        if first.shape != end.shape:  # broadcast_tensors, which costs more than all else here
            first, end = first + torch.zeros_like(end), end + torch.zeros_like(first)
        pairs.append(torch.stack((first, end), dim=-1))
    if len(pairs) == 1:
        return pairs[0][:, None].to(torch.int32)
    shape = torch.broadcast_shapes(*(pair.shape for pair in pairs))
    return torch.stack([pair.expand(shape) for pair in pairs], dim=1).to(torch.int32)


def _meet(tighter: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return tighter(a, b)


def _by_distance(bias: Bias, mask: Mask, where: Where) -> tuple[Tensor | None, Tensor | None]:
    """The sum of the compact biases as a vector over distance, and which key is at distance 0."""
    if not bias.compact:
        return None, None
    q_length, k_length, q_start, k_start, device = where
    documents: Documents | None = mask.documents
    bottom_right = bias.compact[0].bottom_right
    origin = None
    corner: int | Tensor
    if documents is not None:
        # Only bounds that are not documents', where they could not be checked, are moved by the clamp.
        origin = Positions(*where, documents).diagonal(bottom_right)
        origin = origin.clamp(-q_length, q_length + k_length).to(torch.int32)
        distance = torch.arange(-q_length - k_length, q_length + k_length + 1, device=device)[None]
    else:
        if q_start is not None or k_start is not None:
            start = q_start[:, None] if isinstance(q_start, Tensor) else q_start or 0
            corner = start - (k_start or 0)
        else:
            corner = k_length - q_length if bottom_right else 0
        distance = torch.arange(-q_length, k_length, device=device)[None] - corner
    # Parts of one batch have their gradients summed over it by themselves, in an order of their own.
    batch = max(part.batch for part in bias.compact)
    if batch > 1 and distance.shape[0] == 1:
        distance = distance.expand(batch, -1)
    total: Tensor | None = None
    for part in bias.compact:
        found = part.at_each(distance)
        total = found if total is None else total + found
    assert total is not None
    return total.to(torch.float32), origin
