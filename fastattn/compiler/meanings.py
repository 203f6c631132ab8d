"""What a tensor of positions or conditions is as a function of its indices, and what is done with that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastattn.compiler.graph import Size, same


@dataclass(frozen=True)
class Affine:
    """``const + Σ coef[d] · index[d]``; const may be a float where all coef are 0, and symbolic."""

    const: Any
    coef: tuple[int, ...]

    @property
    def constant(self) -> bool:
        return not any(self.coef)


@dataclass(frozen=True)
class Keep:
    """True where all of ``affine >= 0`` are; with none, everywhere. `never`: nowhere."""

    parts: tuple[Affine, ...]
    rank: int
    never: bool = False


@dataclass(frozen=True)
class Choice:
    """One number where the condition holds, the other elsewhere."""

    when: Keep
    yes: float
    no: float


Meaning = Affine | Keep | Choice | None


def plain_number(x: Any) -> bool:
    return isinstance(x, (int, float))


def is_number(x: Any) -> bool:
    return isinstance(x, Affine) and x.constant and plain_number(x.const)


def as_choice(x: Any) -> Choice:
    if isinstance(x, Keep):
        return Choice(x, 1, 0)
    if isinstance(x, Choice):
        return x
    raise ValueError


def mapped(x: Meaning, change: Callable[[Affine], Affine], rank: int) -> Meaning:
    """The same with every affine form in it changed to another over `rank` indices."""
    if isinstance(x, Affine):
        return change(x)
    if isinstance(x, Keep):
        return kept(x, change, rank)
    if isinstance(x, Choice):
        return replace(x, when=kept(x.when, change, rank))
    return None


def kept(x: Keep, change: Callable[[Affine], Affine], rank: int) -> Keep:
    return Keep(tuple(change(p) for p in x.parts), rank, x.never)


def padded(x: Affine, rank: int) -> Affine:
    return Affine(x.const, (*(0,) * (rank - len(x.coef)), *x.coef))


def moved(x: Meaning, sources: Sequence[int | None]) -> Meaning:
    """With the index of dimension d taken from `sources[d]`; None for a new dimension."""
    return mapped(
        x, lambda a: Affine(a.const, tuple(0 if s is None else a.coef[s] for s in sources)), len(sources)
    )


def shifted(x: Meaning, dim: int, start: int) -> Meaning:
    """With the index of one dimension counted from `start`."""
    return mapped(x, lambda a: Affine(a.const + a.coef[dim] * start, a.coef), rank_of(x))


def rank_of(x: Meaning) -> int:
    if isinstance(x, Choice):
        x = x.when
    return x.rank if isinstance(x, Keep) else len(x.coef)  # type: ignore[union-attr]


def normal(x: Meaning, shape: tuple[Size, ...]) -> Meaning:
    """Without the indices that are always 0; None where the ranks do not fit."""
    if x is None or rank_of(x) != len(shape):
        return None
    single = [type(n) is int and n == 1 for n in shape]
    return mapped(
        x,
        lambda a: Affine(a.const, tuple(0 if one else c for c, one in zip(a.coef, single, strict=True))),
        len(shape),
    )


def matching(old: tuple[Size, ...], new: tuple[Size, ...]) -> list[int | None] | None:
    """Where each dimension of a view comes from, where it only adds or drops dimensions of size 1."""

    def real(shape: tuple[Size, ...]) -> list[int]:
        return [d for d, n in enumerate(shape) if not (type(n) is int and n == 1)]

    a, b = real(old), real(new)
    if len(a) != len(b) or not all(same(old[i], new[j]) for i, j in zip(a, b, strict=True)):
        return None
    sources: list[int | None] = [None] * len(new)
    for i, j in zip(a, b, strict=True):
        sources[j] = i
    return sources


def not_negative(x: Any) -> bool:
    const = x.const
    return all(c >= 0 for c in x.coef) and (const >= 0 if type(const) is int else False)


def compared(x: Affine, name: str, zero: int) -> Meaning:
    """``x <name> 0`` of an affine form."""
    rank = len(x.coef)
    if x.constant and plain_number(x.const):
        holds = {
            "eq": x.const == zero,
            "ne": x.const != zero,
            "ge": x.const >= zero,
            "gt": x.const > zero,
            "le": x.const <= zero,
            "lt": x.const < zero,
        }[name]
        return Keep((), rank, never=not holds)
    if isinstance(x.const, float):
        return None
    negative = Affine(-x.const, tuple(-c for c in x.coef))
    if name == "ge":
        return Keep((x,), rank)
    if name == "le":
        return Keep((negative,), rank)
    if name == "gt":
        return Keep((Affine(x.const - 1, x.coef),), rank)
    if name == "lt":
        return Keep((Affine(negative.const - 1, negative.coef),), rank)
    return None


def both(a: Keep, b: Keep) -> Keep:
    return Keep((*a.parts, *b.parts), a.rank, a.never or b.never)


def negated(x: Keep) -> Meaning:
    if x.never or not x.parts:
        return Keep((), x.rank, never=not x.never)
    if len(x.parts) > 1:
        return None
    part = x.parts[0]
    return Keep((Affine(-part.const - 1, tuple(-c for c in part.coef)),), x.rank)


def chosen(x: Choice, test: Any) -> Meaning:
    """Where a test of its numbers holds."""
    yes, no = test(x.yes), test(x.no)
    if yes == no:
        return Keep((), x.when.rank, never=not yes)
    return x.when if yes else negated(x.when)


def arithmetic(x: Choice, change: Any) -> Meaning:
    yes, no = change(x.yes), change(x.no)
    return None if math.isnan(yes) or math.isnan(no) else Choice(x.when, yes, no)
