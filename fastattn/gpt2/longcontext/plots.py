"""The plot of a search. Imports matplotlib, and is imported only to draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fastattn.gpt2.longcontext.result import times_longer

# Okabe and Ito's colours, told apart by colour-blind eyes; marker and dash say the same once more.
LOOK: Final[dict[str, dict[str, Any]]] = {
    "standard": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "sdpa": {"color": "#0072B2", "marker": "^", "linestyle": "--"},
    "fastattn": {"color": "#009E73", "marker": "o", "linestyle": "-"},
    "fastattn+checkpoint": {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    "standard+checkpoint": {"color": "#E69F00", "marker": "v", "linestyle": ":"},
    "sdpa+checkpoint": {"color": "#56B4E9", "marker": "<", "linestyle": ":"},
    "attention": {"color": "#56B4E9", "marker": "P", "linestyle": "-"},
    "attention+checkpoint": {"color": "#7F7F7F", "marker": "X", "linestyle": "-."},
}

_COLORS: Final = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: Final = "s^oDv<"


def write_plot(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw the longest contexts as bars and the memory by context; returns the file, if any."""
    figure = draw(result)
    if figure is None:
        return []
    figure.savefig(path, dpi=130)
    return [path]


def draw(result: Mapping[str, Any]) -> Figure | None:
    """The figure, or None where nothing trained."""
    if not any(row["longest"] for row in result["implementations"].values()):
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _bars(left, result)
    _curves(right, result)
    settings = result["settings"]
    figure.suptitle(
        f"{result['model']['title']}, batch 1, {settings['dtype']}, dropout {settings['dropout']:g}, "
        f"{settings['memory'] / 2**30:g} GiB, {_where(result)}"
    )
    return figure


def _where(result: Mapping[str, Any]) -> str:
    machine, day = result["machine"], str(result["started"])[:10]
    return f"{machine['gpu'] or machine['cpu']}, torch {result['versions']['torch']}, {day}"


def _bars(axes: Axes, result: Mapping[str, Any]) -> None:
    rows = {name: row for name, row in result["implementations"].items() if row["longest"]}
    for i, (name, row) in enumerate(rows.items()):
        axes.barh(i, row["longest"], height=0.62, color=LOOK[name]["color"])
        if row["edge"] == "extrapolated" and (row["predicted"] or 0) > row["longest"]:
            width = row["predicted"] - row["longest"]
            axes.barh(
                i,
                width,
                left=row["longest"],
                height=0.62,
                fill=False,
                hatch="//",
                edgecolor=LOOK[name]["color"],
            )
        ratio = times_longer(result, name)
        text = f"{row['longest']:,}" + ("" if ratio in (None, 1.0) else f"  ({ratio:.1f}×)")
        end = max(row["longest"], row["predicted"] or 0) if row["edge"] == "extrapolated" else row["longest"]
        axes.annotate(text, (end, i), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("tokens")
    hatched = any(row["edge"] == "extrapolated" for row in rows.values())
    axes.set_title(
        "longest context that trained" + ("\nhatched: by the fit, not run" if hatched else ""), fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, result: Mapping[str, Any]) -> None:
    contexts = set()
    for name in result["implementations"]:
        own = {
            point["context"]: point["peak_bytes"] / 1e9
            for point in result["points"]
            if point["implementation"] == name and point["status"] == "trained"
        }
        if own:
            contexts |= set(own)
            axes.plot(list(own), list(own.values()), **LOOK[name], label=name, linewidth=2, markersize=6)
    budget = result["settings"]["memory"] / 1e9
    axes.axhline(budget, color="black", linewidth=1, linestyle=":", label="budget")
    axes.set_xscale("log", base=2)
    low, high = axes.get_ylim()
    if high > 4 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    octaves = [2**i for i in range(4, 21) if min(contexts) <= 2**i <= max(contexts)]
    axes.set_xticks(octaves, [f"{t // 1024}k" if t >= 1024 else str(t) for t in octaves])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("peak memory of a step, GB")
    axes.set_title("every step that was run", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)


def draw_quality(result: Mapping[str, Any]) -> Figure:
    """Held-out loss: at the end by context, and over the tokens that were trained on."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    rows = result["rows"]
    figure.suptitle(f"held-out loss by context, the same tokens, one seed, {_where(result)}")
    contexts = [row["context"] for row in rows]
    left.plot(contexts, [row["held_out_loss"] for row in rows], color="#009E73", marker="o", linewidth=2)
    for row in rows:
        place = (row["context"], row["held_out_loss"])
        left.annotate(f"{row['held_out_loss']:.3f}", place, (0, 7), textcoords="offset points", ha="center")
    left.set_xscale("log", base=2)
    left.set_xticks(contexts, [f"{t // 1024}k" if t >= 1024 else str(t) for t in contexts])
    left.xaxis.set_minor_locator(NullLocator())
    left.margins(0.12, 0.18)
    left.set_xlabel("context, tokens")
    left.set_ylabel("held-out loss, nats a token")
    left.set_title("at the end", fontsize=10)
    for row, color, marker in zip(rows, _COLORS * len(rows), _MARKERS * len(rows), strict=False):
        tokens, losses = [int(t) for t in row["held_out"]], list(row["held_out"].values())
        right.plot(tokens, losses, color=color, marker=marker, linewidth=2, label=f"{row['context']:,}")
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    right.set_xlabel("tokens trained on")
    right.set_title("on the way, by context", fontsize=10)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(True, alpha=0.25)
    return figure
