"""What a run tells while it runs: a live bar or plain lines, a JSONL log, TensorBoard where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

_LINE_SECONDS: Final = 5.0  # between plain lines
_SMOOTHING: Final = 0.9  # of the step time that the remaining time is reckoned by


class Progress:
    """Reports of a run's steps; a context manager.

    Args:
        folder: gets `log.jsonl`, one JSON object a line: ``event`` is ``start``, ``step``, ``validation``,
            ``checkpoint`` or ``end``. A run that resumes appends to it: where two lines are of one step, the
            later counts.
        steps: of the whole run.
        done: steps that a run before this one has done.
    """

    def __init__(self, folder: Path, *, steps: int, done: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._log = path.open("a", encoding="utf-8")
        if torn:  # the last line of a run that was killed
            self._log.write("\n")
        self._board = _tensorboard(folder)
        self._steps, self._seconds, self._last_line = steps, 0.0, 0.0
        self._bar, self._task = _bar(steps, done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._log.close()

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def record(self, event: str, **values: Any) -> None:
        """A line of the log; numbers go to TensorBoard too."""
        self._log.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
        self._log.flush()
        if self._board is not None and "step" in values:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{name}", value, values["step"])

    def step(
        self,
        done: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        seconds: float,
        tokens: int,
        memory: int | None,
    ) -> None:
        """A step is done.

        Args:
            done: steps done in all.
            loss: mean over the step's tokens, in nats.
            lr: learning rate of the step.
            grad_norm: before clipping.
            seconds: it took.
            tokens: it took in.
            memory: bytes at the peak so far, None where it is not known.
        """
        speed = tokens / seconds
        self.record(
            "step",
            step=done,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            seconds=round(seconds, 6),
            tokens_per_second=round(speed, 1),
            memory_bytes=memory,
        )
        self._seconds = _SMOOTHING * self._seconds + (1 - _SMOOTHING) * seconds if self._seconds else seconds
        left = duration(self._seconds * (self._steps - done))
        held = "" if memory is None else f"{memory / 2**30:.2f} GiB  "
        text = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {held}{left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=text)
        elif done == self._steps or time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {done:>6}/{self._steps}  {text}")


def duration(seconds: float) -> str:
    """``"2:05"``, ``"1:00:09"``: hours, minutes, seconds.

    Example:
        >>> duration(125.2), duration(3609)
        ('2:05', '1:00:09')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(steps: int, done: int) -> tuple[Any, Any]:
    """rich's bar and its task, where there is rich and a terminal to draw on."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None, None
    progress = importlib.import_module("rich.progress")
    bar = progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.fields[info]}"),
    )
    return bar, bar.add_task("train", total=steps, completed=done, info="")


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
