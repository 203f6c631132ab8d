"""`fastattn.embedding`: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.embedding import library, reference


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``dropout(weight[ids] + position_weight[positions])`` in one pass over what it returns.

    Args:
        ids: integers ``[..., L]``.
        weight: ``[V, D]``; float32, bfloat16, float16, or float64 for the reference.
        position_weight: ``[P, D]`` of weight's dtype, or None.
        positions: integers that broadcast to ids' shape; 0 to L - 1 if None.
        padding_idx: the row of `weight` that gets no gradient; negative ones count from the end.
        dropout: probability in [0, 1), taken in 65,536ths; what is kept is scaled up.
        seed: of dropout, an int or an int64 tensor ``[1]``; drawn from torch's generator if None. The same
            seed drops the same elements on every backend: the numbers are those of (row, column), where rows
            count over all of ids' dimensions.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; the best that can if None.

    Returns:
        ``[..., L, D]`` in weight's dtype. Gradients of both tables are dense, and the same at every run:
        those of a row are added up in float32, in the order of ids.

    Raises:
        IndexError: an id or position outside of its table, where reading them is free (CPU, outside of
            `torch.compile`). Elsewhere it is a RuntimeError on CPU, and a row of NaN from the `triton`
            backend.
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
        NotImplementedError: the backend asked for can't run this.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), sections 3.4 and 3.5, with
        learned positions.

    Example:
        >>> import torch, fastattn
        >>> weight, position_weight = torch.eye(4), torch.ones(8, 4)
        >>> fastattn.embedding(torch.tensor([[2, 0]]), weight, position_weight)
        tensor([[[1., 1., 2., 1.],
                 [2., 1., 1., 1.]]])
    """
    _check(ids, weight, position_weight, positions)
    choice.check_dropout(dropout)
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise ValueError(
            f"padding_idx: expected an index into {weight.shape[0]} rows or None, got {padding_idx}"
        )
    skip = -1 if padding_idx is None else padding_idx % weight.shape[0]
    chosen = choice.choose(weight, backend)
    seed = choice.as_seed(seed, dropout, weight.device)
    flat, places = ids.to(torch.int64).reshape(-1), None
    _check_range("ids", flat, weight.shape[0])
    if position_weight is not None:
        places = _places(ids, positions)
        _check_range("positions", places, position_weight.shape[0])
    if chosen == "reference":
        out = reference.embedding(flat, weight, position_weight, places, seed, skip, dropout)
    else:
        out = library.Embedding.apply(flat, weight, position_weight, places, seed, skip, dropout, chosen)
    return out.reshape(*ids.shape, weight.shape[1])


def _places(ids: Tensor, positions: Tensor | None) -> Tensor:
    """int64 ``[M]`` positions that repeat over the rows."""
    if positions is None:
        return torch.arange(ids.shape[-1], device=ids.device)
    positions = positions.to(torch.int64)
    if positions.shape == ids.shape[ids.dim() - positions.dim() :]:
        return positions.reshape(-1)
    return positions.expand(ids.shape).reshape(-1)


def _check(ids: Tensor, weight: Tensor, position_weight: Tensor | None, positions: Tensor | None) -> None:
    choice.check_tensors(ids=ids, weight=weight, position_weight=position_weight, positions=positions)
    if ids is None or weight is None:
        raise TypeError(f"{'ids' if ids is None else 'weight'}: expected a tensor, got NoneType")
    for name, index in (("ids", ids), ("positions", positions)):
        if index is not None and (
            index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
        ):
            raise TypeError(f"{name}: expected integers, got {index.dtype}")
        if index is not None and index.device != weight.device:
            raise ValueError(f"{name}: expected weight's device {weight.device}, got {index.device}")
    if ids.dim() < 1:
        raise ValueError("ids: expected [..., L], got a scalar")
    for name, table in (("weight", weight), ("position_weight", position_weight)):
        if table is None:
            continue
        if not table.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {table.dtype}")
        if table.dim() != 2 or table.shape[1] != weight.shape[-1]:
            raise ValueError(f"{name}: expected [rows, {weight.shape[-1]}], got {list(table.shape)}")
        if table.dtype != weight.dtype or table.device != weight.device:
            raise ValueError(
                f"{name}: expected {weight.dtype} on {weight.device}, got {table.dtype} on {table.device}"
            )
    if positions is not None:
        if position_weight is None:
            raise ValueError("positions: expected with position_weight, got None for that")
        fits = positions.dim() <= ids.dim() and all(
            a in (1, b) for a, b in zip(reversed(positions.shape), reversed(ids.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"positions: expected what broadcasts to {list(ids.shape)}, got {list(positions.shape)}"
            )


def _check_range(name: str, index: Tensor, rows: int) -> None:
    """Raise where an index is outside of its table and reading it is free."""
    if (
        torch.compiler.is_compiling()
        or type(index) is not Tensor
        or index.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()  # mapped at any depth, it can't be read
        or not index.numel()
    ):
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(f"{name}: expected indices from 0 to {rows - 1}, got {low} to {high}")
