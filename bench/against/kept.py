"""A run against the rows of an older one: same cases, other times, so that the ratios are not paired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.rows import CASE, case_of, read


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each case and implementation that both have.

    Args:
        path: tidy rows of the older run.
        rows: of this one.
    """
    kept = {(case_of(row), row["implementation"]): row for row in read(path) if row["p50_ms"]}
    found = [
        f"against {path}: other runs' times are not paired; what the machine did beside them is in them too"
    ]
    count = 0
    for row in rows:
        old = kept.get((case_of(row), row["implementation"]))
        if not row.get("p50_ms") or row.get("op") == "ceiling" or old is None:
            continue
        count += 1
        unlike = [
            name for name in ("processor", "isa", "threads", "torch") if str(row.get(name)) != str(old[name])
        ]
        apart = row["p20_ms"] > old["p80_ms"] or row["p80_ms"] < old["p20_ms"]
        name = " ".join(f"{key}={row[key]}" for key in CASE if row.get(key) not in (None, ""))
        found.append(
            f"{row['p50_ms'] / old['p50_ms']:7.3f}  {old['p50_ms']} -> {row['p50_ms']} ms"
            f"{'' if apart else '  (within their p20 to p80)'}  {row['implementation']}: {name}"
            f"{'  other ' + ', '.join(unlike) if unlike else ''}"
        )
    return found if count else [f"against {path}: no case of this run is among its rows"]
