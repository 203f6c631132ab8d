"""The longest context that trains: which to try next, by the memory and time of those tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import torch

LEAST: Final = 64
_FIT_POINTS: Final = 3  # as many as the polynomial has coefficients
_LEAP: Final = 4  # at most this far beyond what was measured, so that an extrapolation is never a long one

Status = Literal["trained", "out of memory", "failed", "not run (time)", "not run (machine)"]


class Point(NamedTuple):
    """What one training step at a context came to.

    Attributes:
        context: tokens.
        status: "trained", or why not.
        ms: time of the step, None where it did not end.
        peak_bytes: highest memory of the process; as far as it had come where it did not end.
        loss: of the step, in nats a token.
        reason: why not, for people.
    """

    context: int
    status: Status
    ms: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    reason: str | None = None


@dataclass
class Found:
    """What a search came to.

    Attributes:
        points: every context that was tried, in the order of trying.
        most: no context above this was asked for; what is tried is on the grid below it.
        budget: bytes.
    """

    budget: int
    most: int
    points: list[Point] = field(default_factory=list)

    @property
    def trained(self) -> dict[int, Point]:
        return {point.context: point for point in self.points if point.status == "trained"}

    @property
    def longest(self) -> Point | None:
        """The longest context that trained."""
        return max(self.trained.values(), default=None)

    @property
    def refused(self) -> Point | None:
        """The shortest context that ran out of the budget."""
        return min((point for point in self.points if point.status == "out of memory"), default=None)

    @property
    def predicted(self) -> int | None:
        """The longest context by the fit of the measured peaks, None before there are enough of them."""
        if len(self.trained) < _FIT_POINTS:
            return None
        peaks = {t: float(point.peak_bytes or 0) for t, point in self.trained.items()}
        return longest_within(peaks, self.budget, self.most)

    @property
    def edge(self) -> Literal["run", "extrapolated", "none"]:
        """ "run" where the next context of the grid behind `longest` was run too, or is beyond `most`."""
        if self.longest is None:
            return "none"
        if self.longest.context >= on_grid(self.most):
            return "run"
        close = self.refused is not None and above(self.longest.context) >= self.refused.context
        return "run" if close else "extrapolated"


def grain(context: int) -> int:
    """Contexts are told to sixteen steps an octave, and to no less than 64 tokens.

    Example:
        >>> grain(1024), grain(3000), grain(50_000)
        (64, 128, 2048)
    """
    return max(LEAST, 1 << max(context.bit_length() - 5, 0))


def on_grid(context: float) -> int:
    """The largest context of the grid that is not above this one; 0 below the first.

    Example:
        >>> on_grid(3000), on_grid(2944)
        (2944, 2944)
    """
    whole = int(context)
    return whole // grain(whole) * grain(whole)


def above(context: int) -> int:
    """The context of the grid behind one of its own.

    Example:
        >>> above(2944), above(4096)
        (3072, 4352)
    """
    return context + grain(context)


def fit(points: Mapping[int, float]) -> tuple[float, float, float]:
    """Coefficients of ``value = a + b T + c T²``, by least squares of the relative error, none below 0.

    Memory: the weights, what grows with the tokens, and the attention matrix where it is kept. Time likewise.

    Args:
        points: context T -> value; at least three.

    Returns:
        ``(a, b, c)``.

    Raises:
        ValueError: fewer than three points.

    Example:
        >>> [round(x, 3) for x in fit({t: 5 + 2 * t + 3 * t * t for t in (1, 2, 4, 8)})]
        [5.0, 2.0, 3.0]
    """
    if len(points) < _FIT_POINTS:
        raise ValueError(
            f"points: expected at least {_FIT_POINTS} contexts to fit through, got {len(points)}"
        )
    scale = max(points)  # so that the columns are of one size
    t = torch.tensor(list(points), dtype=torch.float64) / scale
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    columns = torch.stack([torch.ones_like(t), t, t * t], 1) / y[:, None]
    kept = [0, 1, 2]
    while True:
        solution = torch.linalg.lstsq(columns[:, kept], torch.ones(len(t), 1, dtype=torch.float64)).solution
        coefficients = dict(zip(kept, solution[:, 0].tolist(), strict=True))
        least = min(coefficients, key=lambda power: coefficients[power])
        if coefficients[least] >= 0 or len(kept) == 1:
            break
        kept.remove(least)
    a, b, c = (coefficients.get(power, 0.0) / scale**power for power in range(3))
    return a, b, c


def longest_within(points: Mapping[int, float], budget: float, most: int) -> int:
    """The longest context of the grid whose value, by `fit`, is within `budget`; at most `most`.

    Example:
        >>> longest_within({t: 100 + t for t in (64, 128, 256)}, 700, 10_000)
        576
    """
    a, b, c = fit(points)
    room = budget - a
    if room <= 0:
        return 0
    if c > 0:
        root = (math.sqrt(b * b + 4 * c * room) - b) / (2 * c)
    else:
        root = room / b if b > 0 else math.inf
    # A fit through rounded numbers may miss a point of the grid by a hair.
    return on_grid(min(root * (1 + 1e-9), most))


def next_context(found: Found, first: int) -> int | None:
    """The context to try next, or None where the longest is known to the grid.

    Doubles until there are enough points to fit, then goes where the fit has the edge, four times beyond what
    has trained at most; where the fit was too hopeful, halves what is left.
    """
    longest = found.longest.context if found.longest is not None else 0
    refused = found.refused.context if found.refused is not None else None
    if longest == 0:
        smaller = first if refused is None else on_grid(refused / 2)
        return smaller or None
    top = on_grid(found.most) if refused is None else on_grid(refused - 1)
    if longest >= top:
        return None
    predicted = found.predicted
    wanted = 2 * longest if predicted is None else min(predicted, _LEAP * longest)
    if refused is not None and wanted >= refused:
        wanted = on_grid((longest + refused) / 2)
    return min(max(wanted, above(longest)), top)


def search(
    probe: Callable[[int], Point], found: Found, first: int, seconds_left: Callable[[], float]
) -> Found:
    """Try contexts until the longest that trains is known, or the time is up.

    Args:
        probe: runs a training step at a context.
        found: its `points` grow, so that what was found is there even where `probe` raises.
        first: context to begin with.
        seconds_left: of the time for this search; a context whose step would take longer, by a fit, gives way
            to the longest one that there is time for.

    Returns:
        `found`.
    """
    while (context := next_context(found, first)) is not None:
        affordable = _affordable(found, seconds_left())
        if context > affordable:
            longest = found.longest
            if longest is not None and affordable < 1.1 * longest.context:
                found.points.append(Point(context, "not run (time)", reason="no time left for this step"))
                return found
            context = affordable
        point = probe(context)
        found.points.append(point)
        if point.status not in ("trained", "out of memory"):
            return found
    return found


def _affordable(found: Found, seconds: float) -> int:
    """The longest context whose step takes at most this long, by what was measured."""
    times = {t: point.ms or 0.0 for t, point in found.trained.items()}
    if len(times) >= _FIT_POINTS:
        return longest_within(times, 1000 * seconds, found.most)
    return found.most if seconds > 0 else 0
