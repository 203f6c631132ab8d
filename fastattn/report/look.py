"""How the report's figures look, and how they become part of a page. Imports matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind eyes. Ours is the same everywhere.
GREEN: Final = "#009E73"
COLORS: Final = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS: Final = ("^", "s", "D", "v", "P", "X", "<")
_DASHES: Final = ("--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)))
# What a name is first given, so that it looks the same from figure to figure.
_NAMED: Final = {
    **dict.fromkeys(("sdpa", "sdpa default"), 0),
    **dict.fromkeys(("standard", "naive", "eager", "torch"), 1),
    **dict.fromkeys(("compiled", "naive compiled", "torch compiled", "torch.compile"), 2),
    **{"fastattn.optimize": 3, "attention": 4},
}
INK: Final = "#1b1f24"  # becomes the page's own text colour in SVG
_PIXELS: Final = 98  # an inch of a figure, on the page
_GRID: Final = "#8c959f"
_STYLE: Final[dict[str, Any]] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": _GRID,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.size": 9,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "savefig.facecolor": "none",
}


def styled(draw: Callable[[], Figure | None]) -> Figure | None:
    """The figure that `draw` makes, in the report's style."""
    with mpl.rc_context(_STYLE):
        return draw()


def look_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash for each implementation; ours are green, and no two of the others are alike."""
    looks: dict[str, dict[str, Any]] = {}
    taken: set[int] = set()
    for name in sorted(names, key=lambda name: name not in _NAMED):
        if name == "fastattn":
            looks[name] = {"color": GREEN, "marker": "o", "linestyle": "-", "zorder": 3}
            continue
        wanted = _NAMED.get(name)
        free = wanted is not None and wanted not in taken
        index = wanted if wanted is not None and free else next(i for i in count() if i not in taken)
        taken.add(index)
        looks[name] = {
            "color": COLORS[index % len(COLORS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _DASHES[index // len(COLORS) % len(_DASHES)],
            "zorder": 2,
        }
    return looks


def lengths_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of tokens with a tick at each power of two that was measured."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if tick & (tick - 1) == 0]
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def plain_numbers(axes: Axes) -> None:
    """``0.5``, ``2``, ``1,000`` beside the y axis, whatever its scale."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def tokens(count: int) -> str:
    """``4k`` for 4,096 and so on.

    Example:
        >>> tokens(512), tokens(4096), tokens(1000)
        ('512', '4k', '1,000')
    """
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


End = tuple[float, float, str, str]  # x, y, name, colour


def label_ends(figure: Figure, labels: Sequence[tuple[Axes, Sequence[End]]], size: float = 8) -> None:
    """Names in a column to the right of the curves' ends, moved apart where they would overlap.

    Args:
        figure: all of it drawn but for these names; its layout is made here.
        labels: the ends of each axes.
        size: of the text.
    """
    for axes, ends in labels:
        left, right = axes.get_xlim()
        widest = max((len(name) for _, _, name, _ in ends), default=0)
        share = min(0.6, 0.08 + 0.0078 * size * widest / (_width_inches(axes) - 0.45))
        if axes.get_xscale() == "log":
            axes.set_xlim(left, left * (right / left) ** (1 / (1 - share)))
        else:
            axes.set_xlim(left, left + (right - left) / (1 - share))
    figure.draw_without_rendering()
    step = size * 1.2 * figure.dpi / 72
    for axes, ends in labels:
        places = [(*axes.transData.transform(end[:2]), end) for end in ends]
        column, high = max((x for x, _, _ in places), default=0.0), -math.inf
        for x, y, end in sorted(places, key=lambda place: place[1]):
            high = max(y, high + step)
            axes.annotate(
                end[2],
                end[:2],
                ((column - x) * 72 / figure.dpi + 8, (high - y) * 72 / figure.dpi),
                textcoords="offset points",
                color=end[3],
                fontsize=size,
                va="center",
                annotation_clip=False,
                arrowprops={
                    **{"arrowstyle": "-", "color": end[3], "alpha": 0.6, "linewidth": 0.8, "linestyle": ":"},
                    **{"shrinkA": 0, "shrinkB": 4},
                },
            )


def _width_inches(axes: Axes) -> float:
    figure, spec = axes.get_figure(root=True), axes.get_subplotspec()
    columns = 1 if spec is None else spec.get_gridspec().ncols
    return 3.5 if figure is None else float(figure.get_size_inches()[0]) / columns


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of an HTML page; its ink is the page's text colour, light or dark.

    Args:
        figure: drawn within `styled`.
        name: unlike that of every other figure of the page.
        label: for those who do not see it.
    """
    text = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(rf"{INK}|#000000|\bblack\b", "currentColor", body)
    # text without a fill of its own is black
    body = re.sub(r'(<text\b[^>]*style=")', r"\1fill: currentColor; ", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", body)
    body = re.sub(r'(id|xlink:href|href)="(#?)', rf'\1="\2{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    # The dark colours of the palette have a lighter twin on a dark page.
    body = re.sub("#(0072b2|7f7f7f)", r"var(--c\1, #\1)", body, flags=re.IGNORECASE)
    width = figure.get_size_inches()[0] * _PIXELS
    opening = f'<svg role="img" aria-label="{label}" style="max-width: {width:.0f}px" '
    return opening + re.sub(r' (width|height)="[\d.]+pt"', "", body[len("<svg") :], count=2)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure on white."""
    content = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(content, format="png", dpi=dpi, facecolor="white")
    return content.getvalue()
