"""Additive biases as data: a dense tensor, and compact ones that depend on the distance of key and query.

>>> import torch, fastattn
>>> bias = fastattn.alibi(torch.tensor([0.5, 0.25])) + torch.zeros(1, 1, 3, 3)
>>> bias.to_dense(q_length=3, k_length=3)[0, 0]
tensor([[ 0.0000, -0.5000, -1.0000],
        [-0.5000,  0.0000, -0.5000],
        [-1.0000, -0.5000,  0.0000]])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops.attention.constraints import Documents, Positions, whole_number
from fastattn.ops.attention.masks import Align, _is_bottom_right


@dataclass(frozen=True, eq=False)
class ByDistance:
    """A bias that depends on head and distance alone."""

    bottom_right: bool

    def at_each(self, distance: Tensor) -> Tensor:
        """The bias at key position - query position of each sequence, int64 ``[B or 1, ...]``.

        Returns:
            float32 or wider, ``[B or 1, H, ...]``.
        """
        raise NotImplementedError

    @property
    def parameter(self) -> Tensor:
        """What it is made from, and gives a gradient to."""
        raise NotImplementedError

    def of(self, parameter: Tensor) -> ByDistance:
        """The same made from another."""
        changed: dict[str, Any] = {
            f.name: parameter for f in fields(self) if getattr(self, f.name) is self.parameter
        }
        return replace(self, **changed)

    @property
    def name(self) -> str:
        """How users write it."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        return 1

    @property
    def heads(self) -> int:
        return self.parameter.shape[1]


# Distances whose gradients are summed at once.
_ROW: Final = 256


@dataclass(frozen=True, eq=False)
class Alibi(ByDistance):
    """-slope · |distance|; slopes ``[B or 1, H]``."""

    slopes: Tensor

    def at_each(self, distance: Tensor) -> Tensor:
        # A slope's gradient is a sum over all distances, and torch splits a long one between its threads.
        # The slopes are expanded in steps, so that backward sums short rows, then these, then sequences:
        # the same sums for any number of threads.
        shape, far = distance.shape, distance.abs().flatten(1)
        length = far.shape[1]
        rows = (length + _ROW - 1) // _ROW
        far = torch.nn.functional.pad(far, (0, rows * _ROW - length))
        far = far.unflatten(1, (rows, _ROW))[:, None]  # [B or 1, 1, rows, _ROW]
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        if shape[0] != 1:
            slopes = slopes.expand(shape[0], -1)
        slopes = slopes[..., None].expand(-1, -1, rows)
        slopes = slopes[..., None].expand(-1, -1, -1, _ROW)
        found: Tensor = (-slopes * far).flatten(2)[..., :length].reshape(*slopes.shape[:2], *shape[1:])
        return found

    @property
    def parameter(self) -> Tensor:
        return self.slopes

    @property
    def name(self) -> str:
        return "alibi(slopes)"

    @property
    def batch(self) -> int:
        return self.slopes.shape[0]


@dataclass(frozen=True, eq=False)
class RelativePosition(ByDistance):
    """The row of ``table`` [buckets, H] that the distance falls into."""

    table: Tensor
    bidirectional: bool
    max_distance: int

    def at_each(self, distance: Tensor) -> Tensor:
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return torch.nn.functional.embedding(self.bucket(distance), table).movedim(-1, 1)

    def bucket(self, distance: Tensor) -> Tensor:
        """Half of the buckets of a direction are one distance wide, the others logarithmically wider."""
        buckets = self.table.shape[0]
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)

    @property
    def parameter(self) -> Tensor:
        return self.table

    @property
    def name(self) -> str:
        return "relative_position(table)"


@dataclass(frozen=True, eq=False)
class Bias:
    """A sum of biases; build one with `alibi`, `relative_position`, a float tensor, and ``+``.

    Attributes:
        dense: broadcastable to ``[B, H, L_q, L_k]``, or None.
        compact: those that depend on the distance alone.
    """

    dense: Tensor | None = None
    compact: tuple[ByDistance, ...] = ()

    def __add__(self, other: Bias | Tensor) -> Bias:
        if not isinstance(other, (Bias, Tensor)):
            return NotImplemented
        other = as_bias(other)
        dense = self.dense
        if other.dense is not None:
            dense = other.dense if dense is None else dense + other.dense
        return Bias(dense, (*self.compact, *other.compact))

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """``bias + tensor``, which torch takes to be its own."""
        if func in (Tensor.__add__, Tensor.__radd__, Tensor.add):
            return as_bias(args[0]) + as_bias(args[1])
        return NotImplemented

    def to_dense(
        self,
        *,
        q_length: int,
        k_length: int,
        q_start: int | Tensor | None = None,
        k_start: int | None = None,
        documents: Documents | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | None:
        """The same bias as one tensor.

        Args:
            q_length: L_q.
            k_length: L_k.
            q_start: position of the first query, as in `fastattn.attention`.
            k_start: position of the first key, as in `fastattn.attention`.
            documents: where positions count from the start of each of these.
            rows: int64 ``[R]``, the queries to make it for, instead of all L_q; those `dense` then has.

        Returns:
            Broadcastable to ``[B, H, L_q, L_k]``, differentiable; None where there is no bias.
        """
        total = self.dense
        for part in self.compact:
            device = part.parameter.device
            positions = Positions(q_length, k_length, q_start, k_start, device, documents, rows)
            key = torch.arange(k_length, device=device)
            distance = key - positions.diagonal(part.bottom_right)[..., None]  # [B or 1, L_q, L_k]
            found = part.at_each(distance)
            total = found if total is None else total + found
        return total


def alibi(slopes: Tensor, align: Align = "bottom_right") -> Bias:
    """Attention with linear biases: each head takes its slope times the distance off the scores.

    Args:
        slopes: float32, bfloat16, float16 or float64, ``[H]`` or ``[B, H]``. Gets a gradient.
        align: as in `fastattn.causal`: where a query stands among the keys when L_q ≠ L_k.

    Returns:
        ``-slope · |key position - query position|``, to be passed as `fastattn.attention(..., bias=)` or
        added to others with ``+``. In memory it takes ``H · (L_q + L_k)`` floats, B times as many where
        slopes or `q_start` have a batch, and twice as many with `documents`.

    Raises:
        TypeError: `slopes` is not a floating tensor.
        ValueError: `slopes` has neither one nor two dimensions, or another `align`.

    Source: Press et al., "Train short, test long", ICLR 2022 (arXiv 2108.12409).

    Example:
        >>> alibi(torch.tensor([1.0])).to_dense(q_length=1, k_length=3)
        tensor([[[[-2., -1., -0.]]]])
    """
    _check_float("alibi(slopes)", slopes)
    if slopes.dim() not in (1, 2):
        raise ValueError(f"alibi(slopes): expected [H] or [B, H], got {list(slopes.shape)}")
    slopes = slopes[None] if slopes.dim() == 1 else slopes
    return Bias(compact=(Alibi(_is_bottom_right("alibi", align), slopes),))


def relative_position(
    table: Tensor,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    align: Align = "bottom_right",
) -> Bias:
    """T5's relative position bias: a learned number for each head and bucket of distances.

    Args:
        table: float32, bfloat16, float16 or float64, ``[buckets, H]``: the weight of T5's
            `relative_attention_bias`. Gets a gradient.
        bidirectional: half of the buckets are for keys behind the query (an encoder); if not, those are taken
            to be at distance 0 (a decoder).
        max_distance: positions; all from here on share a bucket.
        align: as in `fastattn.causal`: where a query stands among the keys when L_q ≠ L_k.

    Returns:
        A bias, to be passed as `fastattn.attention(..., bias=)` or added to others with ``+``. In memory it
        takes ``H · (L_q + L_k)`` floats, B times as many where `q_start` or another bias of the sum has a
        batch, and twice as many with `documents`.

    Raises:
        TypeError: `table` is not a floating tensor.
        ValueError: `table` does not have two dimensions, too few buckets for `max_distance`, or another
            `align`.

    Source: Raffel et al., "T5", 2020 (arXiv 1910.10683), §2.1.

    Example:
        >>> table = torch.arange(4.0)[:, None]
        >>> relative_position(table, max_distance=4).to_dense(q_length=2, k_length=3, q_start=0)[0, 0]
        tensor([[0., 3., 3.],
                [1., 0., 3.]])
    """
    _check_float("relative_position(table)", table)
    if table.dim() != 2:
        raise ValueError(f"relative_position(table): expected [buckets, H], got {list(table.shape)}")
    least = 4 if bidirectional else 2
    if table.shape[0] < least:
        raise ValueError(
            f"relative_position(table): expected at least {least} buckets, got {list(table.shape)}"
        )
    exact = table.shape[0] // least
    max_distance = whole_number("relative_position(max_distance=)", max_distance, 1)
    if max_distance <= exact:
        raise ValueError(
            f"relative_position(max_distance=): expected more than {exact}, below which each of the "
            f"{table.shape[0]} buckets is of one distance, got {max_distance}"
        )
    found = RelativePosition(_is_bottom_right("relative_position", align), table, bidirectional, max_distance)
    return Bias(compact=(found,))


def as_bias(bias: Any) -> Bias:
    """A `Bias` of what `fastattn.attention(bias=)` takes: a bias, a float tensor or None.

    Raises:
        TypeError: not a bias, a float tensor or None.
    """
    if isinstance(bias, Bias):
        return bias
    if bias is not None:
        _check_float("bias", bias, " (a bool tensor is passed as mask=)")
    return Bias(bias)


def _check_float(name: str, x: Any, hint: str = "") -> None:
    if not isinstance(x, Tensor) or x.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {got}{hint}")
