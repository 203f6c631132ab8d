"""Measured rows of every file that is kept, in one shape, and what may be compared with what.

The tidy rows of `fastattn bench` and those of `fastattn gpu-check`: `bench/results/README.md` says what their
columns are.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from fastattn.gpt2.config import SIZES

OURS: Final = "fastattn"
OPTIMIZED: Final = "fastattn.optimize"  # of a training step: a model of others that our compiler pass rewrote
ATTENTION: Final = "attention"  # of a training step: our attention in a model that is otherwise plain
CEILINGS: Final = ("fma", "matmul", "copy")  # what the machine can do, and no peer
STANDARD: Final = ("standard", "naive")  # of a training step: what the others are compared with
TIDY_SCHEMA: Final = "2"
_Key = TypeVar("_Key")
_MODELS: Final = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


class Machine(NamedTuple):
    """Where a race was: times of two are never shown as of one.

    Attributes:
        device: ``cpu`` or ``cuda``.
        processor: the CPU's or the GPU's name.
        isa: the instruction set of our kernels.
        threads: of torch; None on a GPU.
    """

    device: str
    processor: str
    isa: str
    threads: int | None

    def __str__(self) -> str:
        threads = f"{self.threads} threads" if self.threads else ""
        return ", ".join(part for part in (self.processor, self.isa, threads) if part)


@dataclass(frozen=True)
class Row:
    """One measurement of one problem; None where it was not measured or does not apply.

    Attributes:
        run: the file, and where it has rows of several runs, which of them.
        race: rows of one run and race were timed in turns with each other; empty where a row was timed alone.
        date: when the run began.
        machine: where.
        versions: of torch and fastattn, for people.
        op: what was computed.
        passes: forward, backward, both or step.
        dtype: of the tensors.
        batch: of sequences.
        heads: of queries, or ``32:8``, of queries and of keys.
        length: of queries and keys; of a model, its context; of what has rows of a matrix, their number.
        head_dim: of q and k.
        mask: its name.
        case: the rest of the problem, for people; rows of one problem have the same.
        model: its size, where a model was measured: a name in `fastattn.gpt2.config.SIZES`.
        implementation: who computed it.
        kernel: what really ran.
        p20_ms, p50_ms, p80_ms: percentiles of the rounds.
        gflops: 10^9 floating-point operations a second, of the mathematics.
        gb_per_s: 10^9 bytes a second, of those that have to be moved.
        share: of what the machine can do at most, measured in the same run.
        ceiling: what that was, of `CEILINGS`.
        peak_mb: memory, 10^6 bytes.
    """

    run: str
    race: str
    date: datetime
    machine: Machine
    versions: str
    op: str
    passes: str
    dtype: str
    batch: int
    heads: str
    length: int | None
    head_dim: int | None
    mask: str
    case: str
    model: str
    implementation: str
    kernel: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gflops: float | None = None
    gb_per_s: float | None = None
    share: float | None = None
    ceiling: str = ""
    peak_mb: float | None = None

    @property
    def problem(self) -> tuple[Any, ...]:
        """Rows with this alike are of one problem."""
        sizes = (self.batch, self.heads, self.length, self.head_dim)
        return (self.op, self.passes, self.dtype, *sizes, self.mask, self.case)

    @property
    def name(self) -> str:
        """Who, for people; of torch's attention also which of its kernels."""
        found = re.match(r"sdpa:([a-z]+)|([a-z]+)$", self.kernel)
        kernel = (found[1] or found[2]) if found and self.implementation.startswith("sdpa") else ""
        return (
            f"{self.implementation} ({kernel})" if kernel not in self.implementation else self.implementation
        )

    @property
    def title(self) -> str:
        """The problem but for its op, pass, dtype and length, for people."""
        heads = "" if not self.heads else "1 head" if self.heads == "1" else f"{self.heads} heads"
        mask = {"none": "no mask"}.get(self.mask, self.mask)
        parts = [
            f"batch {self.batch}" if self.batch != 1 else "",
            "" if self.model else " of ".join(part for part in (heads, str(self.head_dim or "")) if part),
            "" if self.model or mask in self.case else mask,  # as in "window 512"
            self.case,
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Found:
    """What a folder has.

    Attributes:
        rows: of all CSV files.
        results: of the JSON files of commands, by date, each with its ``kind`` and ``file``.
        files: names of those that were read.
        unread: those that are of another form, with the reason.
    """

    rows: tuple[Row, ...]
    results: tuple[dict[str, Any], ...]
    files: tuple[str, ...]
    unread: tuple[str, ...]


def read_folder(folder: Path) -> Found:
    """All rows and results below `folder`.

    Raises:
        FileNotFoundError: no such folder, or nothing measured in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"rows: expected a folder of measured rows, got {str(folder)!r}")
    rows: list[Row] = []
    results: list[dict[str, Any]] = []
    files, unread = [], []
    for path in sorted((*folder.rglob("*.csv"), *folder.rglob("*.json")), key=_in_order):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".json":
                results.append(_result(path) | {"file": name})
            else:
                rows += _rows(path, name)
        except (ValueError, KeyError) as error:
            unread.append(f"{name}: {error}")
        else:
            files.append(name)
    if not files:
        raise FileNotFoundError(f"rows: expected measured rows in {str(folder)!r}, found none")
    results.sort(key=lambda result: str(result.get("started")))
    rows.sort(key=lambda row: row.date)
    return Found(tuple(rows), tuple(results), tuple(files), tuple(unread))


def latest(rows: Iterable[Row], measured: str = "p50_ms") -> list[Row]:
    """Of each problem on each machine the rows of its last race alone.

    Args:
        rows: in the order in which they were measured.
        measured: the field that they have: of rows without it, none.

    Returns:
        Rows, race by race. A race without us counts only where we were in none.
    """
    races: dict[tuple[Machine, tuple[Any, ...]], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if getattr(row, measured) is not None and row.op != "ceiling":
            own = races.setdefault((row.machine, row.problem), {})
            own.setdefault((row.run, row.race), []).append(row)
    found: list[Row] = []
    for own in races.values():
        with_ours = [race for race in own.values() if ours_of(race)]
        found += (with_ours or list(own.values()))[-1]
    return found


def grouped(rows: Iterable[Row], key: Callable[[Row], _Key]) -> dict[_Key, list[Row]]:
    """Rows by what `key` says of each, in the order of their first."""
    found: dict[_Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def is_ours(implementation: str) -> bool:
    """Whether the name is one of ours, such as "fastattn" or "fastattn paged".

    Example:
        >>> is_ours("fastattn, dense"), is_ours("sdpa"), is_ours("fastattn.gpt2, sdpa")
        (True, False, False)
    """
    return re.split(r"[ ,+]", implementation)[0] in (OURS, OPTIMIZED, ATTENTION)


def ours_of(race: Iterable[Row]) -> Row | None:
    """The row that is compared with the peers: all of fastattn, else what a model has of it."""
    named = {row.implementation: row for row in race}
    return named.get(OURS) or named.get(OPTIMIZED) or named.get(ATTENTION)


def peers_of(race: Iterable[Row]) -> list[Row]:
    """The rows of others."""
    return [row for row in race if not is_ours(row.implementation) and row.implementation not in CEILINGS]


def races(rows: Iterable[Row]) -> list[tuple[Row, list[Row]]]:
    """For each problem's last race: our row, and those of its peers.

    Two rows are only ever compared where they were timed in turns: a race that has no name has no peers.
    """
    found = []
    for own in grouped(latest(rows), lambda row: (row.run, row.race, row.machine, row.problem)).values():
        ours, peers = ours_of(own), peers_of(own)
        if ours is not None and ours.race and peers:
            found.append((ours, peers))
    return found


def speedups(rows: Iterable[Row]) -> list[tuple[Row, Row, float]]:
    """For each problem and each peer: ours, the peer's row, and the peer's median over ours."""
    return [
        (ours, peer, (peer.p50_ms or 0.0) / ours.p50_ms)
        for ours, peers in races(rows)
        for peer in peers
        if ours.p50_ms
    ]


def _in_order(path: Path) -> tuple[str, int, str]:
    """Files of one run after the other: ``x.csv``, ``x-2.csv``, ``x-10.csv``."""
    numbered = re.match(r"(.*\D)-(\d+)$", path.stem)
    stem, count = (numbered[1], int(numbered[2])) if numbered else (path.stem, 1)
    return (path.parent / stem).as_posix(), count, path.suffix


def _rows(path: Path, name: str) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        given = list(reader)
    if not given:
        raise ValueError("expected rows, got none")
    if "schema" in columns:
        found = [_tidy(row, name) for row in given if row["status"] == "ok"]
    elif {"step", "case", "status"} <= columns:
        timed = [row for row in given if row["status"] == "ok" and row["run"] == "gpu" and row["p50_ms"]]
        found = _with_shares([_gpu(row, name) for row in timed])
    else:
        raise ValueError(f"expected columns of measured rows, got {sorted(columns)[:6]} …")
    return _on_one_machine(found)


def _on_one_machine(rows: Iterable[Row]) -> list[Row]:
    """The same with our instruction set in all rows of a race: a peer has torch's of the same machine."""
    found: list[Row] = []
    for own in grouped(rows, lambda row: row.run).values():
        of_run = next((row.machine.isa for row in own if is_ours(row.implementation)), None)
        of_race = {row.race: row.machine.isa for row in own if is_ours(row.implementation)}
        for row in own:
            isa = of_race.get(row.race, of_run) if row.op != "ceiling" else None
            found.append(replace(row, machine=row.machine._replace(isa=isa or row.machine.isa)))
    return found


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _moment(text: str) -> datetime:
    """A time that can be compared with any other; without an offset it is taken as UTC."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _heads(row: Mapping[str, str]) -> str:
    grouped_heads = row["kv_heads"] and row["kv_heads"] != row["heads"]
    return f"{row['heads']}:{row['kv_heads']}" if grouped_heads else row["heads"]


def model_title(size: str) -> str:
    """``GPT-2 124M`` for ``gpt2``."""
    return f"GPT-2 {_MODELS.get(size, size)}"


def _tidy(row: Mapping[str, str], name: str) -> Row:
    if row["schema"] != TIDY_SCHEMA:
        raise ValueError(f"expected schema {TIDY_SCHEMA}, got {row['schema']}")
    extra = json.loads(row["extra"] or "{}")
    model = str(extra.pop("size", "")) if row["op"] == "gpt2" else ""
    length = _integer(row["length"])
    if length is None:
        length = extra.pop("rows", None)
    parts = [model_title(model)] if model else []
    parts += [_said(key, value) for key, value in extra.items()]
    if row["v_dim"] and row["v_dim"] != row["head_dim"]:
        parts.append(f"d_v {row['v_dim']}")
    if _number(row["dropout"]):
        parts.append(f"dropout {float(row['dropout']):g}")
    cuda = row["device"] == "cuda"
    return Row(
        run=name,
        race=row.get("race") or "",
        date=_moment(row["started"]),
        machine=Machine(
            row["device"], row["processor"], row["isa"], None if cuda else _integer(row["threads"])
        ),
        versions=f"torch {row['torch']}, fastattn {row['fastattn']}".removesuffix(", fastattn "),
        op=row["op"],
        passes=row["pass"],
        dtype=row["dtype"],
        batch=_integer(row["batch"]) or 1,
        heads=_heads(row),
        length=length,
        head_dim=_integer(row["head_dim"]),
        mask=row["mask"],
        case=", ".join(parts),
        model=model if model in SIZES else "",
        implementation=row["implementation"],
        kernel=row["kernel"],
        p20_ms=_number(row["p20_ms"]),
        p50_ms=_number(row["p50_ms"]),
        p80_ms=_number(row["p80_ms"]),
        gflops=_number(row["gflops"]),
        gb_per_s=_number(row["gb_per_s"]),
        share=_number(row["share_of_ceiling"]),
        ceiling=row["ceiling"],
        peak_mb=_number(row["peak_mb"]),
    )


def _said(key: str, value: Any) -> str:
    """One of a problem's `extra`, for people."""
    if value is None or value is False:
        return f"no {key}" if value is None else f"not {key}"
    if value is True or isinstance(value, str):
        return key if value is True else value
    return f"{key} {value:,}"


# What `fastattn gpu-check` calls the models of its training step, as `fastattn compare gpt2` does.
_TRAINED: Final = {
    "fastattn.gpt2, fastattn": OURS,
    "transformers, fastattn": ATTENTION,
    "transformers, sdpa": "sdpa",
    "transformers, eager": "standard",
}


def _gpu(row: Mapping[str, str], name: str) -> Row:
    """A row of `fastattn gpu-check`; rows of one step and case, forward alone or trained, are of one race."""
    tflops, share = _number(row["tflops"]), _number(row["share_of_copy"])
    step, kind = row["step"], row["case"]
    op, mask, case, model, implementation = "attention", "", "", "", row["implementation"]
    if step == "ceilings":
        op, implementation = "ceiling", kind
    elif row["passes"] == "step":
        op, mask, case, model = "gpt2", "causal", f"{model_title('gpt2')}, dropout 0.1", "gpt2"
        implementation = _TRAINED.get(implementation, implementation)
    elif step.startswith("decode"):
        op, case = "decode", re.sub(r"decode \d+:\d+ D\d+ ?", "", kind)
    elif step == "launch":
        op, mask, case = "launch", "causal", "the host's time for a call"
    else:
        words = [word for word in kind.split(", ") if not re.match(r"[DL] \d+$", word)]
        first = words[0].partition(" ")[0]
        mask = {"full": "none", "dropout": "causal", "alibi": "causal"}.get(first, first)
        case = ", ".join(words if words[0] != first or first not in ("causal", "full") else words[1:])
    return Row(
        run=f"{name} {row['started']}",
        race=f"{step}, {kind}, {'forward' if row['passes'] == 'forward' else 'trained'}",
        date=_moment(f"{row['date']}T{row['started']}"),
        machine=Machine("cuda", row["machine"], "", None),
        versions=f"torch {row['torch']}, triton {row['triton']}, fastattn {row['fastattn']}",
        op=op,
        passes=row["passes"],
        dtype=row["dtype"],
        batch=_integer(row["batch"]) or 1,
        heads=_heads(row),
        length=_integer(row["length"]),
        head_dim=_integer(row["head_dim"]),
        mask=mask,
        case=case,
        model=model,
        implementation=implementation,
        kernel=row["kernel"],
        p20_ms=_number(row["p20_ms"]),
        p50_ms=_number(row["p50_ms"]),
        p80_ms=_number(row["p80_ms"]),
        gflops=None if tflops is None else 1000 * tflops,
        gb_per_s=_number(row["gb_per_s"]),
        share=share,
        ceiling="" if share is None else "copy",
        peak_mb=_number(row["peak_mb"]),
    )


def _with_shares(rows: Iterable[Row]) -> list[Row]:
    """The same; bfloat16 rows with their share of the matrix product that the run could do at most."""
    rows = list(rows)
    most = {row.run: row.gflops for row in rows if row.op == "ceiling" and row.implementation == "matmul"}

    def shared(row: Row) -> Row:
        ceiling = most.get(row.run)
        if row.op != "attention" or row.dtype != "bfloat16" or not row.gflops or not ceiling:
            return row
        return replace(row, share=round(row.gflops / ceiling, 3), ceiling="matmul")

    return [shared(row) for row in rows]


def _result(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError("expected the result of a command, with its schema")
    # `fastattn compare gpt2` has no kind of its own
    if "kind" not in content and "sweep" in content:
        if content["schema"] < 2:
            raise ValueError(f"expected a comparison of schema 2, got {content['schema']}")
        return {"kind": "compare"} | content
    return {"kind": "unknown"} | content
