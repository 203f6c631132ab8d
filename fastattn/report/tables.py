"""The report's tables: lists of cells, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from fastattn.gpt2.config import SIZES, GPT2Config
from fastattn.gpt2.longcontext.result import times_longer
from fastattn.report.features import SYSTEMS, TABLE
from fastattn.report.rows import OURS, STANDARD, Machine, Row, grouped, is_ours, latest, speedups


class Table(NamedTuple):
    """A head, lines of as many cells, and the lines that are ours, for emphasis."""

    head: list[str]
    lines: list[list[str]]
    ours: frozenset[int] = frozenset()


def training(rows: Sequence[Row], results: Iterable[Mapping[str, Any]]) -> Table:
    """Training steps of GPT-2: of rows, and of `fastattn compare gpt2`."""
    ceilings = fma_ceilings(rows)
    steps: list[_Step] = []
    last = [row for row in latest(rows) if row.op == "gpt2" and row.length]
    for own in grouped(last, lambda row: (row.run, row.race, row.machine, row.problem)).values():
        base = next((row.p50_ms for row in own if row.race and row.implementation in STANDARD), None)
        for row in own:
            tokens, ms = row.batch * (row.length or 0), row.p50_ms or 0.0
            rate = row.gflops
            if rate is None and row.model:
                rate = step_flops(SIZES[row.model], row.batch, row.length or 0) / ms / 1e6
            steps.append(
                _Step(
                    *(row.case, f"{row.batch} × {row.length:,}", row.dtype, str(row.machine)),
                    *(row.name, ms, 1000 * tokens / ms, row.peak_mb),
                    base=base,
                    mfu=_share(rate, ceiling_of(ceilings, row.machine, row.dtype)),
                )
            )
    for result in results:
        if result["kind"] == "compare":
            steps += _compared(result, ceilings)
    steps.sort(key=lambda step: (*step[:4], -step.ms))
    lines = [
        [
            *step[:5],
            f"{step.ms / 1000:,.2f}",
            f"{step.rate:,.0f}",
            "" if step.mfu is None else f"{100 * step.mfu:.0f} %",
            "" if step.peak_mb is None else f"{step.peak_mb / 1000:.2f}",
            "" if step.base is None else f"{step.base / step.ms:.2f}×",
        ]
        for step in steps
    ]
    marked = frozenset(i for i, step in enumerate(steps) if is_ours(step.who))
    head = ["model", "batch × context", "dtype", "machine", "by", "s a step", "tokens/s", "MFU"]
    return Table([*head, "peak GB", "over standard"], lines, marked)


class _Step(NamedTuple):
    """A line of the training table."""

    model: str
    tokens: str
    dtype: str
    machine: str
    who: str
    ms: float
    rate: float
    peak_mb: float | None
    base: float | None
    mfu: float | None


def _compared(result: Mapping[str, Any], ceilings: Mapping[_Place, float]) -> list[_Step]:
    """The timed steps of `fastattn compare gpt2`."""
    settings, model, where = result["settings"], result["model"], result["machine"]
    sizes = {name: model[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    flops = step_flops(GPT2Config(**sizes), settings["batch"], settings["context"])
    cuda = where["gpu"] is not None
    machine = Machine(
        "cuda" if cuda else "cpu",
        where["gpu"] or where["cpu"],
        "" if cuda else str(where["isa"] or "").lower(),
        None if cuda else where["threads"],
    )
    ceiling = ceiling_of(ceilings, machine, settings["dtype"])
    return [
        _Step(
            f"{model['title']}, dropout {settings['dropout']:g} (compare)",
            f"{settings['batch']} × {settings['context']:,}",
            settings["dtype"],
            str(machine),
            name,
            row["median_ms"],
            row["tokens_per_second"],
            row["peak_bytes"] / 1e6,
            base=result["train"].get(result["baseline"], {}).get("median_ms"),
            mfu=_share(flops / row["median_ms"] / 1e6, ceiling),
        )
        for name, row in result["train"].items()
    ]


def _share(rate: float | None, ceiling: float | None) -> float | None:
    return rate / ceiling if rate and ceiling else None


_Place: TypeAlias = tuple[Machine, str]  # and a dtype


def fma_ceilings(rows: Iterable[Row]) -> dict[_Place, float]:
    """Of each machine and dtype: the most floating-point operations, 10^9 a second.

    The median of what was probed beside the rows: of a CPU in float32, of a GPU in bfloat16.
    """
    found: dict[_Place, list[float]] = {}
    for row in rows:
        probed = (row.ceiling, row.dtype) in (("fma", "float32"), ("matmul", "bfloat16"))
        if row.gflops and (row.op == "ceiling" or (probed and row.share)):
            found.setdefault((row.machine, row.dtype), []).append(row.gflops / (row.share or 1.0))
    return {place: statistics.median(values) for place, values in found.items()}


def ceiling_of(ceilings: Mapping[_Place, float], machine: Machine, dtype: str) -> float | None:
    """The machine's; where its row does not say the instruction set or the threads, the largest that fits."""
    fits = [
        value
        for (other, of), value in ceilings.items()
        if of == dtype
        and other[:2] == machine[:2]
        and (not machine.isa or other.isa in ("", machine.isa))
        and (machine.threads is None or other.threads == machine.threads)
    ]
    return max(fits, default=None)


def step_flops(config: GPT2Config, batch: int, length: int) -> float:
    """Floating-point operations of a GPT-2 step: six for each weight of a matrix product and token.

    And 6 L T² C for causal attention: half of what all pairs take.

    Example:
        >>> f"{step_flops(GPT2Config(), 1, 1024):.3g}"
        '8.17e+11'
    """
    weights = config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)
    return batch * (6.0 * weights * length + 6.0 * config.n_layer * length**2 * config.n_embd)


def _edge(row: Mapping[str, Any]) -> str:
    """How the longest context is known to be that."""
    if row["edge"] == "run" and row["refused"] is None:
        return "none longer asked for"
    return {"run": "run", "extrapolated": "not reached", "none": ""}[row["edge"]]


def longest(result: Mapping[str, Any]) -> Table:
    """Of `fastattn longcontext`."""
    lines: list[list[str]] = []
    marked: set[int] = set()
    for i, (name, row) in enumerate(result["implementations"].items()):
        if is_ours(name.partition("+")[0]):
            marked.add(i)
        ratio = times_longer(result, name)
        peaks = {t: at["measured"].get(name) for t, at in result["memory_at"].items()}
        lines.append(
            [
                name,
                f"{row['longest']:,}" if row["longest"] else "none",
                "" if ratio is None else f"{ratio:.1f}×",
                _edge(row),
                f"{row['predicted']:,}" if row["predicted"] else "",
                f"{row['ms'] / 1000:,.0f}" if row["ms"] else "",
                f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "",
                *("" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks.values()),
            ]
        )
    head = ["", "longest context run", "over standard", "edge", "by the fit", "s a step", "peak GB"]
    return Table([*head, *(f"GB at {int(t):,}" for t in result["memory_at"])], lines, frozenset(marked))


def features() -> Table:
    """What each system can do."""
    return Table(["", *SYSTEMS], [[row.name, *row.cells] for row in TABLE])


def peers(rows: Iterable[Row]) -> Table:
    """For each operation, pass, dtype and peer: its problems, the least, median and largest speed-up."""
    groups: dict[tuple[str, str, str, str, str], list[float]] = {}
    for ours, peer, ratio in speedups(rows):
        key = (ours.op, ours.passes, ours.dtype, peer.name, str(ours.machine))
        groups.setdefault(key, []).append(ratio)
    lines = [
        [*key, str(len(own)), f"{min(own):.2f}×", f"{statistics.median(own):.2f}×", f"{max(own):.2f}×"]
        for key, own in sorted(groups.items())
    ]
    head = ["operation", "pass", "dtype", "peer", "machine"]
    return Table([*head, "problems", "least", "median", "most"], lines)


def every(rows: Sequence[Row]) -> Table:
    """Each problem's last measurement: of time, and of memory where that was measured by itself."""
    timed = latest(rows)
    alone = [row for row in latest(rows, "peak_mb") if row.p50_ms is None]
    ordered = sorted(
        [*timed, *alone],
        key=lambda row: (row.op, str(row.machine), row.passes, row.dtype, row.title, row.length or 0),
    )
    lines = [
        [
            row.op,
            row.passes,
            row.dtype,
            "" if row.length is None else f"{row.length:,}",
            row.title,
            str(row.machine),
            row.implementation,
            row.kernel,
            *(_milliseconds(ms) for ms in (row.p20_ms, row.p50_ms, row.p80_ms)),
            "" if row.gflops is None else f"{row.gflops:,.0f}",
            "" if row.gb_per_s is None else f"{row.gb_per_s:,.1f}",
            "" if row.share is None else f"{100 * row.share:.0f} %",
            "" if row.peak_mb is None else f"{row.peak_mb:,.1f}",
        ]
        for row in ordered
    ]
    marked = frozenset(i for i, row in enumerate(ordered) if row.implementation == OURS)
    head = [
        "op",
        "pass",
        "dtype",
        "length",
        "problem",
        "machine",
        "by",
        "kernel",
        "p20 ms",
        "p50 ms",
        "p80 ms",
    ]
    return Table([*head, "GFLOP/s", "GB/s", "of ceiling", "peak MB"], lines, marked)


def _milliseconds(ms: float | None) -> str:
    return "" if ms is None else f"{ms:,.3g}" if ms < 100 else f"{ms:,.0f}"
