"""What a measurement will need, told before it is run, from those at other contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

T = TypeVar("T")


def fit(points: Mapping[int, float]) -> tuple[float, float]:
    """Coefficients of ``value = a T + b T²`` through the two largest contexts, neither below 0.

    The activations of a training step grow with T (the hidden states, the logits) and, where the attention
    matrix is kept, with T²; so does its time.

    Args:
        points: context T -> value; at least two.

    Returns:
        ``(a, b)``.

    Raises:
        ValueError: fewer than two points.

    Example:
        >>> fit({512: 512 + 512**2, 1024: 1024 + 1024**2})
        (1.0, 1.0)
    """
    if len(points) < 2:
        raise ValueError(f"points: expected at least 2 contexts to fit through, got {len(points)}")
    t1, t2 = sorted(points)[-2:]
    y1, y2 = points[t1] / t1, points[t2] / t2  # y / T = a + b T, a line
    b = (y2 - y1) / (t2 - t1)
    if b <= 0:
        return y2, 0.0
    a = y2 - b * t2
    return (a, b) if a >= 0 else (0.0, y2 / t2)


def predict(points: Mapping[int, float], context: int, bound: Literal["least", "most"]) -> float | None:
    """The value at another context, or a bound on it where there is one point only.

    Args:
        points: context T -> measured value.
        context: the T to tell the value of.
        bound: with one point the value lies between a linear and a quadratic law; which end to take.

    Returns:
        The value, or None without any point.

    Example:
        >>> predict({1024: 3.0}, 2048, "least"), predict({1024: 3.0}, 2048, "most")
        (6.0, 12.0)
    """
    if not points:
        return None
    if len(points) == 1:
        ((t, y),) = points.items()
        ratio = context / t
        laws = (y * ratio, y * ratio * ratio)
        return min(laws) if bound == "least" else max(laws)
    a, b = fit(points)
    return a * context + b * context * context


def turns(steps: int, rounds: int) -> list[range]:
    """`steps` cut into `rounds` runs of nearly equal length.

    Example:
        >>> turns(5, 2)
        [range(0, 3), range(3, 5)]
    """
    rounds = max(1, min(rounds, steps))
    ends = [(steps * (i + 1) + rounds - 1) // rounds for i in range(rounds)]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def rotated(names: Sequence[T], turn: int) -> list[T]:
    """`names` with the first `turn` of them moved to the end, so that each comes first in its turn.

    Example:
        >>> rotated(["a", "b", "c"], 1)
        ['b', 'c', 'a']
    """
    turn %= max(len(names), 1)
    return [*names[turn:], *names[:turn]]
