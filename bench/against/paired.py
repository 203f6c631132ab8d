"""This checkout against another commit: both run in turns, and the ratio has a confidence interval."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from bench.against.versions import ROOT, Worker, checkout, git, library
from bench.calls import CALLS
from bench.rows import extra, percentiles
from bench.tidy import RUN, isa_of

# A process is as fast as its memory happens to lie: versions are compared over several pairs of processes.
LAUNCHES = 5
BLOCK_SECONDS = 0.02
RESAMPLES = 2000
CONFIDENCE = 0.99
SIZE = 512


@dataclass
class Pair:
    """What was measured of one call, size and pass.

    Attributes:
        before, now: seconds of a call, by launch and round.
        note: why there is nothing, or what is wrong.
    """

    call: str
    size: int
    which: str
    before: list[list[float]] = field(default_factory=list)
    now: list[list[float]] = field(default_factory=list)
    note: str = ""

    def logs(self) -> list[list[float]]:
        """log(now / before) of each round, by launch."""
        both = zip(self.now, self.before, strict=True)
        return [[math.log(a / b) for a, b in zip(*launch, strict=True)] for launch in both]


def interval(logs: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """The ratio, and the ends of its confidence interval: launches are drawn again, and rounds within them.

    Args:
        logs: log(now / before), by launch and round.
        seed: of the draws.

    Returns:
        The median over launches of each one's median ratio; the `CONFIDENCE` interval by percentiles.
    """
    draw = random.Random(seed)

    def centre(launches: Sequence[Sequence[float]]) -> float:
        return statistics.median(statistics.median(rounds) for rounds in launches)

    found = sorted(
        centre([draw.choices(rounds, k=len(rounds)) for rounds in draw.choices(logs, k=len(logs))])
        for _ in range(RESAMPLES)
    )
    tail = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return math.exp(centre(logs)), math.exp(found[tail]), math.exp(found[-1 - tail])


def verdict(low: float, high: float) -> str:
    """What an interval of the ratio now / before says."""
    return "faster" if high < 1 else "slower" if low > 1 else "within the noise"


def compare(
    ref: str,
    say: Callable[[str], None],
    ops: Sequence[str] | None = None,
    sizes: Sequence[int] = (SIZE,),
    passes: Sequence[str] = ("forward", "both"),
    seconds: float = 4.0,
) -> list[Pair]:
    """Time this checkout, as it lies, against another commit; rows of both go to the run's file.

    Args:
        ref: a commit, branch or tag.
        say: takes lines of text.
        ops: first words of names in `bench.calls`; all if None.
        sizes: lengths, or numbers of rows.
        passes: ``forward``, ``both``.
        seconds: to spend on a case, about.

    Raises:
        ValueError: git knows no such commit, or no call is of these operations or passes.
    """
    names = [name for name in CALLS if ops is None or name.split()[0] in ops]
    if not names:
        raise ValueError(f"expected operations among {sorted({x.split()[0] for x in CALLS})}, got {ops}")
    if not set(passes) <= {"forward", "both"}:
        raise ValueError(f"passes against a commit: expected forward and both, got {', '.join(passes)}")
    commit = git("rev-parse", "--short=9", ref)
    pairs = [Pair(*case) for case in product(names, sizes, passes)]
    with checkout(ref) as root:
        say(f"building {ref} ({commit}) and this checkout")
        places = [(root, library(root)), (ROOT, library(ROOT))]
        for launch in range(LAUNCHES):
            say(f"launch {launch + 1} of {LAUNCHES}")
            _launch(places, pairs, seconds / LAUNCHES)
    _report(pairs, commit, say)
    return pairs


def _launch(places: Sequence[tuple[Path, Path]], pairs: Sequence[Pair], seconds: float) -> None:
    with ExitStack() as stack:
        before, now = (stack.enter_context(closing(Worker(*place))) for place in places)
        for pair in pairs:
            both = (("then", before), ("now", now))
            absent = [which for which, worker in both if pair.call not in worker.calls]
            if absent:
                pair.note = f"not there {' and '.join(absent)}"
                continue
            order = {"call": pair.call, "size": pair.size, "pass": pair.which}
            results = [worker.ask(order)["norms"] for worker in (before, now)]
            if not _agree(*results):
                pair.note = f"results differ: norms were {results[0]}, are {results[1]}"
            _rounds(pair, before, now, seconds)


def _agree(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether two versions computed the same, as far as norms tell."""
    both = zip(before, now, strict=True)
    return len(before) == len(now) and all(math.isclose(a, b, rel_tol=0.01, abs_tol=1e-6) for a, b in both)


def _rounds(pair: Pair, before: Worker, now: Worker, seconds: float) -> None:
    once = max(worker.ask({"repeat": 1})["seconds"] for worker in (before, now))
    repeat = max(1, math.ceil(BLOCK_SECONDS / once))
    rounds = max(5, min(100, int(seconds / (2 * repeat * once))))
    taken: dict[Worker, list[float]] = {before: [], now: []}
    for i in range(rounds):
        for worker in (before, now) if i % 2 else (now, before):
            taken[worker].append(worker.ask({"repeat": repeat})["seconds"] / repeat)
    pair.before.append(taken[before])
    pair.now.append(taken[now])


def _report(pairs: Sequence[Pair], commit: str, say: Callable[[str], None]) -> None:
    head = f"{'call':<34} {'size':>5} {'pass':<8} {'then ms':>9} {'now ms':>9}"
    say(f"{head}  now / then, {CONFIDENCE:.0%} interval")
    for pair in pairs:
        start = f"{pair.call:<34} {pair.size:>5} {pair.which:<8}"
        if not pair.now:
            say(f"{start} {pair.note}")
            continue
        ratio, low, high = interval(pair.logs())
        text = f"{ratio:.3f} [{low:.3f}, {high:.3f}] {verdict(low, high)}"
        medians = [_keep(pair, name, taken, text) for name, taken in ((commit, pair.before), ("", pair.now))]
        say(f"{start} {medians[0]:>9.4f} {medians[1]:>9.4f}  {text}{'; ' if pair.note else ''}{pair.note}")


def _keep(pair: Pair, commit: str, taken: list[list[float]], text: str) -> float:
    """A row for one version; its median in milliseconds."""
    p20, p50, p80 = (1e3 * x for x in percentiles([x for launch in taken for x in launch]))
    op, _, what = pair.call.partition(" ")
    row: dict[str, Any] = {
        "op": op,
        "pass": pair.which,
        "length": pair.size,
        "extra": extra(call=what or op),
        "implementation": f"fastattn {commit}".strip(),
        "isa": isa_of("fastattn"),
        "status": "ok",
        "note": pair.note or ("" if commit else f"now / then: {text}"),
        "rounds": sum(map(len, taken)),
        "p20_ms": round(p20, 5),
        "p50_ms": round(p50, 5),
        "p80_ms": round(p80, 5),
    }
    RUN.add(row | ({"fastattn": commit} if commit else {}))
    return p50
