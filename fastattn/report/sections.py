"""What the report says, in order: each section a title, words, figures and tables. Imports matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fastattn.gpt2.compare import plots as compare_plots
from fastattn.gpt2.longcontext import plots as longcontext_plots
from fastattn.report import figures, tables
from fastattn.report.features import SOURCES
from fastattn.report.look import styled
from fastattn.report.rows import CEILINGS, OURS, Found, Row, speedups
from fastattn.report.tables import Table


class Picture(NamedTuple):
    """A figure, its name as a file, and what it shows, for those who do not see it."""

    name: str
    label: str
    figure: Figure


@dataclass
class Section:
    """A part of the report.

    Attributes:
        name: of its anchor.
        title: of its heading.
        words: paragraphs before its figures.
        pictures: its figures.
        tables: a caption and a table each.
        folded: the tables are shown on demand only.
    """

    name: str
    title: str
    words: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    folded: bool = False

    def __bool__(self) -> bool:
        return bool(self.pictures or any(table.lines for _, table in self.tables))


class Headline(NamedTuple):
    """A number to be seen first, and what it is of."""

    number: str
    what: str


def sections(found: Found) -> list[Section]:
    """The parts for which something was measured."""
    parts = [
        _speed(found.rows),
        _peers(found.rows),
        _ceiling(found.rows),
        _memory(found.rows),
        _training(found),
        _longest(found.results),
        _quality(found.results),
        Section("features", "What each can do", [SOURCES], tables=[("", tables.features())]),
        Section(
            "rows", "Every problem's last measurement", tables=[("", tables.every(found.rows))], folded=True
        ),
    ]
    return [part for part in parts if part]


def headlines(found: Found) -> list[Headline]:
    """A few numbers, each a median of what was measured or a largest that was run."""
    made = []
    ratios: dict[tuple[str, str], list[float]] = {}
    for ours, peer, ratio in speedups(found.rows):
        if peer.implementation in ("sdpa", "standard", "naive", "eager", "transformers"):
            ratios.setdefault((ours.op, peer.implementation), []).append(ratio)
    for (op, who), own in sorted(ratios.items()):
        what = {"gpt2": "training step of GPT-2", "decode": "decoding"}.get(op, op)
        made.append(
            Headline(
                f"{statistics.median(own):.1f}×", f"{what} faster than {who}, median of {len(own)} problems"
            )
        )
    for result in _searches(found.results):
        rows = result["implementations"]
        known = [
            (row["longest"], name) for name, row in rows.items() if row["longest"] and name.startswith(OURS)
        ]
        if known:
            longest, name = max(known)
            budget = result["settings"]["memory"] / 2**30
            made.append(
                Headline(
                    f"{longest:,}",
                    f"tokens of context train in {budget:g} GiB, {name}, {result['model']['title']}",
                )
            )
    return made


def _last(results: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [result for result in results if result["kind"] == kind][-1:]


def _figure(section: Section, name: str, label: str, figure: Figure | None) -> None:
    if figure is not None:
        section.pictures.append(Picture(name, label, figure))


def _places(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """By machine and dtype; the instruction set is that of our row of the run."""
    isas = {row.run: row.isa for row in rows if row.implementation == OURS}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        isa = isas.get(row.run, row.isa)
        found.setdefault((f"{row.processor}{', ' + isa if isa else ''}", row.dtype), []).append(row)
    return found


def _machines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By machine, whatever the dtype."""
    found: dict[str, list[Row]] = {}
    for (place, _), own in _places(tuple(rows)).items():
        found.setdefault(place, []).extend(own)
    return found


def _speed(rows: Iterable[Row]) -> Section:
    section = Section(
        "speed",
        "Speed by length",
        [
            "Floating-point operations of the mathematics a second: what a mask hides is not counted. Up is "
            "better. Bands: the 20th to the 80th percentile of the rounds."
        ],
    )
    ops = sorted({row.op for row in rows if row.op not in ("gpt2", "ceiling")})
    for op in ops:
        for (place, dtype), own in _places([row for row in rows if row.op == op]).items():
            figure = styled(partial(figures.speed_by_length, own))
            if figure is not None:
                figure.suptitle(f"{op}, {dtype}, {place}", fontsize=10)
                _figure(
                    section,
                    f"speed-{len(section.pictures)}",
                    f"Speed by length: {op}, {dtype}, {place}",
                    figure,
                )
    return section


def _peers(rows: tuple[Row, ...]) -> Section:
    section = Section("peers", "Beside each peer", tables=[("", tables.peers(rows))], folded=True)
    for place, own in _machines(rows).items():
        figure = styled(partial(figures.speedup_by_peer, own))
        if figure is not None:
            figure.suptitle(place, fontsize=10)
        _figure(section, f"peers-{len(section.pictures)}", f"Speed-up over each peer, {place}", figure)
    return section


def _ceiling(rows: Iterable[Row]) -> Section:
    section = Section(
        "ceiling",
        "How near to what the machine can do",
        [
            "Ours over what was measured in the same run: blue, the multiply-adds of all threads; orange, a "
            "copy's bytes a second. A dot a length, larger for longer; the share told is that of the longest."
        ],
    )
    for place, own in _machines(rows).items():
        figure = styled(partial(figures.share_of_ceiling, own))
        if figure is not None:
            figure.suptitle(place, fontsize=10)
        _figure(section, f"ceiling-{len(section.pictures)}", f"Share of the ceiling, {place}", figure)
    return section


def _memory(rows: Iterable[Row]) -> Section:
    section = Section("memory", "Memory by length", ["What a fresh process holds at most beyond the inputs."])
    kept = [row for row in rows if row.implementation not in CEILINGS]
    _figure(section, "memory", "Peak memory by length", styled(partial(figures.memory_by_length, kept)))
    return section


def _training(found: Found) -> Section:
    section = Section(
        "training",
        "Training GPT-2",
        [
            "Peak memory is the whole process's. MFU: the model's floating-point operations, recomputation "
            "not counted, over the multiply-adds of all threads of this machine as probed beside the rows; "
            "blank where none was."
        ],
        tables=[("", tables.training(found.rows, found.results))],
    )
    _figure(section, "steps", "Time of a training step", styled(partial(figures.training_steps, found.rows)))
    for result in _last(
        [r for r in found.results if r["kind"] != "compare" or r["parity"]["steps"]], "compare"
    ):
        section.words.append(f"fastattn compare gpt2: {result['verdict']}")
        _figure(
            section, "loss", "Losses on the same batches", styled(partial(compare_plots.draw_loss, result))
        )
    for result in _last(found.results, "training"):
        section.words.append(f"fastattn compare training: {result['verdict']}")
        _figure(
            section, "seeds", "Held-out losses over seeds", styled(partial(compare_plots.draw_seeds, result))
        )
    return section


def _longest(results: Iterable[Mapping[str, Any]]) -> Section:
    section = Section("longest", "The longest context that trains")
    for i, result in enumerate(_searches(results)):
        section.words.append(result["verdict"])
        made = f"torch {result['versions']['torch']}, {str(result['started'])[:10]}"
        section.tables.append((f"{_search_title(result)}; {made}", tables.longest(result)))
        _figure(
            section,
            f"longest-{i}",
            "Longest context and memory",
            styled(partial(longcontext_plots.draw, result)),
        )
    return section


def _searches(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last search of each kind: what differs in its settings is another question."""
    last = {_search_title(result): result for result in results if result["kind"] == "longcontext"}
    return list(last.values())


def _search_title(result: Mapping[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    return (
        f"{result['model']['title']}, {settings['memory'] / 2**30:g} GiB, {settings['dtype']}, "
        f"dropout {settings['dropout']:g}, {settings['positions']} positions, "
        f"{machine['gpu'] or machine['cpu']}"
    )


def _quality(results: Iterable[Mapping[str, Any]]) -> Section:
    section = Section("quality", "What a longer context is good for")
    for result in _last(results, "quality"):
        section.words.append(result["verdict"])
        figure = styled(partial(longcontext_plots.draw_quality, result))
        _figure(section, "quality", "Held-out loss by context", figure)
    return section
