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
    MARKERS,
    End,
    label_ends,
    lengths_axis,
    look_of,
    plain_numbers,
    tokens,
)
from fastattn.report.rows import OURS, Row, latest, speedups

_PASSES: Final = ("forward", "backward", "both", "step")
_PASS_NAMES: Final = {"both": "forward + backward", "step": "training step"}
_MOST_PANELS: Final = 12


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
    keys = sorted(panels, key=lambda key: (_PASSES.index(key[0]), key[1] or 0, key[2], key[3]))[:_MOST_PANELS]
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
        dim = f", d {head_dim}" if head_dim else ""
        axes.set_title(f"{pass_name(passes)}{dim}, {_mask_name(mask)}{more}")
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("GFLOP/s")
    label_ends(figure, labels)
    return figure


def _columns(panels: int) -> int:
    """So that few places of the grid stay empty."""
    return panels if panels < 3 else 2 if panels == 4 else 3


def _mask_name(mask: str) -> str:
    return "no mask" if mask in ("", "none") else mask


def _speed_panel(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], looks: Mapping[str, Mapping[str, Any]]
) -> list[End]:
    ends: list[End] = []
    for name in names:
        own = sorted((row for row in rows if row.implementation == name), key=lambda row: row.length or 0)
        if not own:
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
    keys = sorted(groups, key=lambda key: (key[0], key[1], _PASSES.index(key[2])))
    figure = Figure(figsize=(11, 0.9 + 0.29 * len(keys)), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(_PASSES, (COLORS[0], COLORS[2], GREEN, COLORS[3]), strict=True))
    for i, key in enumerate(keys):
        ratios = sorted(groups[key])
        middle = statistics.median(ratios)
        axes.plot([ratios[0], ratios[-1]], [i, i], color=colors[key[2]], linewidth=1.2, alpha=0.5)
        axes.plot(ratios, [i] * len(ratios), "o", color=colors[key[2]], markersize=4.5, alpha=0.6)
        axes.plot([middle], [i], "|", color=INK, markersize=14, markeredgewidth=2)
        count = f"  (of {len(ratios)})" if len(ratios) > 1 else ""
        axes.annotate(
            f"{middle:.2f}×{count}", (max(ratios[-1], 1), i), (10, 0), textcoords="offset points", va="center"
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
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000, 10_000, 100_000)
        if low <= t <= high
    ]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def share_of_ceiling(rows: Sequence[Row]) -> Figure | None:
    """How much of what the machine can do at most is reached, by length; a line for each kind of problem."""
    lines: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for row in latest(rows):
        if row.implementation == OURS and row.share and row.length:
            group = lines.setdefault((row.op, row.ceiling), {})
            dim = f", d {row.head_dim}" if row.head_dim else ""
            name = f"{pass_name(row.passes)}{dim}, {_mask_name(row.mask)}"
            group.setdefault(name, {}).setdefault(row.length, []).append(row.share)
    lines = {key: {n: p for n, p in own.items() if len(p) > 1} for key, own in lines.items()}
    lines = {key: own for key, own in lines.items() if own}
    if not lines:
        return None
    figure = Figure(figsize=(6 if len(lines) == 1 else 11, 3.4), layout="constrained")
    labels: list[tuple[Axes, list[End]]] = []
    for axes, ((op, ceiling), group) in zip(
        figure.subplots(1, len(lines), squeeze=False)[0], sorted(lines.items()), strict=True
    ):
        ends: list[End] = []
        kept = sorted(group.items(), key=lambda item: (-len(item[1]), item[0]))[: len(COLORS) + 1]
        looks = [*zip(COLORS, MARKERS, strict=True), (GREEN, "o")]
        for (name, points), (color, marker) in zip(kept, looks, strict=False):
            xs = sorted(points)
            ys = [100 * statistics.median(points[x]) for x in xs]
            axes.plot(xs, ys, color=color, marker=marker)
            ends.append((xs[-1], ys[-1], name, color))
        lengths_axis(axes, [x for points in group.values() for x in points])
        axes.set_ylim(0, 105)
        axes.axhline(100, color=INK, linewidth=1)
        labels.append((axes, ends))
        what = {"fma": "multiply-adds of all threads", "copy": "a copy's bytes a second"}.get(
            ceiling, ceiling
        )
        axes.set_title(f"{op}: share of {what}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel("length")
    label_ends(figure, labels)
    return figure


def memory_by_length(rows: Sequence[Row]) -> Figure | None:
    """Peak memory over length, a panel an operation, a line an implementation; no training steps."""
    panels: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for row in latest(rows):
        if row.peak_mb and row.length and row.op != "gpt2":
            where = (row.op, row.passes, f"{_mask_name(row.mask)}, d {row.head_dim}")
            panels.setdefault(where, {}).setdefault(row.implementation, {})[row.length] = row.peak_mb
    panels = {key: own for key, own in panels.items() if len(set().union(*own.values())) > 1}
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
        axes.set_title(f"{key[0]}, {pass_name(key[1])}\n{key[2]}")
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
