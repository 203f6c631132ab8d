"""The report folder of a comparison: report.md, plots and result.json, written from the result alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastattn.gpt2.compare.progress import point_text
from fastattn.gpt2.compare.result import LEAST_COMMON_STEPS, is_ours
from fastattn.gpt2.compare.session import WARM_UP_TOKENS
from fastattn.gpt2.drawing import plots_of

UNSTEADY: Final = 1.3  # longest step over shortest above which the reader is warned; 1.1 on a quiet machine


def write_report(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write result.json, speed.png, memory.png, loss.png and report.md.

    Args:
        result: of `result_of`.
        folder: made if it is not there.

    Returns:
        The files written. The plots are left out, and the report says so, where matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "result.json"]
    written[0].write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plots: list[str] | None = None
    plotting = plots_of("fastattn.gpt2.compare")
    if plotting is not None:
        plots = plotting.write_plots(result, folder)
        written += [folder / name for name in plots]
    written.append(folder / "report.md")
    written[-1].write_text(markdown(result, plots), encoding="utf-8")
    return written


def _finite(value: Any) -> Any:
    """`value` with the floats that JSON has no number for as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(result: Mapping[str, Any], plots: list[str] | None) -> str:
    """The report's text; `plots` names the images beside it, None where matplotlib is missing."""
    settings, model = result["settings"], result["model"]
    where = result["machine"]["gpu"] or result["machine"]["cpu"]
    parameters = "" if model["parameters"] is None else f", {model['parameters'] / 1e6:.1f} M parameters"
    parts = [
        f"# {model['title']}: {', '.join(result['implementations'])}",
        f"**{result['verdict']}**",
        f"{model['n_layer']} layers, {model['n_head']} heads, width {model['n_embd']}{parameters}; batch "
        f"{settings['batch']} × {settings['context']:,} tokens, dropout {settings['dropout']}, "
        f"{settings['dtype']}, on {where}.",
    ]
    if settings["quick"]:
        parts.append("A quick run on a small model: what it says holds for this size only.")
    parts += [f"> {warning}" for warning in warnings(result)]
    parts.append("## Training")
    parts.append(train_table(result["train"], result["parity"]["largest"]) or "No step was measured.")
    if plots is None:
        parts.append("Plots need matplotlib: `pip install matplotlib`.")
    parts += [f"![{name}]({name})" for name in plots or []]
    parts += _parity(result)
    if result["sweep"]:
        parts += _sweep(result)
    parts += ["## What was cut or went wrong", bullets(result["notes"]) or "Nothing."]
    parts += ["## How it was measured", _method(result)]
    return "\n\n".join(parts) + "\n"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if result["interrupted"]:
        found.append("Interrupted: this is what was measured until then.")
    for name, row in result["implementations"].items():
        if row["status"] != "measured":
            found.append(f"{name}: {row['status']}: {row['reason']}")
    ours = result["implementations"][result["ours"]]["model"]
    if ours is not None and "backend: reference" in (ours["backend"] or ""):
        found.append("fastattn ran its slow reference, not its kernels; `python -m fastattn env` tells why.")
    if result["parity"]["passed"] is False:
        found.append("The losses differ by more than rounding explains: do not trust this build.")
    for name, row in result["train"].items():
        if row["max_ms"] > UNSTEADY * row["min_ms"]:
            found.append(
                f"{name}'s steps took {row['min_ms']:,.0f} to {row['max_ms']:,.0f} ms: something else was at "
                "work on this machine; repeat this when it is quiet."
            )
    return found


def train_table(rows: Mapping[str, Mapping[str, Any]], differences: Mapping[str, float] | None = None) -> str:
    """The rows of `summaries` as a Markdown table; empty without rows.

    Args:
        rows: by implementation.
        differences: of the losses at dropout 0, `parity`'s ``largest``; a last column if given.
    """
    lines = []
    for name, row in rows.items():
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}×"
        lines.append(
            [
                name,
                f"{row['median_ms']:,.0f}",
                f"{row['min_ms']:,.0f}",
                f"{row['max_ms']:,.0f}",
                str(row["steps"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['activation_bytes'] / 1e9:.2f}",
                speedup,
            ]
        )
        if differences is not None:
            lines[-1].append(f"{differences[name]:.1e}" if name in differences else "–")
    head = ["", "ms a step (median)", "min", "max", "steps", "tokens/s", "peak GB", "of which activations"]
    last = [] if differences is None else ["largest loss difference (dropout 0)"]
    return table([*head, "speed-up", *last], lines)


def _parity(result: Mapping[str, Any]) -> list[str]:
    found = result["parity"]
    parts = ["## The same losses"]
    if not found["largest"]:
        return [*parts, "Not compared."]
    few = f"no verdict from fewer than {LEAST_COMMON_STEPS} steps"
    compared = any(is_ours(name) for name in found["largest"])
    outcome = {True: "pass", False: "FAIL", None: few if compared else "not compared"}[found["passed"]]
    lines = [
        [name, f"{found['largest'][name]:.1e}", f"{found['last'][name]:.1e}"] for name in found["largest"]
    ]
    parts.append(
        f"{found['steps']} steps with dropout 0 from the same weights on the same batches; difference of the "
        f"loss from {result['baseline']}'s, relative to it (ours may be at most {found['tolerance']:.0e}: "
        f"{outcome})."
    )
    parts.append(table(["", "largest of the steps", "at the last step"], lines))
    if result["settings"]["dropout"] > 0 and found["timing"]:
        parts += ["What these steps without dropout took:", train_table(found["timing"])]
    return parts


def sweep_table(result: Mapping[str, Any]) -> str:
    """The sweep's points as a Markdown table, a line for each context."""
    cells: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in result["sweep"]:
        cells.setdefault(row["context"], {})[row["implementation"]] = row
    names = [name for name, one in result["implementations"].items() if not one["compiled"]]
    base, ours = result["baseline"], result["ours"]
    lines = []
    for context, row in cells.items():
        speed = "–"
        if all(name in row and row[name]["ms"] is not None for name in (base, ours)):
            speed = f"{row[base]['ms'] / row[ours]['ms']:.2f}×"
        lines.append([f"{context:,}", *(sweep_cell(row[n]) if n in row else "–" for n in names), speed])
    return table(["tokens", *names, "speed-up"], lines)


def _sweep(result: Mapping[str, Any]) -> list[str]:
    budget = result["budget"]["device_bytes"] or result["budget"]["memory_bytes"]
    positions = ""
    if max(row["context"] for row in result["sweep"]) > 1024:
        positions = (
            " Beyond GPT-2's 1,024 tokens the model has as many more position embeddings, nothing else."
        )
    reasons = [point_text(row) for row in result["sweep"] if row["status"] != "measured"]
    return [
        "## Longer contexts",
        f"Milliseconds and peak memory of one training step, batch {result['settings']['batch']}, the same "
        f"model; memory budget {budget / 1e9:.1f} GB.{positions}",
        sweep_table(result),
        bullets(reasons),
    ]


def sweep_cell(row: Mapping[str, Any]) -> str:
    """A point of the sweep for people."""
    if row["status"] == "measured":
        return f"{row['ms']:,.0f} ms, {row['peak_bytes'] / 1e9:.2f} GB"
    return str(row["status"])


def _method(result: Mapping[str, Any]) -> str:
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    budget = result["budget"]
    rows = [
        f'{name}: {row["what"]} (`attn_implementation="{row["attn_implementation"]}"`)'
        + (f"; by the profiler ran {row['kernel']}" if row["kernel"] else "")
        for name, row in result["implementations"].items()
    ]
    backend = result["implementations"][result["ours"]]["model"]
    lines = [
        *rows,
        "one process each, taking turns of "
        f"{max(1, settings['steps'] // settings['rounds'])} step(s) in rotating order; the first step of "
        "each warms up (and compiles, where torch.compile is asked for) and is not in the medians; a step is "
        "forward, loss, backward, AdamW (fused)",
        f"initial weights from seed {settings['seed']}, sha256 `{str(result['model']['weights'])[:16]}…` in "
        "every process",
        f"text: {result['data']['source']}, {result['data']['train_tokens']:,} tokens "
        f"({result['data']['tokenizer']}), the same batches for all",
        "peak memory is the process's resident high-water mark during the steps (on a GPU: torch's allocated "
        "bytes); activations are what of it is above the libraries, weights, gradients and AdamW's state; "
        "GB are 10^9 bytes",
        f"memory budget {budget['memory_bytes'] / 1e9:.1f} GB: what needs more is not run, or stopped on "
        "reaching it",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch's {machine['isa']}, {machine['system']}, {machine['memory_bytes'] / 1e9:.1f} GB"
        + _gpu(machine),
        ", ".join(f"{name} {found}" for name, found in versions.items()),
        f"{result['started']}, {result['seconds'] / 60:.1f} minutes",
    ]
    if result["sweep"]:
        lines.insert(len(rows) + 1, _sweep_method(settings))
    if backend is not None and backend["backend"]:
        lines.insert(len(rows), f"fastattn's {backend['backend'].splitlines()[0]}")
    return bullets(lines)


def _sweep_method(settings: Mapping[str, Any]) -> str:
    text = f"at contexts other than {settings['context']:,} tokens each point is one step, no median, after "
    if settings["sweep"] is None or settings["time_budget"] is not None:
        return (
            f"{text}a warm-up step of {WARM_UP_TOKENS} tokens only, which makes the optimiser's state: its "
            "time has the first touches of the memory that this context needs in it (`--sweep` with contexts "
            "and without `--time-budget` warms up at full length)"
        )
    return f"{text}a warm-up step at full length"


def _gpu(machine: Mapping[str, Any]) -> str:
    return f", {machine['gpu']}" if machine["gpu"] else ""


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, its first column to the left; nothing where there are no lines."""
    if not lines:
        return ""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def bullets(lines: list[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
