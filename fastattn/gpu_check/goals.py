"""What the GPU kernels are to reach, and the table that says whether they did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from fastattn.gpu_check.peers import OURS
from fastattn.gpu_check.races import CASES

Row = Mapping[str, Any]


class Goal(NamedTuple):
    """How many times faster than a peer; with `peer` "copy", the share of a copy's bytes a second.

    Attributes:
        case: a row's.
        passes: a row's.
        peer: a row's `implementation`.
        minimum: below it the goal is missed.
        aim: what is hoped for.
        ours: our row's `implementation`.
    """

    case: str
    passes: str
    peer: str
    minimum: float
    aim: float
    ours: str = OURS


def _goals() -> Iterable[Goal]:
    forward = {"causal D64 1k": (1.0, 1.2), "causal D64 4k": (0.9, 1.1), "causal D64 16k": (0.9, 1.1)}
    forward["causal D128 8k"] = (0.75, 1.0)
    for name, (minimum, aim) in forward.items():
        case = CASES[name].name
        yield Goal(case, "forward", "sdpa cudnn", minimum, aim)
        yield Goal(case, "forward", "sdpa flash", 1.1, 1.6)
        if "D64" in name:
            yield Goal(case, "backward", "sdpa cudnn", 0.8, 1.1)
            yield Goal(case, "backward", "sdpa flash", 1.1, 1.6)
    yield Goal(CASES["causal D64 1k"].name, "both", "naive", 6, 9)
    yield Goal(CASES["causal D64 4k"].name, "both", "naive", 9, 12)
    yield Goal("decode 32:8 D128", "forward", "copy", 0.75, 0.92)
    yield Goal("decode 12:12 D64", "forward", "copy", 0.75, 0.92)
    eager, standard = "transformers, eager", "fastattn.gpt2, standard"
    yield Goal("GPT-2 step", "step", eager, 3, 5, ours="fastattn.gpt2, fastattn")
    yield Goal("GPT-2 step", "step", standard, 3, 5, ours="fastattn.gpt2, fastattn")


GOALS: Final = tuple(_goals())


def tables(rows: Sequence[Row], goals: bool = True) -> str:
    """Times and ratios of every race in `rows`, then the goals."""
    parts = [race for case in _cases(rows) if (race := _race(rows, *case))]
    found = _goal_lines(rows) if goals else []
    if found:
        head = f"{'goal':<62} {'minimum':>8} {'aim':>6} {'found':>7}"
        parts.append("\n".join([head, *found]))
    return "\n\n".join(parts)


def _cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    timed = [(row["case"], row["passes"]) for row in rows if "p50_ms" in row and "passes" in row]
    return list(dict.fromkeys(timed))


def _race(rows: Sequence[Row], case: str, passes: str) -> str:
    mine = [row for row in rows if row.get("case") == case and row.get("passes") == passes]
    ours = next((row for row in mine if _is_ours(row) and "p50_ms" in row), None)
    lines = [f"{case}, {passes}"]
    for row in mine:
        if "p50_ms" not in row:
            if row["status"] != "absent":
                lines.append(
                    f"  {row['implementation']:<26} {row['status']}: {str(row.get('note', ''))[:110]}"
                )
            continue
        ratio = row["p50_ms"] / ours["p50_ms"] if ours is not None else None
        columns = [
            f"{row['p50_ms']:>10.4g} ms",
            f"{row['tflops']:>7.1f} TFLOP/s" if "tflops" in row else "",
            f"{row['gb_per_s']:>7.0f} GB/s" if "gb_per_s" in row else "",
            f"{row['share_of_copy']:>6.0%} of a copy" if "share_of_copy" in row else "",
            f"{row['peak_mb']:>8.0f} MB" if "peak_mb" in row else "",
            f"{ratio:>6.2f}x" if ratio is not None else "",
            f"  {row.get('kernel', '')}"[:80],
        ]
        lines.append(f"  {row['implementation']:<26} " + " ".join(column for column in columns if column))
    return "\n".join(lines)


def _is_ours(row: Row) -> bool:
    return row["implementation"] in (OURS, "fastattn.gpt2, fastattn")


def _goal_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for goal in GOALS:
        found = value_of(rows, goal)
        if not any(row.get("case") == goal.case for row in rows):
            continue
        what = f"{goal.case}, {goal.passes}, against {goal.peer}"
        said = "not measured" if found is None else f"{found:>7.2f} {verdict(found, goal)}"
        lines.append(f"{what:<62} {goal.minimum:>8} {goal.aim:>6} {said}")
    return lines


def value_of(rows: Sequence[Row], goal: Goal) -> float | None:
    """What was measured of a goal; None where either side was not."""
    times: dict[str, Row] = {
        row["implementation"]: row
        for row in rows
        if row.get("case") == goal.case and row.get("passes") == goal.passes and row.get("status") == "ok"
    }
    ours = times.get(goal.ours)
    if ours is None:
        return None
    if goal.peer == "copy":
        share: float | None = ours.get("share_of_copy")
        return share
    peer = times.get(goal.peer)
    return None if peer is None else float(peer["p50_ms"] / ours["p50_ms"])


def verdict(found: float, goal: Goal) -> str:
    """In words."""
    if found >= goal.aim:
        return "aim reached"
    return "minimum reached" if found >= goal.minimum else "NOT reached"
