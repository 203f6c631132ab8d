"""The report's figures from rows. Imports matplotlib, and is imported only to draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastattn.report.look import (
    COLORS,
    GREEN,
    INK,
    End,
    label_ends,
    lengths_axis,
    look_of,
    plain_numbers,
    tokens,
)
from fastattn.report.rows import OURS, Row, grouped, is_ours, latest, ours_of, speedups

# In the order of the plots; what is not named here comes last.
PASSES: Final = ("forward", "backward", "both", "step", "product")
_PASS_NAMES: Final = {"both": "forward + backward"}
_CEILINGS: Final = {
    "fma": ("multiply-adds of all threads", COLORS[0]),
    "matmul": ("a bfloat16 matrix product", COLORS[4]),
    "copy": ("a copy's bytes a second", COLORS[3]),
}


def pass_order(passes: str) -> int:
    """Its place in a plot."""
    return PASSES.index(passes) if passes in PASSES else len(PASSES)


def pass_name(passes: str) -> str:
    """For people."""
    return _PASS_NAMES.get(passes, passes)


def speed_by_length(rows: Sequence[Row]) -> Figure | None:
    """A panel for each kind of problem: speed over length, every implementation a line.

    Args:
        rows: of one operation, machine, dtype and pass.

    Returns:
        The figure, or None where no problem was measured at two lengths.
    """
    last = [row for row in latest(rows) if row.length]
    # what most problems are nearer to: arithmetic, or memory
    copied = statistics.mode([row.ceiling == "copy" for row in last if row.gflops] or [True])
    field, unit = ("gb_per_s", "GB/s") if copied else ("gflops", "GFLOP/s")
    panels = _panels(row for row in last if getattr(row, field))
    if not panels:
        return None
    names = sorted({row.implementation for own in panels.values() for row in own}, key=_ours_last)
    looks = look_of(names)
    figure, places = _grid(panels, width=11)
    labels: list[tuple[Axes, list[End]]] = []
    for axes, (title, own) in zip(places, panels.items(), strict=True):
        labels.append((axes, _speed_panel(axes, own, field, names, looks)))
        axes.set_title(title)
        axes.set_ylabel(unit)
    label_ends(figure, labels)
    return figure


def _panels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the title of their panel, where they are of two lengths or more.

    On a GPU a batch is as large as a number of tokens allows: where it changes with the length alone it is no
    panel of its own.
    """
    found: dict[str, list[Row]] = {}
    kinds = grouped(rows, lambda row: (row.head_dim or 0, replace(row, batch=1).title))
    for (_, title), own in sorted(kinds.items()):
        batches = {row.batch for row in own}
        by_length = len({(row.length, row.batch) for row in own}) == len({row.length for row in own})
        if by_length and len(batches) > 1:
            parts = {f"batch {max(batches)} to {min(batches)}, {title}": own}
        else:
            parts = grouped(own, lambda row: row.title)
        found |= {name: part for name, part in parts.items() if len({row.length for row in part}) > 1}
    return found


def _grid(panels: Mapping[str, object], width: float) -> tuple[Figure, list[Axes]]:
    """A figure with a place for each panel, few of the grid's empty."""
    count = len(panels)
    columns = count if count < 3 else 2 if count == 4 else 3
    lines = -(-count // columns)
    figure = Figure(figsize=(6 if columns == 1 else width, 2.9 * lines), layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places[count:]:
        axes.set_visible(False)
    return figure, places[:count]


def _speed_panel(
    axes: Axes, rows: Sequence[Row], field: str, names: Sequence[str], looks: Mapping[str, Mapping[str, Any]]
) -> list[End]:
    ends: list[End] = []
    for name in names:
        own = sorted((row for row in rows if row.implementation == name), key=lambda row: row.length or 0)
        if not own:
            continue
        xs, ys = [row.length or 0 for row in own], [getattr(row, field) for row in own]
        axes.plot(xs, ys, **looks[name])
        # the spread of the rounds
        slow, fast = (
            [
                y * (row.p50_ms or 0) / (getattr(row, edge) or row.p50_ms)
                for y, row in zip(ys, own, strict=True)
            ]
            for edge in ("p80_ms", "p20_ms")
        )
        axes.fill_between(xs, slow, fast, color=looks[name]["color"], alpha=0.15, linewidth=0)
        ends.append((xs[-1], ys[-1], name, looks[name]["color"]))
    axes.set_ylim(bottom=0)
    lengths_axis(axes, [row.length or 0 for row in rows])
    plain_numbers(axes)
    return ends


def _ours_last(name: str) -> tuple[bool, str]:
    return name == OURS, name


def speedup_by_peer(rows: Sequence[Row]) -> Figure | None:
    """A line for each peer, pass and dtype: a dot for each problem, the median told. Ours is 1.

    Args:
        rows: of one machine and any operations.
    """
    groups: dict[tuple[str, str, int, str, str], list[float]] = {}
    for ours, peer, ratio in speedups(rows):
        dtype = "" if ours.dtype == "float32" else f", {ours.dtype}"
        key = (ours.op, peer.name, pass_order(ours.passes), ours.passes, dtype)
        groups.setdefault(key, []).append(ratio)
    if not groups:
        return None
    keys = sorted(groups)
    figure = Figure(figsize=(11, 0.9 + 0.27 * len(keys)), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(PASSES, (COLORS[0], COLORS[2], GREEN, COLORS[3], COLORS[4]), strict=True))
    for i, key in enumerate(keys):
        ratios = sorted(groups[key])
        middle, color = statistics.median(ratios), colors.get(key[3], COLORS[0])
        axes.plot([ratios[0], ratios[-1]], [i, i], color=color, linewidth=1.2, alpha=0.5)
        axes.plot(ratios, [i] * len(ratios), "o", color=color, markersize=4.5, alpha=0.6)
        axes.plot([middle], [i], "|", color=INK, markersize=13, markeredgewidth=2)
        count = f"  (of {len(ratios)})" if len(ratios) > 1 else ""
        told = f"{middle:,.0f}×" if middle >= 100 else f"{middle:.2f}×"
        place = (max(ratios[-1], 1), i)
        axes.annotate(f"{told}{count}", place, (10, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    _ratio_axis(axes, [ratio for own in groups.values() for ratio in own])
    axes.set_yticks(
        range(len(keys)), [f"{op}, {pass_name(p)}: {name}{dtype}" for op, name, _, p, dtype in keys]
    )
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(
        "times faster than the peer: a dot a problem, a bar their median; right of 1 we are faster"
    )
    return figure


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    low, high = min(*ratios, 1.0) * 0.85, max(*ratios, 1.0) * 1.9
    steps = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    ticks = [t for t in (steps if high < 300 else [10**i for i in range(-2, 7)]) if low <= t <= high]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}×"))


def share_of_ceiling(rows: Sequence[Row]) -> Figure | None:
    """How near to what the machine can do at most: a line for each kind of problem, a dot a length.

    Args:
        rows: of one machine and any operations.
    """
    # on a CPU the multiply-adds are float32's: torch has faster instructions for shorter dtypes
    fair = [row for row in latest(rows) if row.ceiling != "fma" or row.dtype == "float32"]
    ours = [row for row in fair if row.share and row.implementation == OURS and row.length]
    if not ours:
        return None
    groups = grouped(
        ours,
        lambda row: (row.op, pass_order(row.passes), row.dtype, row.head_dim or 0, row.title, row.ceiling),
    )
    keys = sorted(groups)
    figure = Figure(figsize=(11, 1.1 + 0.27 * len(keys)), layout="constrained")
    axes = figure.subplots()
    names = []
    for i, key in enumerate(keys):
        own = sorted(groups[key], key=lambda row: row.length or 0)
        shares, color = [100 * (row.share or 0) for row in own], _CEILINGS[key[-1]][1]
        axes.plot([min(shares), max(shares)], [i, i], color=color, linewidth=1.2, alpha=0.5)
        for j, share in enumerate(shares):
            axes.plot([share], [i], "o", color=color, markersize=min(4 + j, 9), alpha=0.75)
        told = " to ".join(dict.fromkeys(tokens(row.length or 0) for row in (own[0], own[-1])))
        place = (max(shares), i)
        axes.annotate(
            f"{shares[-1]:.0f} %, {told}", place, (9, 0), textcoords="offset points", va="center", fontsize=8
        )
        parts = (own[0].op, pass_name(own[0].passes), own[0].title, own[0].dtype)
        names.append(", ".join(part for part in parts if part))
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_xlim(0, max(112, 115 * max(row.share or 0 for row in ours)))
    axes.set_yticks(range(len(keys)), names)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("of the ceiling")
    used = [told for name, told in _CEILINGS.items() if any(row.ceiling == name for row in ours)]
    handles = [Line2D([], [], color=color, marker="o", linestyle="", label=label) for label, color in used]
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return figure


def memory_by_length(rows: Sequence[Row]) -> Figure | None:
    """Peak memory over length, a panel for each kind of problem, a line an implementation.

    Args:
        rows: of one operation, machine, dtype and pass.

    Returns:
        The figure, or None where no problem was measured at two lengths.
    """
    panels = _panels(row for row in latest(rows, "peak_mb") if row.length and row.peak_mb)
    if not panels:
        return None
    figure, places = _grid(panels, width=11)
    looks = look_of(sorted({row.implementation for own in panels.values() for row in own}, key=_ours_last))
    labels: list[tuple[Axes, list[End]]] = []
    for axes, (title, own) in zip(places, panels.items(), strict=True):
        ends: list[End] = []
        for name in sorted({row.implementation for row in own}, key=_ours_last):
            points = {row.length or 0: row.peak_mb or 0.0 for row in own if row.implementation == name}
            xs = sorted(points)
            axes.plot(xs, [points[x] for x in xs], **looks[name])
            ends.append((xs[-1], points[xs[-1]], name, looks[name]["color"]))
        lengths_axis(axes, [row.length or 0 for row in own])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([a * 10**b for b in range(-1, 7) for a in (1, 2, 5)]))
        axes.yaxis.set_minor_locator(NullLocator())
        plain_numbers(axes)
        axes.margins(y=0.15)
        labels.append((axes, ends))
        axes.set_title(title)
        axes.set_ylabel("MB beyond the inputs")
    label_ends(figure, labels)
    return figure


def training_steps(rows: Iterable[Row]) -> Figure | None:
    """Time of a training step as bars, a group for each race."""
    steps = [row for row in latest(rows) if row.op == "gpt2" and row.length]
    by_race = grouped(steps, lambda row: (row.run, row.race, row.machine, row.problem))
    groups = [own for own in by_race.values() if len(own) > 1]
    if not groups:
        return None
    groups.sort(key=lambda own: (own[0].title, own[0].length, str(own[0].machine), own[0].dtype))
    looks = look_of(sorted({row.implementation for own in groups for row in own}, key=_ours_last))
    bars = sum(map(len, groups))
    figure = Figure(figsize=(11, 0.6 + 0.3 * bars + 0.34 * len(groups)), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, []
    for own in groups:
        own.sort(key=lambda row: -(row.p50_ms or 0))
        ours, first = ours_of(own), own[0]
        where = f"{tokens(first.length or 0)} tokens, {first.dtype}\n{first.machine}"
        ticks.append((place + (len(own) - 1) / 2, f"{first.title}\n{where}"))
        for row in own:
            ms = row.p50_ms or 0.0
            axes.barh(place, ms / 1000, height=0.8, color=looks[row.implementation]["color"])
            compared = ours is not None and row.race and not is_ours(row.implementation)
            ratio = f"  ({ms / (ours.p50_ms or ms):.2f}×)" if ours is not None and compared else ""
            memory = f", {row.peak_mb / 1000:.1f} GB" if row.peak_mb else ""
            text = f"{row.name}: {ms / 1000:,.2f} s{memory}{ratio}"
            axes.annotate(
                text, (ms / 1000, place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
            place += 1
        place += 0.8
    axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(place - 0.9, -0.9)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.4 * max((row.p50_ms or 0) / 1000 for own in groups for row in own))
    axes.set_xlabel("seconds a step, forward + backward + optimizer")
    return figure
