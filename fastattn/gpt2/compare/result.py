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

SCHEMA: Final = 1
BASELINE: Final = "standard"
OURS: Final = "fastattn"
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
    for name, (attention, what) in IMPLEMENTATIONS.items():
        stop = session.stopped.get(name)
        if stop is not None and stop.status != "failed" and stop.context > settings.context:
            stop = None  # it trained; where the sweep ended for it is said there
        implementations[name] = {
            "what": what,
            "attn_implementation": attention,
            "status": "measured" if stop is None else stop.status,
            "reason": None if stop is None else f"{stop.reason} (at {stop.context:,} tokens)",
            "model": session.built.get(name),
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
        "implementations": implementations,
        "train": summaries(session.samples, "train", session.built),
        "parity": parity(
            session.samples, "parity" if settings.dropout > 0 else "train", LOSS_TOLERANCE[settings.dtype]
        ),
        "sweep": session.sweep,
        "notes": session.notes,
        "samples": session.samples,
    }
    result["parity"]["timing"] = (
        summaries(session.samples, "parity", session.built) if settings.dropout > 0 else result["train"]
    )
    result["verdict"] = verdict(result)
    return result


def summaries(
    samples: Sequence[Mapping[str, Any]], phase: str, built: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each implementation: time, throughput and memory of its steps of a phase, warm-up left out.

    ``activation_bytes`` is the peak above the libraries, the weights, their gradients and the optimiser's
    state; ``speedup`` the median time of the standard over its own.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in IMPLEMENTATIONS:
        own = [s for s in samples if s["implementation"] == name and s["phase"] == phase]
        timed = [s for s in own if not s["warmup"]]
        if not timed:
            continue
        ms = [s["ms"] for s in timed]
        peak = max(s["peak_bytes"] for s in own)
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
        base = found.get(BASELINE)
        row["speedup"] = None if base is None else base["median_ms"] / row["median_ms"]
    return found


def parity(samples: Sequence[Mapping[str, Any]], phase: str, tolerance: float) -> dict[str, Any]:
    """How far each loss is from the standard's on the same batches with dropout 0, relative to it.

    With dropout the implementations draw other random numbers, so that their losses say nothing about this.

    Returns:
        ``largest`` and ``last`` relative difference by implementation, the `tolerance`, and whether ours
        ``passed``: None where there are fewer than 2 steps in common, or `phase` has dropout. A loss that is
        not finite is an infinite difference.
    """
    losses: dict[str, dict[int, float]] = {}
    for s in samples:
        if s["phase"] == phase and s["dropout"] == 0:
            losses.setdefault(s["implementation"], {})[s["step"]] = s["loss"]
    base = losses.get(BASELINE, {})
    largest: dict[str, float] = {}
    last: dict[str, float] = {}
    steps = 0
    for name, curve in losses.items():
        common = sorted(set(curve) & set(base))
        if name == BASELINE or not common:
            continue
        differences = [_difference(curve[step], base[step]) for step in common]
        largest[name], last[name] = max(differences), differences[-1]
        steps = max(steps, len(common))
    passed: bool | None = None
    if OURS in largest:
        passed = largest[OURS] <= tolerance
        if passed and len(set(losses[OURS]) & set(base)) < LEAST_COMMON_STEPS:
            passed = None
    return {"steps": steps, "tolerance": tolerance, "largest": largest, "last": last, "passed": passed}


def _difference(loss: float, base: float) -> float:
    if not (math.isfinite(loss) and math.isfinite(base)):
        return math.inf
    return abs(loss - base) / max(abs(base), sys.float_info.min)


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in one sentence, from the numbers of the run."""
    ours, base = result["train"].get(OURS), result["train"].get(BASELINE)
    title = result["model"]["title"]
    if ours is None or base is None:
        missing = [name for name, row in ((OURS, ours), (BASELINE, base)) if row is None]
        why = []
        for name in missing:
            row = result["implementations"][name]
            why.append(
                f"{name}: {row['status']}, {row['reason']}" if row["reason"] else f"{name}: no timed step"
            )
        text = f"No comparison of {title} with standard attention ({'; '.join(why)})"
        if ours is not None:
            text += (
                f"; fastattn takes {ours['median_ms']:,.0f} ms a step and {ours['peak_bytes'] / 1e9:.1f} GB"
            )
        return text + "."
    ratio, saved = ours["speedup"], base["peak_bytes"] - ours["peak_bytes"]
    speed = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    share = abs(saved) / base["peak_bytes"]
    losses = result["parity"]
    if losses["passed"] is None:
        agreement = "losses were not compared"
    elif losses["largest"][OURS] == 0:
        agreement = "losses are the same"
    elif math.isinf(losses["largest"][OURS]):
        agreement = "LOSSES ARE NOT FINITE at dropout 0"
    elif losses["passed"]:
        agreement = f"losses agree to {losses['largest'][OURS]:.0e}"
    else:
        agreement = f"LOSSES DIFFER by {losses['largest'][OURS]:.0e}, allowed {losses['tolerance']:.0e}"
    return (
        f"fastattn trains {title} {speed} than standard attention ({ours['median_ms']:,.0f} ms against "
        f"{base['median_ms']:,.0f} ms a step) with {abs(saved) / 1e9:.2f} GB ({share:.0%}) "
        f"{'less' if saved >= 0 else 'more'} memory; {agreement}."
    )


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
