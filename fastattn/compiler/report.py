"""What the pass saw, replaced and left, for people.

>>> import fastattn.compiler
>>> print(fastattn.compiler.Report(()))
fastattn: no attention sites seen
"""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.compiler.site import Site


@dataclass
class Record:
    """One attention in a compiled graph.

    Attributes:
        location: file, line and code of the model's softmax.
        rewritten: whether fastattn computes it.
        reason: why not.
        shape: ``(B, H, L_q, L_k)``, of symbolic sizes at their value when compiled; None where it was not
            understood.
        mask: what masks it, in words.
        dropout: probability.
        saved_bytes: what autograd would have kept of size L_q × L_k in the naive code: the probabilities, and
            with dropout also what is dropped and what is left.
    """

    location: str
    rewritten: bool = False
    reason: str = ""
    shape: tuple[int, ...] | None = None
    mask: str = ""
    dropout: float = 0.0
    saved_bytes: int = 0

    def describe(self, site: Site) -> None:
        """Note the sizes of a site."""
        from fastattn.compiler.graph import result_of  # noqa: PLC0415 - brings torch.fx

        sizes = [_value(site.axes.sizes[axis]) for axis in (*site.batch, site.rows, site.keys)]
        batch = sizes[:-2]
        self.shape = (math.prod(batch[:-1]), batch[-1] if batch else 1, *sizes[-2:])
        self.dropout = site.dropout
        if len(site.nodes) == 1:
            return  # a call of torch's, which may have a kernel of its own
        each = result_of(site.softmax).element_size()
        each += (1 + result_of(site.out).element_size()) if site.dropout else 0
        each += result_of(site.nodes[0]).element_size() if site.softcap else 0
        self.saved_bytes = math.prod(sizes) * each


def _value(size: Any) -> int:
    """A size; of a symbolic one its value, without a guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 0


@dataclass
class Fusion:
    """One place besides attention that a fused operation may take.

    Attributes:
        kind: ``"MLP"``, ``"linear + cross entropy"``, ``"dropout + add + layer norm"``, ….
        location: file, line and code of the model, where it ends.
        rewritten: whether fastattn computes it.
        reason: why not.
    """

    kind: str
    location: str
    rewritten: bool = False
    reason: str = ""


@dataclass
class Report:
    """What the pass did since `fastattn.compiler.reset_report()`.

    Attributes:
        records: for each attention site of each graph that was compiled.
        fusions: for each other place that a fused operation may take.
        graph_breaks: why dynamo ended graphs early, with how often.
    """

    records: tuple[Record, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    graph_breaks: dict[str, int] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        return len(self.records)

    @property
    def rewritten(self) -> int:
        return sum(record.rewritten for record in self.records)

    @property
    def saved_bytes(self) -> int:
        """Of all sites that were replaced; see `Record`."""
        return sum(record.saved_bytes for record in self.records if record.rewritten)

    def __str__(self) -> str:
        if not self.records:
            lines = ["fastattn: no attention sites seen"]
        else:
            size = f"; {_bytes(self.saved_bytes)} of L×L memory saved a step" if self.rewritten else ""
            lines = [f"fastattn: {self.rewritten} of {self.seen} attention sites rewritten{size}"]
        for (location, done, text), count in Counter(map(_line, self.records)).items():
            times = f"{count} × " if count > 1 else ""
            lines.append(f"  {'rewritten' if done else 'left'}  {times}{location}")
            lines.append(f"             {text}")
        lines += _fused_lines(self.fusions)
        for why, count in self.graph_breaks.items():
            lines.append(f"  graph break, {count} × {why}")
        return "\n".join(lines)


def _line(record: Record) -> tuple[str, bool, str]:
    shape = "" if record.shape is None else "[B {}, H {}, L_q {}, L_k {}]".format(*record.shape)
    if record.rewritten:
        dropout = f", dropout {record.dropout:g}" if record.dropout else ""
        return record.location, True, f"{shape} {record.mask}{dropout}, {_bytes(record.saved_bytes)} each"
    return record.location, False, f"{record.reason}{' ' if shape else ''}{shape}"


def _fused_lines(fusions: tuple[Fusion, ...]) -> Iterator[str]:
    done = Counter(one.kind for one in fusions if one.rewritten)
    if done:
        yield "  fused      " + ", ".join(f"{count} × {kind}" for kind, count in done.items())
    left = Counter((one.kind, one.location, one.reason) for one in fusions if not one.rewritten)
    for (kind, location, reason), count in left.items():
        yield f"  not fused  {f'{count} × ' if count > 1 else ''}{kind}: {location}"
        yield f"             {reason}"


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.4g} GiB"


_lock = threading.Lock()


class _Notes:
    """Records by what dynamo was compiling, which may be begun again; the last attempt is what runs."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, int], tuple[int, list[Record | Fusion]]] = {}
        self.breaks_before = _breaks()

    def add(self, frame: tuple[str, int], attempt: int, records: list[Record | Fusion]) -> None:
        before, found = self.of.get(frame, (attempt, []))
        self.of[frame] = (attempt, [*found, *records] if before == attempt else records)

    def report(self) -> Report:
        found = [record for _, records in self.of.values() for record in records]
        sites = tuple(x for x in found if isinstance(x, Record))
        fusions = tuple(x for x in found if isinstance(x, Fusion))
        return Report(sites, fusions, dict(_breaks() - self.breaks_before))


def note(records: list[Record | Fusion]) -> None:
    """Add to what `report` tells, in place of what an earlier attempt at the same graph found."""
    from torch._guards import CompileContext  # noqa: PLC0415

    context = CompileContext.try_get()
    with _lock:
        for notes in _open:
            if context is None or context.compile_id is None:
                notes.add(("", len(notes.of)), 0, records)
            else:
                notes.add((str(context.compile_id), 0), context.attempt, records)


@contextmanager
def records_into(found: Report) -> Iterator[None]:
    """Let a report also have what is noted inside."""
    notes = _Notes()
    _open.append(notes)
    try:
        yield
    finally:
        _open.remove(notes)
        whole = notes.report()
        found.records, found.fusions, found.graph_breaks = whole.records, whole.fusions, whole.graph_breaks


def report() -> Report:
    """What the pass saw, replaced and left in this process, in every graph compiled since `reset_report`.

    Returns:
        A `Report`; printing it gives a line for each place in the model's source.

    Example:
        >>> import torch, fastattn.compiler
        >>> fastattn.compiler.reset_report()
        >>> fastattn.compiler.report().seen
        0
    """
    with _lock:
        return _open[0].report()


def reset_report() -> None:
    """Forget what was seen so far."""
    with _lock:
        _open[0] = _Notes()


def _breaks() -> Counter[str]:
    utils = sys.modules.get("torch._dynamo.utils")  # nothing was compiled without it
    found: Counter[str] = Counter()
    if utils is not None:
        for why, count in utils.counters["graph_break"].items():
            found[str(why).strip().split("\n")[0]] += count
    return found


# The process's own first.
_open: list[_Notes] = [_Notes()]
