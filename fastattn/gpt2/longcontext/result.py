"""The numbers of a search: what result.json holds, and its headline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastattn.gpt2.compare.result import machine, versions
from fastattn.gpt2.longcontext.search import Found, Point, fit
from fastattn.gpt2.longcontext.session import BASELINE, Session

SCHEMA: Final = 1


def result_of(session: Session, *, started: str, seconds: float, interrupted: bool) -> dict[str, Any]:
    """Everything a search found out, JSON-serialisable.

    Args:
        session: after its run, whole or interrupted.
        started: date and time in ISO 8601.
        seconds: how long all of it took.
        interrupted: the user stopped it.

    Returns:
        A dict of the fields in `bench/results/README.md`; ``schema`` is their version.
    """
    settings = session.settings
    built = next(iter(session.built.values()), {})
    implementations = {
        name: summary(found) | {"model": session.built.get(name)} for name, found in session.found.items()
    }
    points = [
        {"implementation": name, **point._asdict()}
        for name, found in session.found.items()
        for point in (*found.points, *session.beside[name])
    ]
    result = {
        "schema": SCHEMA,
        "kind": "longcontext",
        "started": started,
        "seconds": seconds,
        "interrupted": interrupted,
        "settings": settings.record(),
        "model": {"title": settings.title(), "parameters": built.get("parameters")},
        "data": session.data,
        "machine": machine(settings.device) | {"threads": built.get("threads")},
        "versions": versions(),
        "implementations": implementations,
        "points": sorted(points, key=lambda point: point["context"]),
        "notes": session.notes,
    }
    result["memory_at"] = memory_at(result)
    result["verdict"] = verdict(result)
    return result


def summary(found: Found) -> dict[str, Any]:
    """The longest context, how well it is known, and what its step took."""
    longest: Point | None = found.longest
    return {
        "longest": None if longest is None else longest.context,
        "edge": found.edge,
        "predicted": found.predicted,
        "refused": None if found.refused is None else found.refused.context,
        "ms": None if longest is None else longest.ms,
        "peak_bytes": None if longest is None else longest.peak_bytes,
        "stopped": next(
            (p.reason for p in found.points if p.status not in ("trained", "out of memory")), None
        ),
    }


def memory_at(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Peak memory beside the baseline's at the asked contexts, and at the longest both ran.

    Returns:
        By context: ``measured``, a peak for each implementation that ran there, and ``predicted``, by the
        fit, for those that did not.
    """
    peaks: dict[str, dict[int, int]] = {}
    for point in result["points"]:
        if point["status"] == "trained":
            peaks.setdefault(point["implementation"], {})[point["context"]] = point["peak_bytes"]
    longest = result["implementations"].get(BASELINE, {}).get("longest")
    contexts = {*result["settings"]["at"], *([longest] if longest else [])}
    rows = {}
    for context in sorted(contexts):
        measured, predicted = {}, {}
        for name, own in peaks.items():
            if context in own:
                measured[name] = own[context]
            elif len(own) >= 3:
                a, b, c = fit(own)
                predicted[name] = round(a + b * context + c * context**2)
        rows[str(context)] = {"measured": measured, "predicted": predicted}
    return rows


def times_longer(result: Mapping[str, Any], name: str) -> float | None:
    """The longest context that `name` ran over the baseline's; None where the baseline's edge was not run.

    A baseline that stopped for another reason might have gone further, and the ratio would flatter.
    """
    rows = result["implementations"]
    base, own = rows.get(BASELINE), rows.get(name)
    if not base or not own or base["edge"] != "run" or not own["longest"]:
        return None
    return float(own["longest"] / base["longest"])


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence: only what was run."""
    settings = result["settings"]
    parts = []
    for name, row in result["implementations"].items():
        ratio = times_longer(result, name) if name != BASELINE else None
        kernel = (row["model"] or {}).get("kernel", "")
        told = [f"{ratio:.1f}×"] if ratio is not None else []
        told += [kernel] if kernel.startswith("sdpa:") else []  # torch has several, and chooses
        beside = f" ({', '.join(told)})" if told else ""
        asked = row["edge"] == "run" and row["refused"] is None  # none longer was tried
        bound = " or more" if row["edge"] == "extrapolated" or asked else ""
        parts.append(f"{name} {row['longest']:,}{beside}{bound}" if row["longest"] else f"{name} none")
    return (
        f"{result['model']['title']} in {settings['memory'] / 2**30:g} GiB, {settings['dtype']}, batch 1, "
        f"dropout {settings['dropout']:g}: "
        f"longest context that trains, in tokens: {', '.join(parts)}."
    )
