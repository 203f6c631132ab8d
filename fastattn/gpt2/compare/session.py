"""A comparison at work: child processes take turns at training steps, the parent keeps what they say.

How the time is shared: each implementation has one process, which waits for its next turn holding only
weights and optimiser state. A fresh process for each turn would spend the budget on starting up (about
8 s of importing and initialising against steps of 5 to 15 s); one process after the other would measure
them minutes apart, when the machine may be in another mood. So the turns are single steps, in an order that
rotates. Where memory has no room for a step beside the processes that wait, they run one after the other.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import torch

from fastattn.gpt2.compare.plan import predict, rotated, turns
from fastattn.gpt2.compare.process import OutOfMemory, OutOfTime, Worker, WorkerFailed, available_bytes
from fastattn.gpt2.compare.progress import Progress, clock, point_text
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, Settings
from fastattn.gpt2.data import Batches, load_tokens

# The shares of the time budget after which training, and then the run at dropout 0, are cut short.
TRAIN_UNTIL: Final = 0.45
PARITY_UNTIL: Final = 0.65
LEAST_STEPS: Final = 2
LEAST_TRAIN_STEPS: Final = 3  # where there is time for LEAST_STEPS at dropout 0 too
# The sweep's time where there is no time budget and its contexts were not asked for.
SWEEP_SECONDS: Final = 240.0
# Of the step before each point of the sweep, which makes the optimiser's state; all of the context where no
# time was set and the contexts were asked for.
WARM_UP_TOKENS: Final = 64


class Stop(NamedTuple):
    """Why an implementation went no further: `status` is "failed" or "out of memory"."""

    status: str
    reason: str
    context: int


class _NoRoom(Exception):
    """A step did not fit beside the processes that wait."""


class Session:
    """Runs the phases of a comparison and keeps their samples; a context manager that ends its processes.

    Args:
        settings: what to do.
        progress: where to show it.

    Attributes:
        samples: one dict a training step.
        sweep: one dict for each context and implementation.
        built: for each implementation, what its process said of the first model it made.
        kernels: for each that trained, what ran in a step, by the profiler.
        stopped: the implementations that failed, or ran out of memory at some context.
        notes: what was cut or done otherwise than asked, for the report.
        data: what the text is.
        memory_budget: bytes of the machine's memory for all processes.
        device_budget: bytes of the GPU's memory, or None on the CPU.
        alone: whether steps were not taken in turns, as there was no room for processes that wait.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.samples: list[dict[str, Any]] = []
        self.sweep: list[dict[str, Any]] = []
        self.built: dict[str, dict[str, Any]] = {}
        self.kernels: dict[str, str] = {}
        self.stopped: dict[str, Stop] = {}
        self.notes: list[str] = []
        self.started = time.monotonic()
        self._deadline = None if settings.time_budget is None else self.started + settings.time_budget
        self._progress = progress
        self._workers: dict[str, Worker] = {}
        self.alone = False
        self._build_seconds = {True: 10.0, False: 3.0}  # by whether a process had to be started

        corpus = self._corpus = load_tokens(settings.data, settings.tokenizer)
        self.notes += corpus.notes
        self.config = settings.model_config(corpus.tokenizer.vocab_size)
        self.data = {
            "source": corpus.name,
            "tokenizer": corpus.tokenizer.name,
            "train_tokens": corpus.train_tokens,
            "digest": corpus.digest,
        }
        available = int(0.9 * available_bytes())
        self.memory_budget = min(available, settings.memory_budget or available)
        self.device_budget: int | None = None
        if settings.device != "cpu":
            free = int(0.9 * torch.cuda.mem_get_info(settings.device)[0])
            self.device_budget = min(free, settings.memory_budget or free)
        self._temporary = tempfile.TemporaryDirectory(prefix="fastattn-compare-")
        self._folder = Path(self._temporary.name)
        self._batches(settings.context, settings.steps)  # raises now where the text is too short

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(self._workers)
        self._temporary.cleanup()

    def run(self) -> None:
        """All phases: training, the run at dropout 0, the sweep."""
        settings = self.settings
        try:
            self._train("train", settings.dropout, settings.steps, LEAST_TRAIN_STEPS, TRAIN_UNTIL)
            if settings.dropout > 0:
                self._train("parity", 0.0, settings.parity_steps, LEAST_STEPS, PARITY_UNTIL)
            self._sweep()
        except OutOfTime:
            self._note(f"stopped at the time budget of {(settings.time_budget or 0) / 60:.1f} min")

    def _train(self, phase: str, dropout: float, steps: int, least: int, until: float) -> None:
        names = [name for name in self.settings.implementations if name not in self.stopped]
        if phase != "train":
            names = [name for name in names if not IMPLEMENTATIONS[name].compiled]
        kept = len(self.samples)
        if not self.alone:
            try:
                self._train_group(phase, names, dropout, steps, least, until)
                return
            except _NoRoom:
                self.alone = True
                del self.samples[kept:]
                self._close(self._workers)  # one may be in the middle of an answer
                self._note("no memory for one implementation's step beside the others: not interleaved")
        begin = self._elapsed() / (self.settings.time_budget or 1)
        for i, name in enumerate(names):
            share = begin + (until - begin) * (i + 1) / len(names)
            self._train_group(phase, [name], dropout, steps, least, share)

    def _train_group(
        self, phase: str, names: list[str], dropout: float, steps: int, least: int, until: float
    ) -> None:
        context = self.settings.context
        self._close(set(self._workers) - set(names))
        answers = self._build(names, context, dropout)
        weights = {name: answer["weights"] for name, answer in answers.items()}
        if len(set(weights.values())) > 1:
            raise RuntimeError(f"expected the same initial weights everywhere, got {weights}")
        batches = self._batches(context, steps)
        for turn, chunk in enumerate(turns(steps, self.settings.rounds)):
            if not self._worth(chunk, least, self._round_seconds(names), until):
                self._note(f"{phase}: {chunk.start} of {steps} steps, to keep to the time budget")
                break
            for name in rotated(names, turn):
                for step in chunk:
                    if name in self.stopped:
                        break
                    record = {"phase": phase, "context": context, "dropout": dropout}
                    record |= {"step": step, "warmup": step == 0}
                    compiles = ", compiles" if step == 0 and IMPLEMENTATIONS[name].compiled else ""
                    self._step(name, f"{phase}, step {step + 1}/{steps}{compiles}", batches, record)
        for name in names if phase == "train" else ():
            if name not in self.stopped:
                self._profile(name, batches)

    def _worth(self, chunk: range, least: int, round_seconds: float, until: float) -> bool:
        """Whether the time budget has room for these steps: up to a share of it, for the `least` up to what
        the run at dropout 0 needs; a warm-up and one timed step in any case."""
        budget = self.settings.time_budget
        if budget is None or self.settings.fixed_steps or chunk.start < LEAST_STEPS:
            return True
        end = until * budget
        if chunk.start < least:
            end = max(end, budget - 1.1 * LEAST_STEPS * round_seconds)
        return self._elapsed() + len(chunk) * round_seconds <= end

    def _build(self, names: Sequence[str], context: int, dropout: float) -> dict[str, dict[str, Any]]:
        """Start the processes that are not there, and make their models, all at once."""
        answers = {}
        begin = time.monotonic()
        fresh = [name for name in names if name not in self._workers]
        for name in names:
            self._progress.began(name, "starting" if name in fresh else "building", self._left())
        for name in fresh:
            spec = self.settings.worker_spec(name, self.config, self.device_budget)
            self._workers[name] = Worker(spec, self._folder / f"{name}.log")
        command = {"do": "build", "context": context, "dropout": dropout}
        for name in names:
            self._guard(name, context, partial(self._workers[name].send, command))
        for name in names:
            if name in self._workers:
                answer = self._guard(name, context, partial(self._wait, name))
                if answer is not None:
                    answers[name] = answer
                    self.built.setdefault(name, answer)
                    self._progress.idle(name, "waits")
        self._build_seconds[bool(fresh)] = time.monotonic() - begin
        return answers

    def _step(self, name: str, at: str, batches: Path, record: dict[str, Any]) -> dict[str, Any] | None:
        """A training step, kept as a sample; None where the implementation gave up."""
        self._progress.began(name, at, self._left())
        answer = self._ask_step(name, batches, record["step"], record["context"])
        if answer is None:
            return None
        measured = {key: answer[key] for key in ("loss", "ms", "peak_bytes")}
        if not math.isfinite(answer["loss"]):
            self._note(f"{name}: expected a finite loss at {at}, got {answer['loss']}")
        tokens = self.settings.batch * record["context"]
        self.samples.append({"implementation": name, **record, "tokens": tokens, **measured})
        self._progress.stepped(name, at, answer["loss"], answer["ms"], answer["peak_bytes"], self._left())
        return measured

    def _profile(self, name: str, batches: Path) -> None:
        """One more step, behind those that are measured."""
        self._progress.began(name, "what runs, by the profiler", self._left())
        answer = self._ask(
            name, {"do": "profile", "batches": str(batches), "index": 0}, self.settings.context
        )
        if answer is not None:
            self.kernels[name] = answer["kernel"]
            self._progress.idle(name, "waits")

    def _ask_step(self, name: str, batches: Path, index: int, context: int) -> dict[str, Any] | None:
        return self._ask(name, {"do": "step", "batches": str(batches), "index": index}, context)

    def _ask(self, name: str, command: dict[str, Any], context: int) -> dict[str, Any] | None:
        def ask() -> dict[str, Any]:
            self._workers[name].send(command)
            return self._wait(name)

        answer: dict[str, Any] | None = self._guard(name, context, ask)
        return answer

    def _wait(self, name: str) -> dict[str, Any]:
        others = sum(worker.resident() for other, worker in self._workers.items() if other != name)
        tick = partial(self._progress.busy, name)
        return self._workers[name].wait(self.memory_budget - others, self._deadline, tick)

    def _guard(self, name: str, context: int, ask: Callable[[], Any]) -> Any:
        """`ask()`, or None where the implementation gave up, which is kept for the report.

        Raises:
            _NoRoom: out of memory while others hold some of it.
        """
        try:
            return ask()
        except WorkerFailed as error:
            self.stopped[name] = Stop("failed", str(error), context)
            self._note(f"{name} failed: {error}")
            self._drop(name, "failed")
        except OutOfMemory as error:
            self._drop(name, "out of memory")
            if self._workers:
                raise _NoRoom from None
            self.stopped[name] = Stop("out of memory", str(error), context)
        return None

    def _sweep(self) -> None:
        if self._deadline is None and self.settings.sweep is None:
            self._deadline = time.monotonic() + SWEEP_SECONDS
        names = [name for name in self.settings.implementations if not IMPLEMENTATIONS[name].compiled]
        for context in self.settings.contexts:
            measured = False
            for name in rotated(names, -1):  # ours first: the longest context that it trains is what is asked
                row = self._point(name, context)
                measured |= row["status"] == "measured"
                if row["status"] != "measured":
                    self._progress.say(point_text(row))
                self.sweep.append(row)
                self.sweep.sort(key=lambda r: (r["context"], names.index(r["implementation"])))
            if self.settings.sweep is None and not measured and context > self.settings.context:
                break

    def _point(self, name: str, context: int) -> dict[str, Any]:
        """One context of the sweep: what was measured, or why nothing was."""
        row: dict[str, Any] = {"context": context, "implementation": name, "status": "measured"}
        row |= {"ms": None, "peak_bytes": None, "predicted_ms": None, "predicted_bytes": None, "reason": None}
        here = self._measured(name).get(context)
        if here is not None:
            return row | here
        stop = self.stopped.get(name)
        if stop is not None and stop.status == "failed":
            return row | {"status": "failed", "reason": stop.reason}
        least, most_ms = self._predicted(name, context)
        row |= {"predicted_ms": most_ms, "predicted_bytes": least}
        budget = self.device_budget or self.memory_budget
        if least is not None and least > budget:
            reason = f"would need about {least / 1e9:.0f} GB, the budget is {budget / 1e9:.1f} GB"
            return row | {"status": "out of memory", "reason": reason}
        if stop is not None and context >= stop.context:
            return row | {"status": "out of memory", "reason": f"at {stop.context:,} tokens: {stop.reason}"}
        if self._deadline is not None and most_ms is not None:
            seconds = most_ms / 1000 + self._build_seconds[name not in self._workers]
            if time.monotonic() + seconds > self._deadline:
                reason = f"up to {clock(seconds)} needed, {clock(self._deadline - time.monotonic())} left"
                return row | {"status": "not run (time)", "reason": reason}
        return row | self._measure_point(name, context, least)

    def _measure_point(self, name: str, context: int, least: int | None) -> dict[str, Any]:
        if least is None or 1.1 * least + self._held_beside(name) > (
            self.device_budget or self.memory_budget
        ):
            self._close(set(self._workers) - {name})
        dropout = self.settings.dropout
        record = {"phase": "sweep", "context": context, "dropout": dropout, "step": 0, "warmup": False}
        try:
            batches = self._batches(context, 1)
            short = WARM_UP_TOKENS if self.settings.short_warm_up else context
            warm_up = self._batches(min(short, context), 1)
            while True:
                try:
                    self._build([name], context, dropout)
                    if name in self._workers:
                        self._ask_step(name, warm_up, 0, context)
                    if name in self._workers:
                        measured = self._step(name, f"sweep, {context:,} tokens", batches, record)
                    break
                except _NoRoom:  # once: now nothing is beside it
                    self._close(self._workers)
        except ValueError as error:
            return {"status": "not run (data)", "reason": str(error)}
        except OutOfTime:
            self._drop(name, "stopped")
            return {"status": "not run (time)", "reason": "stopped at the time budget"}
        if name not in self._workers:
            stop = self.stopped[name]
            return {"status": stop.status, "reason": stop.reason}
        assert measured is not None
        return {"ms": measured["ms"], "peak_bytes": measured["peak_bytes"]}

    def _held_beside(self, name: str) -> int:
        """Bytes that the processes that wait hold, of the memory the model is in."""
        others = {other: worker for other, worker in self._workers.items() if other != name}
        if self.device_budget is None:
            return sum(worker.resident() for worker in others.values())
        return sum(int(self.built[other]["model_bytes"]) for other in others)

    def _measured(self, name: str) -> dict[int, dict[str, Any]]:
        """For each context: the median time and the peak memory of the steps with the settings' dropout."""
        at: dict[int, list[dict[str, Any]]] = {}
        for sample in self.samples:
            if sample["implementation"] == name and sample["phase"] != "parity":
                at.setdefault(sample["context"], []).append(sample)
        return {
            context: {
                "ms": statistics.median([s["ms"] for s in found if not s["warmup"]] or [found[0]["ms"]]),
                "peak_bytes": max(s["peak_bytes"] for s in found),
            }
            for context, found in at.items()
        }

    def _predicted(self, name: str, context: int) -> tuple[int | None, float | None]:
        """Bytes (at least) and milliseconds (at most) of a step at another context."""
        points = self._measured(name)
        if not points:
            return None, None
        fixed = self.built[name]["libraries_bytes"] + self.built[name]["model_bytes"]
        needed = {t: max(point["peak_bytes"] - fixed, 0) for t, point in points.items()}
        least = predict(needed, context, "least")
        most_ms = predict({t: point["ms"] for t, point in points.items()}, context, "most")
        return (None if least is None else int(fixed + least)), most_ms

    def _batches(self, context: int, steps: int) -> Path:
        """A file of the first `steps` batches; where no document is as long, they run over their ends."""
        path = self._folder / f"{context}-{steps}.pt"
        if not path.exists():
            settings = self.settings
            try:
                batches = Batches(self._corpus, settings.batch, context, settings.seed)
            except ValueError:
                batches = Batches(self._corpus, settings.batch, context, settings.seed, joined=True)
                self._note(f"{context:,} tokens: no document is as long, so the text runs over their ends")
            pairs = [batches.at(step) for step in range(steps)]
            xs, ys = zip(*pairs, strict=True)
            torch.save({"x": torch.stack(xs), "y": torch.stack(ys)}, path)
        return path

    def _round_seconds(self, names: Sequence[str]) -> float:
        """What one step of each takes, by the last ones."""
        last: dict[str, float] = {sample["implementation"]: sample["ms"] for sample in self.samples}
        return sum(last.get(name, 0.0) for name in names) / 1000

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _left(self) -> str:
        """What to say of the time left: the budget is used up by as much of the sweep as fits."""
        return "" if self._deadline is None else f"at most {clock(self._deadline - time.monotonic())} left"

    def _close(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._drop(name, "")

    def _drop(self, name: str, state: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()
        self._progress.idle(name, state)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._progress.say(text)
