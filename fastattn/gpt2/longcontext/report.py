"""The folder of a search: longcontext.md, longcontext.png and result.json, written from the result alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.gpt2.compare.report import bullets, table
from fastattn.gpt2.drawing import plots_of
from fastattn.gpt2.longcontext.result import times_longer
from fastattn.gpt2.longcontext.session import BASELINE
from fastattn.gpt2.longcontext.settings import ATTENTION, CHECKPOINT, IMPLEMENTATIONS
from fastattn.gpt2.longcontext.worker import WARM_UP_TOKENS


def write_report(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write result.json, longcontext.png and longcontext.md.

    Args:
        result: of `result_of`.
        folder: made if it is not there.

    Returns:
        The files written; without the plot where matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "result.json"]
    written[0].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plots = plots_of("fastattn.gpt2.longcontext")
    if plots is not None:
        written += plots.write_plot(result, folder / "longcontext.png")
    page = folder / "longcontext.md"
    page.write_text(markdown(result, [path.name for path in written[1:]]), encoding="utf-8")
    return [*written, page]


def longest_table(result: Mapping[str, Any]) -> str:
    """The longest context, its time and its memory, an implementation a line."""
    lines = []
    for name, row in result["implementations"].items():
        ratio = times_longer(result, name)
        model = row["model"] or {}
        lines.append(
            [
                name,
                f"{row['longest']:,}" if row["longest"] else "none",
                "" if ratio is None else f"{ratio:.1f}×",
                _edge(row),
                "" if row["ms"] is None else f"{row['ms'] / 1000:,.1f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
                model.get("kernel", ""),
            ]
        )
    head = [
        "",
        "longest context",
        f"over {BASELINE}",
        "edge",
        "s a step",
        "peak GB",
        "attention by (profiler)",
    ]
    return table(head, lines)


def _edge(row: Mapping[str, Any]) -> str:
    if row["edge"] == "run":
        refused = row["refused"]
        return "run: the most asked for" if refused is None else f"run: {refused:,} does not fit"
    if row["edge"] == "none":
        return row["stopped"] or "nothing fits"
    predicted = f"; by the fit {row['predicted']:,}" if row["predicted"] else ""
    return f"not reached ({row['stopped'] or 'interrupted'}){predicted}"


def memory_table(result: Mapping[str, Any]) -> str:
    """Peak memory at the same contexts, and as a share of the baseline's."""
    names = list(result["implementations"])
    lines = []
    for context, row in result["memory_at"].items():
        base = row["measured"].get(BASELINE)
        cells = []
        for name in names:
            own = row["measured"].get(name)
            if own is None:
                guess = row["predicted"].get(name)
                cells.append("" if guess is None else f"({guess / 1e9:.2f} by the fit)")
            else:
                share = f" ({own / base:.2f}×)" if base and name != BASELINE else ""
                cells.append(f"{own / 1e9:.2f}{share}")
        lines.append([f"{int(context):,}", *cells])
    return table(["tokens", *names], lines)


def markdown(result: Mapping[str, Any], plots: list[str]) -> str:
    """The report's text; `plots` names the images beside it."""
    settings, machine = result["settings"], result["machine"]
    parts = [
        f"# The longest context that trains {result['model']['title']}",
        f"**{result['verdict']}**",
        longest_table(result),
        *(f"![{name}]({name})" for name in plots),
        "## Peak memory at the same contexts, GB",
        memory_table(result),
        "## How it was measured",
        bullets(
            [
                *(
                    f"{name}: {IMPLEMENTATIONS.get(name, _besides(name))}"
                    for name in settings["implementations"]
                ),
                f"one step (forward, backward, AdamW) of batch 1 in a process of its own, after a step of "
                f"{WARM_UP_TOKENS} tokens that makes the optimizer's state; times have the first touches of "
                "this context's memory in them",
                f"budget {settings['memory'] / 2**30:g} GiB for the process, libraries, weights, gradients "
                "and AdamW's state with it; a process beyond it is ended",
                "contexts: sixteen steps an octave, no finer than 64 tokens; a fit of the measured peaks "
                "(a + b T + c T²) chooses what to try",
                f"{settings['positions']} positions, dropout {settings['dropout']}, {settings['dtype']}, "
                f"logits of {settings['loss_chunk']} tokens at a time (fastattn: 64 MiB of them); "
                f"seed {settings['seed']}",
                f"{result['data']['source']}, {result['data']['tokenizer']} tokens",
                f"{machine['gpu'] or machine['cpu']} ({machine['isa']}), {machine['threads']} threads, "
                f"{machine['memory_bytes'] / 1e9:.1f} GB",
                ", ".join(f"{name} {found}" for name, found in result["versions"].items()),
                f"{result['started']}, {result['seconds'] / 60:.1f} minutes"
                + (", interrupted" if result["interrupted"] else ""),
                *result["notes"],
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _besides(name: str) -> str:
    plain, again = name.removesuffix(CHECKPOINT), name.endswith(CHECKPOINT)
    what = "fastattn's attention, the rest plain" if plain == ATTENTION else plain
    return what + (", and each block run again in the backward pass" if again else "")
