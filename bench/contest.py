"""A problem of an operation and everyone who computes it: first who is right, then how long each takes.

A suite's cases are subclasses of `Problem`; the fixture `compete` of conftest.py runs one.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bench import memory, rows
from bench.peers import chosen_others, version_of
from bench.rows import Clock
from bench.tidy import RUN, isa_of
from fastattn.gpu_check.report import Absent, reraise_if_lost, status_of
from fastattn.gpu_check.rows import BAD, OK
from fastattn.gpu_check.timing import columns_of, interleaved
from fastattn.machine import Machine, Moment, kernels_of
from fastattn.testing.budget import Errors, assert_within_budget, distance, size

CLOCK = Clock()
Function = Callable[..., Any]
# What is run, and the passes that are timed in it, in order.
WHOLES = {"forward": ("forward",), "both": ("backward", "both"), "step": ("step",)}
# Backward is most of the time.
SHARE = {"forward": 0.3, "both": 0.7, "step": 1.0}


@dataclass
class Race:
    """A problem's tensors on a device, and who computes it.

    Attributes:
        leaves: what gradients are taken of, by name; functions are called with them in this order.
        functions: by name of the implementation: of the leaves, a tensor or several. Ours are called
            ``fastattn``, or begin with it. One that has not what is asked raises `Absent`.
        plain: the mathematics in plain torch, for any dtype: the truth in float64, and what ``torch
            compiled`` compiles. The function ``torch`` if not given.
        timed: by name, what is timed in the place of a function: a step, which has a state.
        beside: timed in turns with the others and held to nothing, as it computes something else, or so only
            roughly.
        forward_only: names of functions that have no gradient.
        compiled: whether ``torch compiled`` is among the functions.
    """

    leaves: dict[str, Tensor]
    functions: dict[str, Function]
    plain: Any = None
    timed: dict[str, Callable[[], object]] = field(default_factory=dict)
    beside: dict[str, Function] = field(default_factory=dict)
    forward_only: Sequence[str] = ()
    compiled: bool = True

    def __post_init__(self) -> None:
        self.plain = self.plain or self.functions["torch"]
        if self.compiled and not self.timed:
            self.functions = self.functions | {"torch compiled": _compiled(self.plain)}
        for leaf in self.leaves.values():
            leaf.requires_grad_(not self.timed)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.leaves.values())


@dataclass(frozen=True)
class Problem:
    """One problem. Fields that are columns of the tidy rows go there, and all others to ``extra``."""

    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    op: ClassVar[str]
    passes: ClassVar[tuple[str, ...]] = ("forward", "backward", "both")

    def race(self, device: torch.device) -> Race:
        """The tensors, from a fixed seed, and the functions."""
        raise NotImplementedError

    def flops(self, which: str) -> int:
        """Of the mathematics' matrix products in a pass; 0 where it has none."""
        return 0

    def bytes(self, which: str, race: Race, outs: Sequence[Tensor]) -> int:
        """Every input read and every result written once; backward reads the inputs and out's gradient."""
        one = _bytes(race.tensors) + _bytes(outs)
        return {"forward": one, "backward": one + _bytes(race.tensors)}.get(
            which, 2 * one + _bytes(race.tensors)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its file, as pytest names a suite's module otherwise than other processes do."""
        path = Path(inspect.getfile(type(self))).resolve().relative_to(memory.ROOT).with_suffix("")
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return _problem, (".".join(path.parts), type(self).__name__, values)

    @property
    def checked(self) -> Problem:
        """What is held to float64 in its place: without dropout, where each draws in a way of its own."""
        return replace(self, dropout=0.0) if getattr(self, "dropout", 0.0) else self

    def row(self) -> dict[str, Any]:
        """Those of a row that say what the problem is."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        own["dtype"] = str(self.dtype).removeprefix("torch.")
        known = {name: value for name, value in own.items() if name in rows.COLUMNS}
        more = {name: value for name, value in own.items() if name not in rows.COLUMNS}
        return {"op": self.op} | known | {"extra": rows.extra(**more)}

    def __str__(self) -> str:
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        dtype = str(own.pop("dtype")).removeprefix("torch.")
        words = [
            value if isinstance(value, str) else name if value is True else f"{name}{value}"
            for name, value in own.items()
            if value is not False and value is not None
        ]
        return "-".join([*words, dtype])


def _problem(module: str, name: str, values: dict[str, Any]) -> Problem:
    found: Problem = getattr(importlib.import_module(module), name)(**values)
    return found


def results(
    function: Function, leaves: Sequence[Tensor], training: bool, douts: list[Tensor] | None = None
) -> list[Tensor]:
    """What a function gives, and where `training` the gradients of the leaves, all of them fresh.

    Args:
        function: one of a race.
        leaves: of it.
        training: whether gradients are made.
        douts: those that reach the results; where empty, they are put here for the next call.
    """
    if not training:
        with torch.no_grad():
            return _several(function(*leaves))
    outs = _several(function(*leaves))
    douts = [] if douts is None else douts
    if not douts:
        douts.extend(arriving(outs))
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)]


def normal(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors of normal numbers, by name, from a fixed seed."""
    g = torch.Generator(device).manual_seed(0)
    return {name: torch.randn(shape, generator=g, device=device).to(dtype) for name, shape in shapes.items()}


def arriving(outs: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that reach a function's results: 1 for a loss, else normal, the same for every dtype."""
    found = []
    for i, out in enumerate(outs):
        g = torch.Generator(out.device).manual_seed(i)
        normal = torch.randn(out.shape, generator=g, device=out.device) if out.dim() else torch.ones_like(out)
        found.append(normal.to(out.dtype))
    return found


class Truth:
    """The results of a problem in float64, and those of plain torch in its dtype."""

    def __init__(self, race: Race, training: bool) -> None:
        exact = [x.detach().double().requires_grad_(training) for x in race.tensors]
        douts: list[Tensor] = []
        self.plain = results(race.plain, race.tensors, training, douts)
        self.exact = results(race.plain, exact, training, [dout.double() for dout in douts])
        count = len(self.exact) - (len(race.leaves) if training else 0)
        self.names = [f"out{i or ''}" for i in range(count)] + [f"d{name}" for name in race.leaves]

    def check(self, found: Sequence[Tensor]) -> float:
        """Raise AssertionError where a result, or a gradient behind them, is over its budget.

        Returns:
            The largest error as a share of its budget.
        """
        shapes, wanted = [list(x.shape) for x in found], [list(x.shape) for x in self.exact[: len(found)]]
        assert shapes == wanted, f"expected results of {wanted}, got {shapes}"
        errors = [
            Errors(name, distance(got, want), distance(usual, want), size(want), usual.dtype, 0.0)
            for name, got, usual, want in zip(self.names, found, self.plain, self.exact, strict=False)
        ]
        assert_within_budget(errors)
        return max(e.ours / e.budget for e in errors)


@dataclass
class Entrant:
    """An implementation that may be timed in a whole: what was found of it before."""

    kernel: str
    peak_mb: float | None
    error: float | None = None


class Contest:
    """A problem's implementations, checked and then timed in turns; a row for each and pass.

    Args:
        problem: what is computed.
        option: of the run, as `pytest.Config.getoption`.
    """

    def __init__(self, problem: Problem, option: Callable[[str], Any]) -> None:
        self.problem, self.option = problem, option
        self.machine = Machine(dry_run=False, device=RUN.device)
        self.race = problem.race(self.machine.device)
        names = chosen_others(self.race.functions, RUN.device, option("--peers"), option("--all-cases"))
        self.functions = {name: self.race.functions[name] for name in names} | self.race.beside
        self.passes = [
            one for one in problem.passes if option("passes") is None or one in option("passes").split(",")
        ]
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[str, list[float]] = {}

    def run(self) -> None:
        """Check and time all; raise AssertionError where one of ours is wrong, or did not run."""
        checked = self.problem.checked
        self.note = f"checked as {checked}" if checked != self.problem else None
        other = self.race if checked == self.problem else checked.race(self.machine.device)
        wholes = {whole: [one for one in parts if one in self.passes] for whole, parts in WHOLES.items()}
        wholes = {whole: parts for whole, parts in wholes.items() if parts}
        truth = Truth(other, "both" in wholes)
        entrants = {whole: self._entrants(whole, parts, other, truth) for whole, parts in wholes.items()}
        del truth, other
        total = sum(SHARE[whole] for whole in wholes)
        for whole, parts in wholes.items():
            self._time(whole, parts, entrants[whole], self.option("--seconds") * SHARE[whole] / total)
        bad = [row for row in self.rows if _ours(row["implementation"]) and row["status"] in BAD]
        assert not bad, "; ".join(f"{row['pass']}: {row['status']}: {row.get('note')}" for row in bad)

    def _entrants(self, whole: str, parts: Sequence[str], other: Race, truth: Truth) -> dict[str, Entrant]:
        """Those that are right, by name; a row for each that is not."""
        entrants = {}
        for name, function in self.functions.items():
            found = None
            try:
                if name in self.race.forward_only and whole == "both":
                    raise Absent("forward alone")
                if name not in self.race.beside:
                    found = results(other.functions[name], other.tensors, whole == "both")
                run = whole_of(self.race, name, function, whole)
                if other is not self.race or found is None:
                    run()  # what is set up once is not of what is profiled and measured next
                entrants[name] = Entrant(kernels_of(self.machine, run), self._peak_mb(name, whole, run))
            except Exception as failure:
                self._refuse(name, parts, failure)
            else:
                try:
                    entrants[name].error = None if found is None else truth.check(found)
                except AssertionError as failure:
                    del entrants[name]
                    self._rows(name, parts, *status_of(failure))
            del found
            self.machine.free_bytes()  # what a failure has left
        return entrants

    def _peak_mb(self, name: str, whole: str, run: Callable[[], object]) -> float | None:
        if not self.machine.on_cpu:
            return self.machine.peak_mb(run)
        if self.option("--no-memory") or name in self.race.beside:
            return None
        none = ("both",) if name in self.race.forward_only else ()
        wholes = tuple(
            one for one, parts in WHOLES.items() if set(parts) & set(self.passes) and one not in none
        )
        return memory.peaks_mb(partial(alone, self.problem, name, wholes)).get(whole)

    def _time(self, whole: str, parts: Sequence[str], entrants: dict[str, Entrant], seconds: float) -> None:
        runs = {name: self._run(name, whole) for name in entrants}
        for name, run in list(runs.items()):
            try:
                run()
                self.machine.synchronize()
            except Exception as failure:  # as for memory, now that all the others' are there
                del runs[name]
                self._refuse(name, parts, failure)
        if not runs:
            return
        shown = self.functions["fastattn" if "fastattn" in runs else next(iter(runs))]
        outs = [] if whole == "step" else results(shown, self.race.tensors, False)
        number = RUN.next_race()
        for name, taken in interleaved(self.machine, runs, seconds).items():
            times = dict(zip(parts[:1], taken, strict=False))
            if whole == "both":
                times = {"backward": taken[1], "both": [sum(both) for both in zip(*taken, strict=True)]}
            for which in parts:
                self._keep(name, which, times[which], entrants[name], number, outs)

    def _run(self, name: str, whole: str) -> Callable[[], list[Moment]]:
        machine, leaves, function = self.machine, self.race.tensors, self.functions[name]
        if whole != "both":
            once = whole_of(self.race, name, function, whole)

            def one() -> list[Moment]:
                start = machine.mark()
                once()
                return [start, machine.mark()]

            return one
        douts: list[Tensor] = []

        def two() -> list[Moment]:
            start = machine.mark()
            outs = _several(function(*leaves))
            middle = machine.mark()
            if not douts:
                douts.extend(arriving(outs))
            torch.autograd.grad(outs, leaves, douts)
            return [start, middle, machine.mark()]

        return two

    def _keep(
        self, name: str, which: str, samples: list[float], entrant: Entrant, race: int, outs: Sequence[Tensor]
    ) -> None:
        self.samples[f"{name}, {which}"] = samples
        beside = name in self.race.beside
        self._row(
            name,
            which,
            race=race,
            status=OK,
            note="not held to float64: timed for comparison" if beside else self.note,
            kernel=entrant.kernel,
            error_of_budget=None if entrant.error is None else round(entrant.error, 3),
            peak_mb=entrant.peak_mb if which != "backward" else None,
            flops=None if beside else self.problem.flops(which) or None,
            bytes=self.problem.bytes(which, self.race, outs) or None,
            **columns_of(samples),
        )

    def _refuse(self, name: str, parts: Iterable[str], failure: Exception) -> None:
        """Rows of a call that did not end; an assertion of its own says nothing of a result."""
        status, note = status_of(failure, peer=not _ours(name))
        self._rows(name, parts, "failed" if status == "wrong" else status, note)
        reraise_if_lost(failure)

    def _rows(self, name: str, parts: Iterable[str], status: str, note: str) -> None:
        for which in parts:
            self._row(name, which, status=status, note=note)

    def _row(self, name: str, which: str, **found: Any) -> None:
        own = {"pass": which, "implementation": name, "version": version_of(name)}
        self.rows.append(RUN.add(self.problem.row() | own | {"isa": isa_of(name, RUN.device)} | found))


def whole_of(race: Race, name: str, function: Function, whole: str) -> Callable[[], object]:
    """A call that runs an implementation once: forward without a graph, with backward, or a step."""
    if whole == "step":
        return race.timed[name]
    return partial(results, function, race.tensors, whole == "both", [])


def alone(problem: Problem, name: str, wholes: Sequence[str]) -> Mapping[str, Callable[[], object]]:
    """What a process of its own runs to measure its memory."""
    race = problem.race(torch.device("cpu"))
    return {whole: whole_of(race, name, race.functions[name], whole) for whole in wholes}


def compete(problem: Problem, benchmark: Any, config: pytest.Config) -> None:
    """Run a contest; pytest-benchmark shows our samples of its last pass, and has all medians beside them."""
    contest = Contest(problem, config.getoption)
    contest.run()
    for row in contest.rows:
        benchmark.extra_info[f"{row['implementation']}, {row['pass']}"] = row.get("p50_ms", row["status"])
    benchmark.group = f"{problem.op} {problem}"
    CLOCK.replay(benchmark, [ms / 1000 for ms in contest.samples[f"fastattn, {contest.passes[-1]}"]])


def _compiled(plain: Function) -> Function:
    """Inductor's of it, made when first called."""
    made: list[Function] = []

    def call(*leaves: Tensor) -> Any:
        if not made:
            torch.compiler.reset()  # other problems' graphs count against the limit of a function
            made.append(torch.compile(plain, dynamic=False, fullgraph=True))
        return made[0](*leaves)

    return call


def _ours(name: str) -> bool:
    return name.startswith("fastattn")


def _several(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(x.shape) * x.itemsize for x in tensors)
