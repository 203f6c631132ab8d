"""What a comparison shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

HEARTBEAT_SECONDS = 30.0  # between lines during one long step, where there is no live table


class Progress:
    """Shows which implementation is at which step, its loss, time and memory, and the time left.

    Args:
        names: of the implementations.
        stream: where to write.
    """

    def __init__(self, names: Sequence[str], stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._rows = {name: {"at": "", "loss": "", "ms": "", "memory": "", "state": ""} for name in names}
        self._start = self._spoke = time.monotonic()
        self._left = ""
        self._live: Any = _rich_live(stream) if stream.isatty() else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def began(self, name: str, at: str, left: str) -> None:
        """`name` starts on something: building, or a step."""
        self._rows[name] |= {"at": at, "state": "running"}
        self._show(left)

    def busy(self, name: str, resident: int) -> None:
        """`name` is still at it and holds `resident` bytes."""
        self._rows[name]["memory"] = gigabytes(resident)
        if self._live is not None:
            self._show(self._left)
        elif time.monotonic() - self._spoke > HEARTBEAT_SECONDS:
            self._line(f"{name:<9} {self._rows[name]['at']:<24} … {gigabytes(resident)}")

    def stepped(self, name: str, at: str, loss: float, ms: float, peak: int, left: str) -> None:
        """`name` finished a step."""
        row = {"at": at, "loss": f"{loss:.4f}", "ms": f"{ms:,.0f} ms", "memory": gigabytes(peak)}
        self._rows[name] |= {**row, "state": "waits"}
        if self._live is None:
            self._line(
                f"{name:<9} {at:<24} loss {row['loss']:>8} {row['ms']:>12} {row['memory']:>9}   {left}"
            )
        self._show(left)

    def idle(self, name: str, state: str) -> None:
        """`name` waits, or will not go on."""
        self._rows[name]["state"] = state
        self._show(self._left)

    def _line(self, text: str) -> None:
        self._spoke = time.monotonic()
        print(f"[{clock(self._spoke - self._start)}] {text}", file=self._stream, flush=True)

    def _show(self, left: str) -> None:
        self._left = left
        if self._live is None:
            return
        from rich.console import Group  # noqa: PLC0415, rich is optional
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, pad_edge=False)
        for heading in ("", "at", "loss", "ms/step", "memory", ""):
            table.add_column(heading, justify="left" if heading in ("", "at") else "right")
        for name, row in self._rows.items():
            table.add_row(name, *row.values())
        elapsed = clock(time.monotonic() - self._start)
        self._live.update(Group(table, Text(f"{elapsed} passed   {left}")))


def clock(seconds: float) -> str:
    """Minutes and seconds.

    Example:
        >>> clock(75.2)
        '1:15'
    """
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes}:{rest:02d}"


def point_text(row: Mapping[str, Any]) -> str:
    """Why a point of the sweep was not measured.

    Example:
        >>> point_text({"implementation": "sdpa", "context": 8192, "status": "failed", "reason": "why"})
        'sdpa, 8,192 tokens: failed: why'
    """
    return f"{row['implementation']}, {row['context']:,} tokens: {row['status']}: {row['reason']}"


def gigabytes(count: float) -> str:
    """Bytes for people, in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def _rich_live(stream: TextIO) -> Any:
    try:
        from rich.console import Console  # noqa: PLC0415, rich is optional
        from rich.live import Live  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    return Live(console=Console(file=stream), refresh_per_second=4)
