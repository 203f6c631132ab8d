"""A search at work: a child process for each context, ended where it needs more than the budget."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch

from fastattn.gpt2.compare.process import OutOfMemory, OutOfTime, Worker, WorkerFailed, available_bytes
from fastattn.gpt2.compare.progress import Progress, clock, gigabytes
from fastattn.gpt2.data import Batches, load_tokens
from fastattn.gpt2.longcontext.search import Found, Point, search
from fastattn.gpt2.longcontext.settings import IMPLEMENTATIONS, Settings

_WORKER: Final = "fastattn.gpt2.longcontext.worker"
_NEAR: Final = 0.97  # of the limit: a child stopped below this was stopped for the machine's sake
BASELINE: Final = next(iter(IMPLEMENTATIONS))


class Session:
    """Searches for each implementation in turn; a context manager that ends its processes.

    Args:
        settings: what to do.
        progress: where to show it.

    Attributes:
        found: what the search of each implementation came to.
        beside: points measured besides, at `Settings.at` and at the baseline's longest context.
        built: what the process of each implementation's longest context said of its model.
        notes: what was cut or done otherwise than asked, for the report.
        data: what the text is.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.found: dict[str, Found] = {}
        self.beside: dict[str, list[Point]] = {name: [] for name in settings.implementations}
        self.built: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._progress = progress
        self._worker: Worker | None = None
        self._deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        corpus = self._corpus = load_tokens(settings.data, settings.tokenizer)
        needed, known = settings.config(1).vocab_size, corpus.tokenizer.vocab_size
        if known > needed:
            raise ValueError(f"--model {settings.model}: expected a vocabulary of {known}, got {needed}")
        self.data = {
            "source": corpus.name,
            "tokenizer": corpus.tokenizer.name,
            "train_tokens": corpus.train_tokens,
            "digest": corpus.digest,
        }
        room = self._room()
        if room < settings.memory:
            self._note(f"{gigabytes(room)} are free, less than the budget of {gigabytes(settings.memory)}")
        self._temporary = tempfile.TemporaryDirectory(prefix="fastattn-longcontext-")
        self._folder = Path(self._temporary.name)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.close()
        self._temporary.cleanup()

    def run(self) -> None:
        """Search for each implementation, then measure all at the same contexts."""
        settings = self.settings
        names = settings.implementations
        for place, name in enumerate(names):
            self.found[name] = Found(settings.memory, settings.max_context)
            until = self._share(len(names) - place)
            left = partial(_left, until)
            search(partial(self._probe, name, settings.memory, until), self.found[name], settings.first, left)
            longest = self.found[name].longest
            self._progress.idle(name, "no context trained" if longest is None else f"{longest.context:,}")
        for context in self._common():
            for name in names:
                self._measure_beside(name, context)

    def _common(self) -> list[int]:
        """Contexts to measure everywhere: those asked for, and the baseline's longest."""
        asked = set(self.settings.at)
        base = self.found.get(BASELINE)
        if base is not None and base.longest is not None:
            asked.add(base.longest.context)
        return sorted(context for context in asked if context <= self.settings.max_context)

    def _measure_beside(self, name: str, context: int) -> None:
        found = self.found[name]
        if context in found.trained or any(point.status == "failed" for point in found.points):
            return
        if _left(self._deadline) <= 0:
            self._note("no time left to measure all at the same contexts")
            return
        # what the machine has, not the budget: this is to compare, not to fit
        limit = max(self.settings.memory, self._room())
        self.beside[name].append(self._probe(name, limit, self._deadline, context))

    def _share(self, parts: int) -> float | None:
        """Until when one of `parts` may take, each as long as the others."""
        if self._deadline is None:
            return None
        now = time.monotonic()
        return now + max(self._deadline - now, 0.0) / parts

    def _probe(self, name: str, limit: int, until: float | None, context: int) -> Point:
        """One training step in a process of its own."""
        at = f"{context:,} tokens"
        left = "" if until is None else f"at most {clock(_left(until))} left"
        self._progress.began(name, at, left)
        on_gpu = self.settings.device != "cpu"
        command = {"do": "train", "context": context}
        try:
            config = self.settings.config(context)
            command |= {"config": asdict(config), "x": str(self._ids(context))}
            spec = self.settings.worker_spec(name, limit if on_gpu else None)
            self._worker = Worker(spec, self._folder / "worker.log", _WORKER)
            self._worker.send(command)
            tick = partial(self._progress.busy, name)
            answer = self._worker.wait(None if on_gpu else limit, until, tick)
        except OutOfMemory as error:
            peak = error.peak
            short = not on_gpu and limit > _NEAR * self._room() and (peak or 0) < _NEAR * limit
            point = Point(
                context, "not run (machine)" if short else "out of memory", None, peak, None, str(error)
            )
        except OutOfTime:
            point = Point(context, "not run (time)", reason="stopped when its time was up")
        except WorkerFailed as error:
            point = Point(context, "failed", reason=str(error))
        except ValueError as error:  # the text is too short
            point = Point(context, "failed", reason=str(error))
        else:
            point = self._point(name, limit, answer, context)
        finally:
            if self._worker is not None:
                self._worker.close()
                self._worker = None
        if point.status == "trained":
            assert point.loss is not None and point.ms is not None and point.peak_bytes is not None
            self._progress.stepped(name, at, point.loss, point.ms, point.peak_bytes, left)
        else:
            self._progress.say(f"{name}, {at}: {point.status}: {point.reason}")
        return point

    def _point(self, name: str, limit: int, answer: dict[str, Any], context: int) -> Point:
        peak = int(answer["peak_bytes"])
        if peak > limit:  # between two looks at it
            reason = f"held {gigabytes(peak)}, its limit {gigabytes(limit)}"
            return Point(context, "out of memory", None, peak, None, reason)
        self.built[name] = {
            key: answer[key] for key in ("parameters", "model_bytes", "libraries_bytes", "threads", "kernel")
        }
        return Point(context, "trained", answer["ms"], peak, answer["loss"])

    def _ids(self, context: int) -> Path:
        """A file of ``[1, context + 1]`` ids; where no document is as long, they run over their ends."""
        path = self._folder / f"{context}.pt"
        if not path.exists():
            try:
                batches = Batches(self._corpus, 1, context, self.settings.seed)
            except ValueError:
                batches = Batches(self._corpus, 1, context, self.settings.seed, joined=True)
                longest = self._corpus.longest_document
                self._note(f"above {longest - 1:,} tokens, the longest document, documents are joined")
            x, y = batches.at(0)
            torch.save(torch.cat((x, y[:, -1:]), dim=1), path)
        return path

    def _room(self) -> int:
        """Memory that a new process can have."""
        if self.settings.device != "cpu":
            return int(torch.cuda.mem_get_info(self.settings.device)[0])
        return available_bytes()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._progress.say(text)


def _left(until: float | None) -> float:
    return float("inf") if until is None else until - time.monotonic()
