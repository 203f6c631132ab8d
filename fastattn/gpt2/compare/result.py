"""The numbers of a comparison, from its samples: what result.json holds and the report is written from."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

import fastattn
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, LOSS_TOLERANCE

SCHEMA: Final = 2
LEAST_COMMON_STEPS: Final = 2  # the first has seen no update, so that it says nothing of the gradients


def result_of(session: Session, *, started: str, seconds: float, interrupted: bool) -> dict[str, Any]:
    """Everything a comparison found out, JSON-serialisable.

    Args:
        session: after its run, whole or interrupted.
        started: date and time in ISO 8601.
        seconds: how long all of it took.
        interrupted: the user stopped it.

    Returns:
        A dict of the fields in `bench/results/README.md`; ``schema`` is their version.
    """
    settings = session.settings
    implementations = {}
    for name in settings.implementations:
        one = IMPLEMENTATIONS[name]
        stop = session.stopped.get(name)
        if stop is not None and stop.status != "failed" and stop.context > settings.context:
            stop = None  # it trained; where the sweep ended for it is said there
        implementations[name] = {
            "what": one.what,
            "attn_implementation": one.attention,
            "compiled": one.compiled,
            "own": one.own,
            "status": "measured" if stop is None else stop.status,
            "reason": None if stop is None else f"{stop.reason} (at {stop.context:,} tokens)",
            "model": session.built.get(name),
            "kernel": session.kernels.get(name),
        }
    built = next(iter(session.built.values()), {})
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "started": started,
        "seconds": seconds,
        "interrupted": interrupted,
        "settings": settings.record(),
        "model": {
            "title": settings.title(),
            **{k: getattr(session.config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")},
            "parameters": built.get("parameters"),
            "weights": built.get("weights"),
        },
        "data": session.data,
        "machine": machine(settings.device) | {"threads": built.get("threads")},
        "versions": versions(),
        "budget": {"memory_bytes": session.memory_budget, "device_bytes": session.device_budget},
        "baseline": settings.baseline,
        "ours": settings.ours,
        "implementations": implementations,
        "train": summaries(session.samples, "train", session.built, settings.baseline),
        "parity": parity(
            session.samples,
            "parity" if settings.dropout > 0 else "train",
            LOSS_TOLERANCE[settings.dtype],
            settings.baseline,
        ),
        "sweep": session.sweep,
        "notes": session.notes,
        "samples": session.samples,
    }
    result["parity"]["timing"] = (
        summaries(session.samples, "parity", session.built, settings.baseline)
        if settings.dropout > 0
        else result["train"]
    )
    result["verdict"] = verdict(result)
    return result


def summaries(
    samples: Sequence[Mapping[str, Any]],
    phase: str,
    built: Mapping[str, Mapping[str, Any]],
    baseline: str = "standard",
) -> dict[str, dict[str, Any]]:
    """For each implementation: time, throughput and memory of its steps of a phase.

    The warm-up is left out of the times, and of the memory where it compiles. ``activation_bytes`` is the
    peak above the libraries, the weights, their gradients and the optimiser's state; ``speedup`` the median
    time of `baseline` over its own.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, one in IMPLEMENTATIONS.items():
        own = [s for s in samples if s["implementation"] == name and s["phase"] == phase]
        timed = [s for s in own if not s["warmup"]]
        if not timed:
            continue
        ms = [s["ms"] for s in timed]
        peak = max(s["peak_bytes"] for s in (timed if one.compiled else own))
        fixed = built[name]["libraries_bytes"] + built[name]["model_bytes"]
        found[name] = {
            "steps": len(timed),
            "median_ms": statistics.median(ms),
            "min_ms": min(ms),
            "max_ms": max(ms),
            "tokens_per_second": 1000 * timed[0]["tokens"] / statistics.median(ms),
            "peak_bytes": peak,
            "activation_bytes": max(peak - fixed, 0),
        }
    for row in found.values():
        base = found.get(baseline)
        row["speedup"] = None if base is None else base["median_ms"] / row["median_ms"]
    return found


def parity(
    samples: Sequence[Mapping[str, Any]], phase: str, tolerance: float, baseline: str = "standard"
) -> dict[str, Any]:
    """How far each loss is from the baseline's on the same batches with dropout 0, relative to it.

    With dropout the implementations draw other random numbers, so that their losses say nothing about this.

    Returns:
        ``largest`` and ``last`` relative difference by implementation, the `tolerance`, and whether all that
        have fastattn's attention ``passed``: None where there are fewer than 2 steps in common, or `phase`
        has dropout. A loss that is not finite is an infinite difference.
    """
    losses: dict[str, dict[int, float]] = {}
    for s in samples:
        if s["phase"] == phase and s["dropout"] == 0:
            losses.setdefault(s["implementation"], {})[s["step"]] = s["loss"]
    base = losses.get(baseline, {})
    largest: dict[str, float] = {}
    last: dict[str, float] = {}
    steps = 0
    fewest: int | None = None
    for name, curve in losses.items():
        common = sorted(set(curve) & set(base))
        if name == baseline or not common:
            continue
        differences = [_difference(curve[step], base[step]) for step in common]
        largest[name], last[name] = max(differences), differences[-1]
        steps = max(steps, len(common))
        if is_ours(name):
            fewest = min(len(common), fewest or len(common))
    passed: bool | None = None
    if fewest is not None:
        passed = largest_of_ours(largest) <= tolerance
        if passed and fewest < LEAST_COMMON_STEPS:
            passed = None
    return {"steps": steps, "tolerance": tolerance, "largest": largest, "last": last, "passed": passed}


def is_ours(name: str) -> bool:
    """Whether an implementation has fastattn's attention, be it that alone."""
    return IMPLEMENTATIONS[name].attention == "fastattn"


def largest_of_ours(largest: Mapping[str, float]) -> float:
    """The largest of `parity`'s differences among those with fastattn's attention."""
    return max(difference for name, difference in largest.items() if is_ours(name))


def _difference(loss: float, base: float) -> float:
    if not (math.isfinite(loss) and math.isfinite(base)):
        return math.inf
    return abs(loss - base) / max(abs(base), sys.float_info.min)


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence or two, from the numbers of the run."""
    ours, base = result["train"].get(result["ours"]), result["train"].get(result["baseline"])
    title = result["model"]["title"]
    if ours is None or base is None:
        return _no_comparison(result)
    saved = base["peak_bytes"] - ours["peak_bytes"]
    memory = f"{abs(saved) / 1e9:.2f} GB ({abs(saved) / base['peak_bytes']:.0%})"
    text = (
        f"{_what(result['ours'])} trains {title} {_faster(ours)} than {_against(result['baseline'])} "
        f"({ours['median_ms']:,.0f} ms against {base['median_ms']:,.0f} ms a step) with {memory} "
        f"{'less' if saved >= 0 else 'more'} memory; {_agreement(result)}."
    )
    alone = result["train"].get("attention")
    if alone is not None and "attention" not in (result["ours"], result["baseline"]):
        text += f" fastattn's attention alone: {_faster(alone)}, {alone['peak_bytes'] / 1e9:.2f} GB."
    kernel = result["implementations"].get("sdpa", {}).get("kernel")
    by = f"; torch's sdpa ran {kernel}" if kernel else ""
    return f"{text} Dropout {result['settings']['dropout']:g}{by}."


def _no_comparison(result: Mapping[str, Any]) -> str:
    """Why there is none, and what was measured all the same."""
    why = []
    for name in (result["ours"], result["baseline"]):
        if name not in result["train"]:
            row = result["implementations"][name]
            why.append(
                f"{name}: {row['status']}, {row['reason']}" if row["reason"] else f"{name}: no timed step"
            )
    text = (
        f"No comparison of {result['model']['title']} with {_against(result['baseline'])} ({'; '.join(why)})"
    )
    ours = result["train"].get(result["ours"])
    if ours is not None:
        taken = f"{ours['median_ms']:,.0f} ms a step and {ours['peak_bytes'] / 1e9:.1f} GB"
        text += f"; {result['ours']} takes {taken}"
    return text + "."


def _agreement(result: Mapping[str, Any]) -> str:
    found = result["parity"]
    if found["passed"] is None:
        return "losses were not compared"
    largest = largest_of_ours(found["largest"])
    if largest == 0:
        return "losses are the same"
    if math.isinf(largest):
        return "LOSSES ARE NOT FINITE at dropout 0"
    if found["passed"]:
        return f"losses agree to {largest:.0e}"
    return f"LOSSES DIFFER by {largest:.0e}, allowed {found['tolerance']:.0e}"


def _faster(row: Mapping[str, Any]) -> str:
    ratio = row["speedup"]
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def _what(name: str) -> str:
    return "fastattn" if IMPLEMENTATIONS[name].own else "fastattn's attention"


def _against(name: str) -> str:
    return {"standard": "standard attention", "attention": "fastattn's attention alone"}.get(name, name)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": usable,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name(device) if device != "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on."""
    found: dict[str, str | None] = {"fastattn": fastattn.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
