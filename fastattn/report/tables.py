"""The report's tables: lists of cells, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from fastattn.gpt2.config import GPT2Config, config_of
from fastattn.gpt2.longcontext.result import times_longer
from fastattn.report.features import SYSTEMS, TABLE
from fastattn.report.rows import OURS, Row, is_ours, latest, speedups

_MODELS: Final = ("124M", "355M", "774M", "1558M")


class Table(NamedTuple):
    """A head, lines of as many cells, and the lines that are ours, for emphasis."""

    head: list[str]
    lines: list[list[str]]
    ours: frozenset[int] = frozenset()


def training(rows: Sequence[Row], results: Iterable[Mapping[str, Any]]) -> Table:
    """Training steps of GPT-2: of rows, and of `fastattn compare gpt2`."""
    ceilings = fma_ceilings(rows)
    lines: list[list[str]] = []
    marked: set[int] = set()

    def add(
        model: str,
        length: int,
        name: str,
        ms: float,
        peak: float | None,
        base: float | None,
        mfu: float | None,
    ) -> None:
        if is_ours(name):
            marked.add(len(lines))
        lines.append(
            [
                model,
                f"{length:,}",
                name,
                f"{ms / 1000:,.2f}",
                f"{1000 * length / ms:,.0f}",
                "" if mfu is None else f"{100 * mfu:.0f} %",
                "" if peak is None else f"{peak / 1000:.2f}",
                "" if base is None else f"{base / ms:.2f}×",
            ]
        )

    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in latest(rows):
        if row.op == "gpt2" and row.p50_ms and row.length:
            groups.setdefault((row.case, row.length, row.isa), []).append(row)
    for (case, length, isa), own in sorted(groups.items()):
        base = next((row.p50_ms for row in own if row.implementation in ("standard", "naive")), None)
        place = (own[0].processor, own[0].threads)
        ceiling = ceilings.get((*place, isa)) or ceilings.get((*place, ""))
        for row in sorted(own, key=lambda row: -(row.p50_ms or 0)):
            ms = row.p50_ms or 0.0
            flops = row.gflops or step_gflops(case, length, ms)
            mfu = flops / ceiling if flops and ceiling else None
            add(case + (f", {isa}" if isa else ""), length, row.implementation, ms, row.peak_mb, base, mfu)
    for result in results:
        if result["kind"] != "compare" or not result["train"]:
            continue
        context, settings = result["settings"]["context"], result["settings"]
        dropout = f"dropout {settings['dropout']:g} (compare)"
        title = f"{result['model']['title']}, batch {settings['batch']}, {dropout}"
        base = result["train"].get("standard", {}).get("median_ms")
        for name, row in result["train"].items():
            add(title, context, name, row["median_ms"], row["peak_bytes"] / 1e6, base, None)
    head = ["model", "context", "attention", "s a step", "tokens/s", "MFU", "peak GB", "over standard"]
    return Table(head, lines, frozenset(marked))


def fma_ceilings(rows: Iterable[Row]) -> dict[tuple[str, int | None, str], float]:
    """Of each machine, threads and instruction set: multiply-adds at most, in 10^9 operations a second.

    The median of what was probed beside the rows; the largest of all instruction sets under the name "".
    """
    found: dict[tuple[str, int | None, str], list[float]] = {}
    for row in rows:
        if row.op == "ceiling" and row.implementation == "fma" and row.gflops:
            found.setdefault((row.processor, row.threads, row.isa), []).append(row.gflops)
        elif row.ceiling == "fma" and row.share and row.gflops:
            found.setdefault((row.processor, row.threads, row.isa), []).append(row.gflops / row.share)
    medians = {place: statistics.median(values) for place, values in found.items()}
    for (processor, threads, _), value in list(medians.items()):
        medians[processor, threads, ""] = max(value, medians.get((processor, threads, ""), 0.0))
    return medians


def step_gflops(case: str, length: int, ms: float) -> float | None:
    """10^9 floating-point operations a second of a GPT-2 step of batch 1; None for another model.

    Six for each weight of a matrix product and token, and 6 L T² C for causal attention (halved for it).

    Example:
        >>> round(step_gflops("GPT-2 124M, batch 1", 1024, 1000.0))
        817
    """
    config = next((config_of(name) for name in _MODELS if f"GPT-2 {name}" in case), None)
    if config is None or ("batch 1" not in case and "batch" in case):
        return None
    return _flops(config, length) / ms / 1e6


def _flops(config: GPT2Config, length: int) -> float:
    weights = config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)
    return 6.0 * weights * length + 6.0 * config.n_layer * length**2 * config.n_embd


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
                {"run": "run", "extrapolated": "not reached", "none": ""}[row["edge"]],
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
    """For each operation, pass and peer: how many problems, and the least, median and largest speed-up."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for ours, peer, ratio in speedups(rows):
        name = f"{peer.implementation} ({peer.kernel})" if peer.kernel else peer.implementation
        groups.setdefault((ours.op, ours.passes, name), []).append(ratio)
    lines = [
        [
            op,
            passes,
            name,
            str(len(own)),
            f"{min(own):.2f}×",
            f"{statistics.median(own):.2f}×",
            f"{max(own):.2f}×",
        ]
        for (op, passes, name), own in sorted(groups.items())
    ]
    return Table(["operation", "pass", "peer", "problems", "least", "median", "most"], lines)


def every(rows: Iterable[Row]) -> Table:
    """Each problem's last measurement."""
    lines: list[list[str]] = []
    marked: set[int] = set()
    ordered = sorted(
        (row for row in latest(rows) if row.p50_ms),
        key=lambda row: (row.op, row.place, row.passes, row.dtype, row.mask, row.case, row.length or 0),
    )
    for row in ordered:
        if row.implementation == OURS:
            marked.add(len(lines))
        lines.append(
            [
                row.op,
                row.passes,
                row.dtype,
                "" if row.length is None else f"{row.length:,}",
                "" if row.head_dim is None else str(row.head_dim),
                row.mask,
                row.case,
                row.isa,
                row.implementation,
                row.kernel,
                f"{row.p20_ms:,.3g}" if row.p20_ms and row.p20_ms < 100 else f"{row.p20_ms or 0:,.0f}",
                f"{row.p50_ms:,.3g}" if row.p50_ms and row.p50_ms < 100 else f"{row.p50_ms or 0:,.0f}",
                f"{row.p80_ms:,.3g}" if row.p80_ms and row.p80_ms < 100 else f"{row.p80_ms or 0:,.0f}",
                "" if row.gflops is None else f"{row.gflops:,.0f}",
                "" if row.share is None else f"{100 * row.share:.0f} %",
            ]
        )
    head = ["op", "pass", "dtype", "length", "d", "mask", "problem", "isa", "by", "kernel"]
    return Table([*head, "p20 ms", "p50 ms", "p80 ms", "GFLOP/s", "of ceiling"], lines, frozenset(marked))
