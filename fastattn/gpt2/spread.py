"""Means of a few measured values, and how far off they may be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def student(freedom: int, level: float = 0.95) -> float:
    """The t within ±which Student's distribution has `level` of its mass.

    Args:
        freedom: degrees of freedom, at least 1.
        level: in (0, 1).

    Raises:
        ValueError: other numbers.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Example:
        >>> [round(student(freedom), 3) for freedom in (1, 2, 7, 30)]
        [12.706, 4.303, 2.365, 2.042]
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(
            f"student: expected freedom of at least 1 and a level in (0, 1), got {freedom}, {level}"
        )
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return math.tan(high) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """The mass within ±t, where ``t = sqrt(freedom) · tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    power = freedom % 2
    term, total = cosine**power, 0.0
    while power <= freedom - 2:
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
        power += 2
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`, two or more.

    Example:
        >>> standard_error([1.0, 3.0])
        1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The mean of `values`, two or more, and half the width of its Student interval.

    Example:
        >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
        [2.0, 2.484]
    """
    return statistics.fmean(values), student(len(values) - 1, level) * standard_error(values)
