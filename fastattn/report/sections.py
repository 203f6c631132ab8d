"""What the report says, in order: each section a title, words, figures and tables. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from matplotlib.figure import Figure

from fastattn.gpt2.compare import plots as compare_plots
from fastattn.gpt2.longcontext import plots as longcontext_plots
from fastattn.report import figures, tables
from fastattn.report.features import SOURCES
from fastattn.report.look import styled
from fastattn.report.rows import OURS, Found, Row, grouped, races
from fastattn.report.tables import Table

_Draw: TypeAlias = Callable[[Sequence[Row]], "Figure | None"]


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
    """A number to be seen first, what it is of, and under which conditions."""

    number: str
    of: str
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


# A headline's problem: what is whole comes first, then a forward pass.
_PASSES: Final = {"both": 2, "step": 2, "forward": 1}


def headlines(found: Found) -> list[Headline]:
    """For each operation a problem beside the fastest of its peers, and the longest contexts that trained."""
    made = []
    contests: dict[tuple[str, str], list[tuple[Row, list[Row]]]] = {}
    for ours, peers in races(found.rows):
        if ours.op != "launch":
            contests.setdefault((ours.machine.device, ours.op), []).append((ours, peers))
    for _, own in sorted(contests.items()):
        ours, peers = max(own, key=lambda race: _headline_rank(race[0]))
        best = min(peers, key=lambda row: row.p50_ms or 0.0)
        ratio = (best.p50_ms or 0.0) / (ours.p50_ms or 1.0)
        length = f"{ours.length:,} tokens" if ours.length else ""
        who = ours.implementation if ours.implementation != OURS else ""
        words = (who, ours.title, length, ours.dtype, str(ours.machine))
        of = f", the fastest of {len(peers)} peers" if len(peers) > 1 else ""
        what = f"over {best.name}{of}: {', '.join(word for word in words if word)}"
        made.append(Headline(f"{ratio:.2f}×", f"{ours.op}, {figures.pass_name(ours.passes)}", what))
    for result in _searches(found.results):
        rows = result["implementations"]
        known = [
            (row["longest"], name) for name, row in rows.items() if row["longest"] and name.startswith(OURS)
        ]
        if known:
            longest, name = max(known)
            made.append(Headline(f"{longest:,}", "tokens of context", f"{name}: {_search_title(result)}"))
    return made


def _headline_rank(ours: Row) -> tuple[Any, ...]:
    """By what was asked, never by how fast it was: the usual dtype and pass, plain, the last run, longest."""
    plain = ours.op != "attention" or (ours.mask == "causal" and not ours.case)
    usual = ours.dtype == ("bfloat16" if ours.machine.device == "cuda" else "float32")
    heads = int(ours.heads.partition(":")[0] or 0)
    size = (ours.length or 0, ours.batch, heads, ours.head_dim or 0, ours.case)
    return (ours.implementation == OURS, usual, _PASSES.get(ours.passes, 0), plain, ours.date, *size)


def _last(results: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [result for result in results if result["kind"] == kind][-1:]


def _figure(section: Section, name: str, label: str, figure: Figure | None) -> None:
    if figure is not None:
        section.pictures.append(Picture(name, label, figure))


def _kinds(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by operation, pass, dtype and machine, with that as a title."""
    kept = [row for row in rows if row.op not in ("gpt2", "ceiling", "launch")]
    groups = grouped(
        kept, lambda row: (row.op, str(row.machine), row.dtype, figures.pass_order(row.passes), row.passes)
    )
    return [
        (f"{op}, {figures.pass_name(passes)}, {dtype}, {machine}", groups[op, machine, dtype, place, passes])
        for op, machine, dtype, place, passes in sorted(groups)
    ]


def _machines(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    return sorted(grouped(rows, lambda row: str(row.machine)).items())


def _by_length(section: Section, rows: Iterable[Row], draw: _Draw, what: str) -> Section:
    """The section with a figure for each kind of rows that has something to show by length."""
    for title, own in _kinds(rows):
        _titled(section, draw, own, what, title)
    return section


def _titled(section: Section, draw: _Draw, rows: Sequence[Row], what: str, title: str) -> None:
    figure = styled(partial(draw, rows))
    if figure is not None:
        figure.suptitle(title, fontsize=10)
    _figure(section, f"{section.name}-{len(section.pictures)}", f"{what}: {title}", figure)


def _speed(rows: Iterable[Row]) -> Section:
    section = Section(
        "speed",
        "Speed by length",
        [
            "Floating-point operations of the mathematics a second: what a mask hides is not counted. Of "
            "what is nearer to the memory's limit, bytes that have to be moved. Up is better. Bands: the "
            "20th to the 80th percentile of the rounds."
        ],
    )
    return _by_length(section, rows, figures.speed_by_length, "Speed by length")


def _peers(rows: tuple[Row, ...]) -> Section:
    section = Section(
        "peers",
        "Beside each peer",
        ["Each peer's median over ours of the same race: both took turns on the same problem."],
        tables=[("", tables.peers(rows))],
        folded=True,
    )
    for machine, own in _machines(rows):
        _titled(section, figures.speedup_by_peer, own, "Speed-up over each peer", machine)
    return section


def _ceiling(rows: Iterable[Row]) -> Section:
    section = Section(
        "ceiling",
        "How near to what the machine can do",
        [
            "Ours over what the machine was measured to do in the same run. A dot a length, larger for "
            "longer; the share told is that of the longest."
        ],
    )
    for machine, own in _machines(rows):
        _titled(section, figures.share_of_ceiling, own, "Share of the ceiling", machine)
    return section


def _memory(rows: Iterable[Row]) -> Section:
    section = Section(
        "memory",
        "Memory by length",
        [
            "Held at most beyond the inputs: on a CPU what a fresh process grows by, on a GPU what torch's "
            "allocator has given out."
        ],
    )
    return _by_length(section, rows, figures.memory_by_length, "Peak memory by length")


def _training(found: Found) -> Section:
    section = Section(
        "training",
        "Training GPT-2",
        [
            "Peak memory is the whole process's. MFU: the model's floating-point operations, recomputation "
            "not counted, over the most that the machine did when probed in the same dtype: on a CPU "
            "float32 multiply-adds of all threads, on a GPU a bfloat16 matrix product; blank where none was "
            "probed. Over standard: where both took turns."
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
