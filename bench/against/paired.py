"""This checkout against another commit: both run in turns, and the ratio has a confidence interval."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import calls
from bench.against.versions import ROOT, Worker, checkout, git, library
from bench.rows import extra, percentiles
from bench.tidy import RUN, isa_of
from fastattn.gpt2.spread import mean_interval

# A process is as fast as its memory happens to lie: versions are compared over several pairs of processes.
LAUNCHES = 8
BLOCK_SECONDS = 0.02
CONFIDENCE = 0.99  # of all cases' intervals together
SIZE = 512
CHECKED = 2048  # longer calls are held to float64 at this
# Of the largest value: in the tensors' dtype, and in the float32 of the accumulators.
ROUNDINGS, FLOAT32_ROUNDINGS = 3, 32


@dataclass
class Pair:
    """What was measured of one call, size and pass.

    Attributes:
        before, now: seconds of a call, by launch and round.
        note: why there is nothing.
        wrong: by version, ``then`` or ``now``, how far its results are from float64.
    """

    call: str
    size: int
    which: str
    before: list[list[float]] = field(default_factory=list)
    now: list[list[float]] = field(default_factory=list)
    note: str = ""
    wrong: dict[str, str] = field(default_factory=dict)

    def logs(self) -> list[float]:
        """log(now / before), the median over the rounds of each launch."""
        both = zip(self.now, self.before, strict=True)
        return [statistics.median(math.log(a / b) for a, b in zip(*launch, strict=True)) for launch in both]


def interval(logs: Sequence[float], cases: int) -> tuple[float, float, float]:
    """The ratio, and the ends of its confidence interval, by Student's t over the launches.

    Args:
        logs: log(now / before) of each launch.
        cases: how many such intervals there are: all of them hold at once with `CONFIDENCE` (Bonferroni).

    Returns:
        The geometric mean over launches, and the interval's ends.
    """
    mean, half_width = mean_interval(logs, 1 - (1 - CONFIDENCE) / cases)
    return math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)


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

    Returns:
        What was measured; a call that is `wrong` in either version is not timed.
    """
    names = [name for name in calls.CALLS if ops is None or name.split()[0] in ops]
    if not names:
        raise ValueError(
            f"expected operations among {sorted({x.split()[0] for x in calls.CALLS})}, got {ops}"
        )
    if not set(passes) <= {"forward", "both"}:
        raise ValueError(f"passes against a commit: expected forward and both, got {', '.join(passes)}")
    commit = git("rev-parse", "--short=9", ref)
    pairs = [Pair(*case) for case in product(names, sizes, passes)]
    with checkout(ref) as root:
        say(f"building {ref} ({commit}) and this checkout")
        places = [(root, library(root)), (ROOT, library(ROOT))]
        for launch in range(LAUNCHES):
            say(f"launch {launch + 1} of {LAUNCHES}")
            _launch(places, pairs, seconds / LAUNCHES, check=launch == 0)
    _report(pairs, commit, say)
    return pairs


def _launch(places: Sequence[tuple[Path, Path]], pairs: Sequence[Pair], seconds: float, check: bool) -> None:
    with ExitStack() as stack:
        before, now = (stack.enter_context(closing(Worker(*place))) for place in places)
        for pair in pairs:
            both = {"then": before, "now": now}
            absent = [which for which, worker in both.items() if pair.call not in worker.calls]
            if absent:
                pair.note = f"not there {' and '.join(absent)}"
                continue
            if check:
                pair.wrong = _check(pair, both)
            if pair.wrong:
                continue
            for worker in both.values():
                worker.ask({"call": pair.call, "size": pair.size, "pass": pair.which})
            _rounds(pair, before, now, seconds)


def _check(pair: Pair, workers: Mapping[str, Worker]) -> dict[str, str]:
    """Hold each version's results, or gradients, to what this checkout computes in float64."""
    size = min(pair.size, CHECKED)
    call = calls.make(pair.call, size).exact()
    run = call.forward if pair.which == "forward" else call.both
    run()
    exact = run()
    wrong = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/found.pt"
        for which, worker in workers.items():
            worker.ask({"call": pair.call, "size": size, "pass": pair.which, "save": path})
            found = torch.load(path, weights_only=True)
            text = disagreement(found, exact if isinstance(exact, list) else [exact])
            if text:
                wrong[which] = text
    return wrong


def disagreement(found: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """What of some tensors is not the exact result, to a few roundings of its dtype; empty where all are.

    Args:
        found: of an operation.
        exact: the same in float64.
    """
    if [x.shape for x in found] != [x.shape for x in exact]:
        return f"expected shapes {[tuple(x.shape) for x in exact]}, got {[tuple(x.shape) for x in found]}"
    single, parts = torch.finfo(torch.float32).eps, []
    for i, (x, y) in enumerate(zip(found, exact, strict=True)):
        scale = float(y.abs().max())
        budget = (ROUNDINGS * torch.finfo(x.dtype).eps + FLOAT32_ROUNDINGS * single) * scale
        error = float((x.double() - y).abs().max())
        if not error <= budget:
            parts.append(f"tensor {i}: error {error:.3g} over {budget:.3g}")
    return ", ".join(parts)


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
    say(f"{head}  now / then, {CONFIDENCE:.0%} intervals of all at once")
    cases = sum(bool(pair.now) for pair in pairs)
    for pair in pairs:
        start, race = f"{pair.call:<34} {pair.size:>5} {pair.which:<8}", RUN.next_race()
        if pair.wrong:
            for which, name in (("then", commit), ("now", "")):
                text = pair.wrong.get(which, "the other version is wrong")
                _keep(
                    pair, name, race, {"status": "wrong" if which in pair.wrong else "not run", "note": text}
                )
            say(f"{start} WRONG {'; '.join(f'{which}: {text}' for which, text in pair.wrong.items())}")
            continue
        if not pair.now:
            say(f"{start} {pair.note}")
            continue
        ratio, low, high = interval(pair.logs(), cases)
        text = f"{ratio:.3f} [{low:.3f}, {high:.3f}] {verdict(low, high)}"
        medians = []
        for name, taken in ((commit, pair.before), ("", pair.now)):
            p20, p50, p80 = (1e3 * x for x in percentiles([x for launch in taken for x in launch]))
            times = {"p20_ms": round(p20, 5), "p50_ms": round(p50, 5), "p80_ms": round(p80, 5)}
            note = "" if name else f"now / then: {text}"
            _keep(pair, name, race, {"status": "ok", "note": note, "rounds": sum(map(len, taken))} | times)
            medians.append(p50)
        say(f"{start} {medians[0]:>9.4f} {medians[1]:>9.4f}  {text}")


def _keep(pair: Pair, commit: str, race: int, found: Mapping[str, Any]) -> None:
    """A row for one version."""
    op, _, what = pair.call.partition(" ")
    row: dict[str, Any] = {
        "race": race,
        "op": op,
        "pass": pair.which,
        "length": pair.size,
        "extra": extra(call=what or op),
        "implementation": f"fastattn {commit}".strip(),
        "isa": isa_of("fastattn"),
    }
    RUN.add(row | found | ({"fastattn": commit} if commit else {}))
