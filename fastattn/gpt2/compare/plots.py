"""The plots of a comparison. Imports matplotlib, and is imported only to draw."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito's colours, told apart by colour-blind eyes; marker and dash say the same once more.
_LOOK: Final[dict[str, dict[str, Any]]] = {
    "standard": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "sdpa": {"color": "#0072B2", "marker": "^", "linestyle": "--"},
    "compiled": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "attention": {"color": "#56B4E9", "marker": "D", "linestyle": "-."},
    "fastattn": {"color": "#009E73", "marker": "o", "linestyle": "-"},
}


def write_plots(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw speed.png, memory.png and loss.png; returns the names of those that had something to show."""
    written = []
    for name, draw in (("speed.png", _speed), ("memory.png", _memory), ("loss.png", draw_loss)):
        figure = draw(result)
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            written.append(name)
    return written


def _speed(result: Mapping[str, Any]) -> Figure | None:
    slow = any(row["median_ms"] > 1000 for row in result["train"].values())
    unit, label = (1000.0, "seconds a step") if slow else (1.0, "milliseconds a step")
    return _bars_and_sweep(result, "ms", unit, label, "median_ms")


def _memory(result: Mapping[str, Any]) -> Figure | None:
    return _bars_and_sweep(result, "peak_bytes", 1e9, "peak memory, GB", "peak_bytes")


def _bars_and_sweep(
    result: Mapping[str, Any], field: str, unit: float, label: str, bar: str
) -> Figure | None:
    """Left the training run as bars, right the sweep as lines over the context."""
    rows = result["train"]
    points = [row for row in result["sweep"] if row["status"] in ("measured", "out of memory")]
    if not rows and not points:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5)) if points else (figure.subplots(), None)
    _bars(left, result, field, unit, label, bar)
    if right is not None:
        _lines(right, result, points, field, unit, label)
    figure.suptitle(f"{result['model']['title']}, {result['machine']['gpu'] or result['machine']['cpu']}")
    return figure


def _bars(axes: Axes, result: Mapping[str, Any], field: str, unit: float, label: str, bar: str) -> None:
    rows = result["train"]
    for i, (name, row) in enumerate(rows.items()):
        height = row[bar] / unit
        axes.bar(i, height, width=0.62, color=_LOOK[name]["color"])
        text = f"{height:,.2f}"
        if field == "ms" and name != result["baseline"] and row["speedup"] is not None:
            text += f"\n{row['speedup']:.2f}×"
        top = height
        if field == "ms":
            top = row["max_ms"] / unit
            ends = [[height - row["min_ms"] / unit], [top - height]]
            axes.errorbar(i, height, yerr=ends, color="black", capsize=4, linewidth=1)
        else:
            fixed = (row["peak_bytes"] - row["activation_bytes"]) / unit
            axes.bar(i, fixed, width=0.62, color="black", alpha=0.25)
        axes.annotate(text, (i, top), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(label)
    axes.margins(y=0.18)
    settings = result["settings"]
    subtitle = f"batch {settings['batch']} × {settings['context']:,} tokens, dropout {settings['dropout']}"
    axes.set_title(
        subtitle + ("\nshaded: libraries, weights, gradients, AdamW" if field != "ms" else ""), fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)


def _lines(
    axes: Axes, result: Mapping[str, Any], points: list[dict[str, Any]], field: str, unit: float, label: str
) -> None:
    contexts = sorted({row["context"] for row in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, look in _LOOK.items():
        own = {row["context"]: row for row in points if row["implementation"] == name}
        if not own:
            continue
        measured = {t: row[field] / unit for t, row in own.items() if row["status"] == "measured"}
        axes.plot(list(measured), list(measured.values()), **look, label=name, linewidth=2, markersize=7)
    budget = result["budget"]["device_bytes"] or result["budget"]["memory_bytes"]
    if field == "peak_bytes":
        axes.axhline(budget / unit, color="black", linewidth=1, linestyle=":", label="memory budget")
    _mark_out_of_memory(axes, points)
    axes.set_xticks(contexts, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.set_title("one step at longer contexts (× = out of memory)", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)


def _mark_out_of_memory(axes: Axes, points: list[dict[str, Any]]) -> None:
    """A cross for each, in rows along the top."""
    names = [name for name in _LOOK if any(point["implementation"] == name for point in points)]
    for row, name in enumerate(names):
        for point in points:
            if point["implementation"] == name and point["status"] == "out of memory":
                height = 0.96 - 0.05 * row
                axes.plot(
                    point["context"],
                    height,
                    "x",
                    color=_LOOK[name]["color"],
                    markersize=8,
                    markeredgewidth=2.5,
                    transform=axes.get_xaxis_transform(),
                )


def draw_loss(result: Mapping[str, Any]) -> Figure | None:
    """The curves at dropout 0 on each other, their differences, and the curves with dropout."""
    dropout = result["settings"]["dropout"]
    plain = _curves(result, "parity" if dropout > 0 else "train") if result["parity"]["steps"] else {}
    noisy = _curves(result, "train") if dropout > 0 else {}
    panels = [curves for curves in (plain, noisy) if curves]
    if not panels:
        return None
    figure = Figure(figsize=(11 if plain else 5.5, 4.0), layout="constrained")
    axes = iter(figure.subplots(1, len(panels) + bool(plain), squeeze=False)[0])
    if plain:
        _draw_curves(next(axes), plain, "dropout 0: the same batches and weights")
        _draw_differences(next(axes), plain, result["parity"]["tolerance"], result["baseline"])
    if noisy:
        _draw_curves(next(axes), noisy, f"dropout {dropout}: each with its own random numbers")
    return figure


def _curves(result: Mapping[str, Any], phase: str) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for sample in result["samples"]:
        if sample["phase"] == phase:
            curves.setdefault(sample["implementation"], {})[sample["step"]] = sample["loss"]
    return {name: curves[name] for name in _LOOK if name in curves}


def _draw_curves(axes: Axes, curves: Mapping[str, Mapping[int, float]], title: str) -> None:
    # Wide below narrow, so that curves that coincide all stay visible.
    for (name, curve), width in zip(curves.items(), (10.0, 7.5, 5.0, 3.0, 1.5), strict=False):
        look = {**_LOOK[name], "linestyle": "-"}
        axes.plot(
            list(curve), list(curve.values()), **look, label=name, linewidth=width, markersize=width + 4
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)


def _draw_differences(
    axes: Axes, curves: Mapping[str, Mapping[int, float]], tolerance: float, baseline: str
) -> None:
    base = curves.get(baseline, {})
    for name, curve in curves.items():
        common = [step for step in curve if step in base]
        if name != baseline and common:
            # float32 losses that are equal to the bit are drawn at the bottom of the logarithmic axis
            off = [max(abs(curve[step] - base[step]) / abs(base[step]), 1e-9) for step in common]
            axes.plot(common, off, **_LOOK[name], label=name, linewidth=2)
    axes.axhline(tolerance, color="black", linewidth=1, linestyle=":", label="allowed")
    axes.set_yscale("log")
    axes.set_ylim(5e-10, 10 * tolerance)
    axes.set_xlabel("step")
    axes.set_ylabel(f"relative difference from {baseline}")
    axes.set_title("how far the losses are apart", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)


def draw_seeds(result: Mapping[str, Any]) -> Figure:
    """Held-out losses of all seeds, and how far ours are from the standard's of the same seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    held: dict[str, dict[int, dict[int, float]]] = {}
    for one in result["runs"]:
        name, curve = one["implementation"], {int(step): loss for step, loss in one["held_out"].items()}
        label = None if name in held else name
        # where they are the same, the standard's shows between the dashes of ours
        look = {**_LOOK[name], "marker": "", "linestyle": "--" if name == "fastattn" else "-"}
        left.plot(list(curve), list(curve.values()), **look, label=label, linewidth=1.5, alpha=0.8)
        held.setdefault(name, {})[one["seed"]] = curve
    for marker, (seed, curve) in zip(cycle("osD^vP"), held.get("fastattn", {}).items(), strict=False):
        base = held.get("standard", {}).get(seed, {})
        gaps = {step: loss - base[step] for step, loss in curve.items() if step in base}
        look = {**_LOOK["fastattn"], "marker": marker}
        right.plot(list(gaps), list(gaps.values()), **look, label=f"seed {seed}", linewidth=1.2, alpha=0.8)
    margin = result["settings"]["margin"]
    right.axhspan(-margin, margin, color="black", alpha=0.08, label=f"margin, ±{margin:g}")
    right.axhline(0, color="black", linewidth=1, linestyle=":")
    left.set_ylabel("held-out loss, nats a token")
    left.set_title("every seed", fontsize=10)
    right.set_ylabel("fastattn's less the standard's")
    right.set_title("of the same seed", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(True, alpha=0.25)
        axes.legend(frameon=False)
    return figure
