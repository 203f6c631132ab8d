"""The report's figures from rows. Imports matplotlib, and is imported only to draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from fastattn.report.rows import OURS, Row, latest, speedups

# In the order of the plots; what is not named here comes last.
_PASSES: Final = ("forward", "backward", "both", "step", "product")
_PASS_NAMES: Final = {"both": "forward + backward", "step": "training step"}
_MOST_PANELS: Final = 12


def _place(passes: str) -> int:
    return _PASSES.index(passes) if passes in _PASSES else len(_PASSES)


def pass_name(passes: str) -> str:
    """For people."""
    return _PASS_NAMES.get(passes, passes)


def speed_by_length(rows: Sequence[Row]) -> Figure | None:
    """A panel for each pass, head_dim and mask: speed over length, every implementation a line.

    Args:
        rows: of one operation, machine and dtype.

    Returns:
        The figure, or None where no problem was measured at two lengths.
    """
    panels: dict[tuple[str, int | None, str, str], list[Row]] = {}
    for row in latest(rows):
        if row.length and row.gflops and row.p50_ms:
            panels.setdefault((row.passes, row.head_dim, row.mask, row.case), []).append(row)
    panels = {key: own for key, own in panels.items() if len({row.length for row in own}) > 1}
    if not panels:
        return None
    keys = sorted(panels, key=lambda key: (_place(key[0]), key[1] or 0, key[2], key[3]))[:_MOST_PANELS]
    columns = _columns(len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(11, 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    names = sorted({row.implementation for own in panels.values() for row in own}, key=_ours_last)
    looks = look_of(names)
    cases = {key[3] for key in keys}
    labels: list[tuple[Axes, list[End]]] = []
    for axes, key in zip(grid.flat, keys, strict=False):
        passes, head_dim, mask, case = key
        labels.append((axes, _speed_panel(axes, panels[key], names, looks)))
        more = f"\n{case}" if len(cases) > 1 else ""
        kind = _kind(head_dim, mask)
        axes.set_title(f"{pass_name(passes)}{', ' + kind if kind else ''}{more}")
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("GFLOP/s")
    label_ends(figure, labels)
    return figure


def _columns(panels: int) -> int:
    """So that few places of the grid stay empty."""
    return panels if panels < 3 else 2 if panels == 4 else 3


def _kind(head_dim: int | None, mask: str) -> str:
    """``d 64, causal``, as far as it is known."""
    named = "no mask" if mask == "none" else mask
    return ", ".join(part for part in (f"d {head_dim}" if head_dim else "", named) if part)


def _speed_panel(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], looks: Mapping[str, Mapping[str, Any]]
) -> list[End]:
    ends: list[End] = []
    for name in names:
        own = sorted((row for row in rows if row.implementation == name), key=lambda row: row.length or 0)
        if len(own) < 2:
            continue
        xs, ys = [row.length or 0 for row in own], [row.gflops or 0.0 for row in own]
        axes.plot(xs, ys, **looks[name])
        # the spread of the rounds
        low = [
            y * (row.p50_ms or 0) / (row.p80_ms or row.p50_ms or 1) for y, row in zip(ys, own, strict=True)
        ]
        high = [
            y * (row.p50_ms or 0) / (row.p20_ms or row.p50_ms or 1) for y, row in zip(ys, own, strict=True)
        ]
        axes.fill_between(xs, low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)
        ends.append((xs[-1], ys[-1], name, looks[name]["color"]))
    axes.set_ylim(bottom=0)
    lengths_axis(axes, [row.length or 0 for row in rows])
    plain_numbers(axes)
    return ends


def _ours_last(name: str) -> tuple[bool, str]:
    return name == OURS, name


def speedup_by_peer(rows: Sequence[Row]) -> Figure | None:
    """A line for each peer and pass: a dot for each problem, the median told. Ours is 1.

    Args:
        rows: of one machine and any operations.
    """
    groups: dict[tuple[str, str, str], list[float]] = {}
    for ours, peer, ratio in speedups(rows):
        name = peer.implementation
        if peer.kernel and peer.kernel not in ("eager", "cpu") and peer.kernel.isidentifier():
            name += f" ({peer.kernel})"
        groups.setdefault((ours.op, name, ours.passes), []).append(ratio)
    if not groups:
        return None
    keys = sorted(groups, key=lambda key: (key[0], key[1], _place(key[2])))
    figure = Figure(figsize=(11, 0.9 + 0.29 * len(keys)), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(_PASSES, (COLORS[0], COLORS[2], GREEN, COLORS[3], COLORS[4]), strict=True))
    for i, key in enumerate(keys):
        ratios = sorted(groups[key])
        middle = statistics.median(ratios)
        axes.plot(
            [ratios[0], ratios[-1]], [i, i], color=colors.get(key[2], COLORS[0]), linewidth=1.2, alpha=0.5
        )
        axes.plot(
            ratios, [i] * len(ratios), "o", color=colors.get(key[2], COLORS[0]), markersize=4.5, alpha=0.6
        )
        axes.plot([middle], [i], "|", color=INK, markersize=14, markeredgewidth=2)
        count = f"  (of {len(ratios)})" if len(ratios) > 1 else ""
        told = f"{middle:,.0f}×" if middle >= 100 else f"{middle:.2f}×"
        axes.annotate(
            f"{told}{count}", (max(ratios[-1], 1), i), (10, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    _ratio_axis(axes, [ratio for own in groups.values() for ratio in own])
    axes.set_yticks(range(len(keys)), [f"{op}, {pass_name(p)}: {name}" for op, name, p in keys])
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
    """How near to what the machine can do at most: a line for each kind of problem, a dot a length."""
    groups: dict[tuple[str, tuple[int, str], str, int, str, str], dict[int, list[float]]] = {}
    for row in latest(rows):
        if row.implementation == OURS and row.share and row.length:
            key = (
                row.op,
                (_place(row.passes), row.passes),
                row.dtype,
                row.head_dim or 0,
                row.mask,
                row.ceiling,
            )
            groups.setdefault(key, {}).setdefault(row.length, []).append(row.share)
    if not groups:
        return None
    keys = sorted(groups)
    figure = Figure(figsize=(11, 0.9 + 0.27 * len(keys)), layout="constrained")
    axes = figure.subplots()
    for i, key in enumerate(keys):
        lengths = sorted(groups[key])
        shares = [100 * statistics.median(groups[key][length]) for length in lengths]
        color = COLORS[0] if key[5] == "fma" else COLORS[3]
        axes.plot([min(shares), max(shares)], [i, i], color=color, linewidth=1.2, alpha=0.5)
        for share, size in zip(shares, range(4, 4 + len(shares)), strict=True):
            axes.plot([share], [i], "o", color=color, markersize=min(size, 9), alpha=0.75)
        told = " to ".join(dict.fromkeys((tokens(lengths[0]), tokens(lengths[-1]))))
        place = (max(shares), i)
        axes.annotate(
            f"{shares[-1]:.0f} %, {told}", place, (9, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_xlim(0, max(112, 1.15 * max(100 * max(map(max, own.values())) for own in groups.values())))
    names = []
    for op, passes, dtype, head_dim, mask, _ in keys:
        kind = _kind(head_dim, mask)
        names.append(", ".join(part for part in (op, pass_name(passes[1]), kind, dtype) if part))
    axes.set_yticks(range(len(keys)), names)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("of the ceiling")
    return figure


def memory_by_length(rows: Sequence[Row]) -> Figure | None:
    """Peak memory over length, a panel an operation, a line an implementation; no training steps."""
    panels: dict[tuple[str, str, int, str], dict[str, dict[int, float]]] = {}
    for row in latest(rows):
        if row.peak_mb and row.length and row.op != "gpt2":
            where = (row.op, row.passes, row.head_dim or 0, row.mask)
            panels.setdefault(where, {}).setdefault(row.implementation, {})[row.length] = row.peak_mb
    for key, own in panels.items():
        panels[key] = {name: points for name, points in own.items() if len(points) > 1}
    panels = {key: own for key, own in panels.items() if own}
    if not panels:
        return None
    keys = sorted(panels)[:6]
    columns = _columns(len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(6 if columns == 1 else 11, 3.0 * lines), layout="constrained")
    labels: list[tuple[Axes, list[End]]] = []
    grid = figure.subplots(lines, columns, squeeze=False)
    looks = look_of(sorted({name for own in panels.values() for name in own}, key=_ours_last))
    for axes, key in zip(grid.flat, keys, strict=False):
        ends: list[End] = []
        for name, points in sorted(panels[key].items(), key=lambda item: _ours_last(item[0])):
            xs = sorted(points)
            axes.plot(xs, [points[x] for x in xs], **looks[name])
            ends.append((xs[-1], points[xs[-1]], name, looks[name]["color"]))
        lengths_axis(axes, [x for points in panels[key].values() for x in points])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([a * 10**b for b in range(7) for a in (1, 2, 5)]))
        axes.yaxis.set_minor_locator(NullLocator())
        plain_numbers(axes)
        axes.margins(y=0.15)
        labels.append((axes, ends))
        axes.set_title(f"{key[0]}, {pass_name(key[1])}\n{_kind(key[2], key[3])}")
        axes.set_ylabel("MB beyond the inputs")
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    label_ends(figure, labels)
    return figure


def training_steps(rows: Iterable[Row]) -> Figure | None:
    """Time of a training step as bars, a group for each problem."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in latest(rows):
        if row.op == "gpt2" and row.p50_ms and row.length:
            isa = f", {row.isa}" if row.isa else ""
            groups.setdefault((row.case, row.length, isa), []).append(row)
    groups = {key: own for key, own in groups.items() if len(own) > 1}
    if not groups:
        return None
    names = sorted({row.implementation for own in groups.values() for row in own}, key=_ours_last)
    looks = look_of(names)
    keys = sorted(groups)
    bars = sum(len(groups[key]) for key in keys)
    figure = Figure(figsize=(11, 0.6 + 0.32 * bars + 0.34 * len(keys)), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, []
    for key in keys:
        own = sorted(groups[key], key=lambda row: -(row.p50_ms or 0))
        ours = next((row.p50_ms for row in own if row.implementation == OURS), None)
        ticks.append((place + (len(own) - 1) / 2, f"{key[0]}\n{tokens(key[1])} tokens{key[2]}"))
        for row in own:
            seconds = (row.p50_ms or 0) / 1000
            axes.barh(place, seconds, height=0.8, color=looks[row.implementation]["color"])
            ratio = f"  ({seconds * 1000 / ours:.2f}×)" if ours and row.implementation != OURS else ""
            memory = f", {row.peak_mb / 1000:.1f} GB" if row.peak_mb else ""
            text = f"{row.implementation}: {seconds:,.2f} s{memory}{ratio}"
            axes.annotate(text, (seconds, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
            place += 1
        place += 0.8
    axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.35 * max((row.p50_ms or 0) / 1000 for own in groups.values() for row in own))
    axes.set_xlabel("seconds a step, forward + backward + optimizer")
    return figure
