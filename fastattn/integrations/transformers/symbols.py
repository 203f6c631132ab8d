"""What a mask function of transformers keeps, found by calling it once with symbols for its indices.

transformers describes a mask by a function ``(batch, head, query, key) -> bool`` and makes the ``[B, 1, L_q,
L_k]`` tensor of it. Given symbols instead of indices the same function tells what it compares, so that no
such tensor need be made. It works in eager mode and under ``torch.compile(fullgraph=True)``, where the
function's closure can't be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Band(NamedTuple):
    """Key from query - `left` to query + `right`, both looked up in `ids` where there are any."""

    left: int | None
    right: int | None
    ids: Tensor | None


class Same(NamedTuple):
    """The key's entry of `ids` ``[B, L]`` is the query's."""

    ids: Tensor


class Chunk(NamedTuple):
    """Key and query, both looked up in `ids` and less `origin` ``[B]``, are in the same `size` positions."""

    size: int
    origin: Tensor | None
    ids: Tensor | None


Atom = Band | Same | Chunk


class Condition:
    """What a mask function returns for symbols: all of `atoms`; None where it is not understood."""

    device = None  # asked for by `and_masks`, which takes this for a tensor

    def __init__(self, atoms: tuple[Atom, ...] | None) -> None:
        self.atoms = atoms

    def __and__(self, other: object) -> Condition:
        if not isinstance(other, Condition) or self.atoms is None or other.atoms is None:
            return Condition(None)
        return Condition((*self.atoms, *other.atoms))

    def __or__(self, other: object) -> Condition:
        return Condition(None)

    def to(self, device: object) -> Condition:
        return self


class Index:
    """A symbol: the index of a query or key, looked up in `ids`, less `origin`, plus `shift`, by `chunk`."""

    def __init__(
        self,
        side: str,
        shift: int = 0,
        ids: Tensor | None = None,
        origin: Tensor | None = None,
        chunk: int | None = None,
    ) -> None:
        self.side, self.shift, self.ids, self.origin, self.chunk = side, shift, ids, origin, chunk

    def new_ones(self, shape: object, dtype: object = None) -> Condition:
        return Condition(())

    def new_zeros(self, shape: object, dtype: object = None) -> Condition:
        return Condition(None)

    def __add__(self, other: object) -> Index:
        if isinstance(other, int) and self.chunk is None:
            return Index(self.side, self.shift + other, self.ids, self.origin)
        return Index("unknown")

    def __sub__(self, other: object) -> Index:
        if isinstance(other, int):
            return self + -other
        if isinstance(other, Index):
            if other.side == "batch" and other.ids is not None and self.origin is None and self.chunk is None:
                return Index(self.side, self.shift, self.ids, other.ids)
            if _comparable(self, other) and self.shift == other.shift and self.chunk is None:
                return Index("distance", ids=self.ids)
        return Index("unknown")

    def __abs__(self) -> Index:
        return Index("absolute", ids=self.ids) if self.side == "distance" else Index("unknown")

    def __floordiv__(self, size: object) -> Index:
        if isinstance(size, int) and self.chunk is None and self.shift == 0:
            return Index(self.side, 0, self.ids, self.origin, size)
        return Index("unknown")

    def __le__(self, other: object) -> Condition:
        if isinstance(other, int):
            within = self.side == "absolute" and other >= 0
            return Condition((Band(other, other, self.ids),) if within else None)
        return _at_most(self, other, 0)

    def __lt__(self, other: object) -> Condition:
        return self <= other - 1 if isinstance(other, int) else _at_most(self, other, -1)

    def __ge__(self, other: object) -> Condition:
        if isinstance(other, int):
            plain = self.ids is None and self.origin is None and self.chunk is None
            always = plain and other <= self.shift
            return Condition(() if always and self.side in ("query", "key") else None)
        return _at_most(other, self, 0)

    def __gt__(self, other: object) -> Condition:
        return self >= other + 1 if isinstance(other, int) else _at_most(other, self, -1)

    def __eq__(self, other: object) -> Condition:  # type: ignore[override]
        if not isinstance(other, Index) or not _comparable(self, other) or self.shift != other.shift:
            return Condition(None)
        if self.chunk is not None:
            return Condition((Chunk(self.chunk, self.origin, self.ids),))
        return Condition(None if self.ids is None or self.origin is not None else (Same(self.ids),))

    __hash__ = None  # type: ignore[assignment]


def _comparable(a: Index, b: Index) -> bool:
    """Whether one is of a query, the other of a key, and both are otherwise measured alike."""
    sides = (a.side, b.side)
    alike = a.ids is b.ids and a.origin is b.origin and a.chunk == b.chunk
    return alike and sides in (("query", "key"), ("key", "query"))


def _at_most(a: object, b: object, slack: int) -> Condition:
    """a <= b + slack."""
    if not isinstance(a, Index) or not isinstance(b, Index) or not _comparable(a, b) or a.chunk is not None:
        return Condition(None)
    reach = b.shift - a.shift + slack
    if reach < 0:
        return Condition(None)
    return Condition((Band(None, reach, a.ids) if a.side == "key" else Band(reach, None, a.ids),))


class _Lookup(TorchFunctionMode):
    """Answers ``tensor[batch]`` and ``tensor[batch, query]`` for symbols."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            index = args[1]
            if isinstance(index, Index):
                return Index(
                    "batch" if index.side == "batch" and args[0].dim() == 1 else "unknown", ids=args[0]
                )
            if isinstance(index, tuple) and any(isinstance(i, Index) for i in index):
                return _look_up(args[0], index)
        return func(*args, **(kwargs or {}))


def _look_up(ids: Tensor, index: tuple[Any, ...]) -> Index:
    if len(index) != 2 or ids.dim() != 2 or not all(isinstance(i, Index) for i in index):
        return Index("unknown")
    batch, place = index
    plain = place.shift == 0 and place.ids is None and place.origin is None and place.chunk is None
    if batch.side != "batch" or batch.ids is not None or not plain or place.side not in ("query", "key"):
        return Index("unknown")
    return Index(place.side, ids=ids)


def atoms_of(mask_function: Callable[..., Any]) -> tuple[Atom, ...] | None:
    """The comparisons of which `mask_function` is the conjunction; None where it is not one of these.

    Example:
        >>> from transformers.masking_utils import sliding_window_causal_mask_function
        >>> atoms_of(sliding_window_causal_mask_function(4))
        (Band(left=3, right=None, ids=None), Band(left=None, right=0, ids=None))
    """
    try:
        with _Lookup():
            found = mask_function(Index("batch"), Index("head"), Index("query"), Index("key"))
    except (AttributeError, TypeError):  # what it does with its indices is none of what symbols know
        return None
    return found.atoms if isinstance(found, Condition) else None
