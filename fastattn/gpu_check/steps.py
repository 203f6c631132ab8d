"""The steps of a check by name, in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, NamedTuple

from fastattn.gpu_check import cache_checks, checks, device_checks, models, races
from fastattn.gpu_check.report import Report

Group = Literal["correctness", "prepare", "alone", "sanitizer", "bench"]
GROUPS: Final[tuple[Group, ...]] = ("correctness", "prepare", "alone", "sanitizer", "bench")
PARTS: Final = 2


class Step(NamedTuple):
    """A part of the check.

    Attributes:
        group: ``correctness`` and ``prepare`` (compiling what the races need) run side by side; ``alone``
            needs the device's memory; ``sanitizer`` runs once under each of its tools; ``bench`` needs a
            quiet device.
        run: does it.
        weight: its share of the time that there is for the steps of its group.
    """

    group: Group
    run: Callable[[Report], object]
    weight: float = 1.0


def steps(dry_run: bool) -> dict[str, Step]:
    """All by name, in the order they run in."""
    parts = 1 if dry_run else PARTS
    found: dict[str, Step] = {}
    for dtype in ("bfloat16", "float16", "float32"):
        for part in range(parts):
            name = f"features {dtype}" + (f" {part + 1}/{parts}" if parts > 1 else "")
            found[name] = Step(
                "correctness", partial(checks.features, dtype_name=dtype, part=part, parts=parts), 3
            )
    for dtype in ("bfloat16", "float16", "float32"):
        found[f"sizes {dtype}"] = Step("correctness", partial(checks.sizes, dtype_name=dtype), 2)
    found |= {
        "cache": Step("correctness", cache_checks.decode, 2),
        "dropout": Step("correctness", checks.dropout),
        "determinism": Step("correctness", checks.determinism),
        "layouts": Step("correctness", checks.layouts),
        "float8": Step("correctness", checks.float8),
        "compiled": Step("correctness", checks.compiled),
        "graphs": Step("correctness", device_checks.graphs),
        "waits": Step("correctness", device_checks.waits),
        "streams": Step("correctness", device_checks.streams),
        "pairs": Step("correctness", partial(checks.pairs, count=6 if dry_run else 60), 2),
    }
    if not dry_run:
        found |= {
            f"prepare {name}": Step("prepare", partial(races.prepare, case=case))
            for name, case in races.CASES.items()
        }
    found["far"] = Step("alone", device_checks.far)
    found["sanitized"] = Step("sanitizer", checks.sanitized)
    # What matters most comes first: the end may come before the last.
    found["ceilings"] = Step("bench", races.ceilings, 0.5)
    found |= {name: Step("bench", partial(models.decode, name=name)) for name in models.FIRST}
    found["gpt2"] = Step("bench", models.gpt2, 3)
    found["launch"] = Step("bench", models.launches, 0.5)
    lengths = [name for name, case in races.CASES.items() if case.kind == "causal"]
    for name, case in races.CASES.items():
        if dry_run and name in lengths[1:]:
            continue  # of one size they are one race
        found[f"race {name}"] = Step("bench", partial(races.race, case=case), 4 if "causal" in name else 2)
    for name in models.DECODE:
        if name not in models.FIRST:
            found[name] = Step("bench", partial(models.decode, name=name))
    return found


def chosen(wanted: str | None, dry_run: bool) -> dict[str, Step]:
    """The steps whose group or name begins with one of the words in `wanted` (by commas); all if None.

    ``bench`` chooses what is prepared for it as well.

    Raises:
        ValueError: a word that no step begins with.
    """
    known = steps(dry_run)
    if wanted is None:
        return known
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    aliases = {"bench": ("bench", "prepare"), "correctness": ("correctness", "alone")}
    found: set[str] = set()
    for word in words:
        hits = {
            name
            for name, step in known.items()
            if name.startswith(word) or step.group in aliases.get(word, (word,))
        }
        if not hits:
            raise ValueError(
                f"--only: expected groups {['correctness', 'sanitizer', 'bench']} or steps {list(known)}, "
                f"got {word!r}"
            )
        found |= hits
    return {name: step for name, step in known.items() if name in found}
