"""Measured rows of every file that is kept, in one shape.

The tidy rows of `fastattn bench`, those of `fastattn gpu-check`, and the files of before:
`bench/results/README.md` says what their columns are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

OURS: Final = "fastattn"
ATTENTION: Final = "attention"  # of a training step: our attention in a model that is otherwise plain
CEILINGS: Final = ("fma", "copy")  # what the machine can do, and no peer
TIDY_SCHEMA: Final = "2"


@dataclass(frozen=True)
class Row:
    """One measurement of one problem; None where it was not measured or does not apply.

    Attributes:
        run: rows of one run may be compared with each other.
        date: ISO 8601.
        processor: the CPU's or the GPU's name.
        isa: instruction set.
        threads: of torch.
        versions: of torch and fastattn, for people.
        op: what was computed.
        passes: forward, backward, both or step.
        dtype: of the tensors.
        length: of queries and keys; of a model, its context.
        head_dim: of q and k.
        mask: its name.
        case: the rest of the problem, for people; rows of one problem have the same.
        implementation: who computed it.
        kernel: what really ran.
        p20_ms, p50_ms, p80_ms: percentiles of the rounds.
        gflops: 10^9 floating-point operations a second, of the mathematics.
        share: of what the machine can do at most, measured in the same run.
        ceiling: what that was: ``fma`` or ``copy``.
        peak_mb: memory, 10^6 bytes.
    """

    run: str
    date: str
    processor: str
    isa: str
    threads: int | None
    versions: str
    op: str
    passes: str
    dtype: str
    length: int | None
    head_dim: int | None
    mask: str
    case: str
    implementation: str
    kernel: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gflops: float | None = None
    share: float | None = None
    ceiling: str = ""
    peak_mb: float | None = None

    @property
    def problem(self) -> tuple[Any, ...]:
        """Rows with this alike are of one problem."""
        return (self.op, self.passes, self.dtype, self.length, self.head_dim, self.mask, self.case)

    @property
    def place(self) -> str:
        """The machine, for people."""
        isa = f", {self.isa}" if self.isa else ""
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.processor}{isa}{threads}"


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
    for path in sorted((*folder.rglob("*.csv"), *folder.rglob("*.json"))):
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
    return Found(tuple(rows), tuple(results), tuple(files), tuple(unread))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each problem on each machine the rows of its last run alone, each implementation once."""
    runs: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        runs.setdefault((row.processor, _kind(row), row.problem), {}).setdefault(row.run, {})[
            row.implementation
        ] = row
    found: list[Row] = []
    for by_run in runs.values():
        ordered = sorted(by_run.values(), key=lambda own: next(iter(own.values())).date)
        with_ours = [own for own in ordered if any(is_ours(name) for name in own)]
        found += (with_ours or ordered)[-1].values()
    return found


def is_ours(implementation: str) -> bool:
    """Whether the name is one of ours, such as "fastattn" or "fastattn paged".

    Example:
        >>> is_ours("fastattn, dense"), is_ours("sdpa")
        (True, False)
    """
    return implementation.partition(",")[0].split(" ")[0] in (OURS, ATTENTION)


def speedups(rows: Iterable[Row]) -> list[tuple[Row, Row, float]]:
    """For each problem and each peer: ours, the peer's row, and the peer's median over ours."""
    problems: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest(rows):
        problems.setdefault((row.processor, row.run, _kind(row), row.problem), []).append(row)
    found = []
    for own in problems.values():
        ours = next((row for row in own if row.implementation == OURS and row.p50_ms), None)
        if ours is None or ours.p50_ms is None:
            continue
        for row in own:
            if not is_ours(row.implementation) and row.implementation not in CEILINGS and row.p50_ms:
                found.append((ours, row, row.p50_ms / ours.p50_ms))
    return found


def _kind(row: Row) -> str:
    """AVX2 and AVX-512 runs of one machine stand beside each other."""
    return row.run.rpartition("@")[2] if "@" in row.run else ""


def _rows(path: Path, name: str) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        given = list(reader)
    if not given:
        raise ValueError("expected rows, got none")
    if "schema" in columns:
        return [_tidy(row, name) for row in given if row["status"] == "ok"]
    if {"step", "case", "status"} <= columns:
        return [_gpu(row, name) for row in given if row["status"] == "ok" and row["run"] == "gpu"]
    read = _OLD.get(path.stem)
    if read is None:
        raise ValueError(f"expected columns of a known file, got {sorted(columns)[:6]} …")
    seen: dict[tuple[Any, ...], int] = {}
    rows = []
    for row in given:
        made = read(row)
        key = (made.implementation, made.kernel, made.isa, made.problem)
        seen[key] = seen.get(key, 0) + 1  # a second row of a problem is of a second run
        rows.append(replace(made, run=f"{name} {seen[key]} {made.date}@{made.isa}"))
    return rows


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _tidy(row: Mapping[str, str], name: str) -> Row:
    if row["schema"] != TIDY_SCHEMA:
        raise ValueError(f"expected schema {TIDY_SCHEMA}, got {row['schema']}")
    extra = json.loads(row["extra"] or "{}")
    parts = [f"{key} {value}" for key, value in extra.items()]
    if row["kv_heads"] and row["kv_heads"] != row["heads"]:
        parts.insert(0, f"heads {row['heads']}:{row['kv_heads']}")
    elif row["heads"]:
        parts.insert(0, f"{row['heads']} heads")
    if row["batch"] not in ("", "1"):
        parts.insert(0, f"batch {row['batch']}")
    if row["v_dim"] and row["v_dim"] != row["head_dim"]:
        parts.append(f"d_v {row['v_dim']}")
    if _number(row["dropout"]):
        parts.append(f"dropout {float(row['dropout']):g}")
    return Row(
        run=name,
        date=row["started"],
        processor=row["processor"],
        isa=row["isa"],
        threads=_integer(row["threads"]),
        versions=f"torch {row['torch']}, fastattn {row['fastattn']}",
        op=row["op"],
        passes=row["pass"],
        dtype=row["dtype"],
        length=_integer(row["length"]),
        head_dim=_integer(row["head_dim"]),
        mask=row["mask"],
        case=", ".join(parts),
        implementation=row["implementation"],
        kernel=row["kernel"],
        p20_ms=_number(row["p20_ms"]),
        p50_ms=_number(row["p50_ms"]),
        p80_ms=_number(row["p80_ms"]),
        gflops=_number(row["gflops"]),
        share=_number(row["share_of_ceiling"]),
        ceiling=row["ceiling"],
        peak_mb=_number(row["peak_mb"]),
    )


def _gpu(row: Mapping[str, str], name: str) -> Row:
    tflops = _number(row["tflops"])
    return Row(
        run=f"{name} {row['started']}",
        date=f"{row['date']}T{row['started']}",
        processor=row["machine"],
        isa="",
        threads=None,
        versions=f"torch {row['torch']}, triton {row['triton']}, fastattn {row['fastattn']}",
        op="gpt2" if row["passes"] == "step" else "attention",
        passes=row["passes"],
        dtype=row["dtype"],
        length=_integer(row["length"]),
        head_dim=_integer(row["head_dim"]),
        mask="causal" if "causal" in row["case"] else "",
        case=row["case"],
        implementation=row["implementation"],
        kernel=row["kernel"],
        p20_ms=_number(row["p20_ms"]),
        p50_ms=_number(row["p50_ms"]),
        p80_ms=_number(row["p80_ms"]),
        gflops=None if tflops is None else 1000 * tflops,
        share=_number(row["share_of_copy"]),
        ceiling="copy" if row["share_of_copy"] else "",
        peak_mb=_number(row["peak_mb"]),
    )


def _old(
    row: Mapping[str, str], op: str, passes: str, case: str, mask: str = "", implementation: str | None = None
) -> Row:
    share = _number(row.get("fma_share")) or _number(row.get("share_of_copy"))
    return Row(
        run="",
        date=row["date"],
        processor=row["cpu"],
        isa=row.get("isa", ""),
        threads=_integer(row.get("threads")),
        versions=f"torch {row['torch']}" + (f", fastattn {row['fastattn']}" if "fastattn" in row else ""),
        op=op,
        passes=passes,
        dtype=row.get("dtype", "float32"),
        length=_integer(row.get("length") or row.get("context") or row.get("tokens")),
        head_dim=_integer(row.get("head_dim")),
        mask=mask,
        case=case,
        implementation=implementation or row["implementation"],
        kernel=row.get("kernel", ""),
        p20_ms=_number(row.get("p20_ms")),
        p50_ms=_number(row.get("p50_ms")),
        p80_ms=_number(row.get("p80_ms")),
        gflops=_number(row.get("gflops")),
        share=share,
        ceiling="" if share is None else "fma" if row.get("fma_share") else "copy",
        peak_mb=_number(row.get("peak_mb")),
    )


def _attention(row: Mapping[str, str]) -> Row:
    case = f"{row['heads']} heads"
    if row["v_dim"] != row["head_dim"]:
        case += f", d_v {row['v_dim']}"
    if float(row["dropout"]):
        case += f", dropout {float(row['dropout']):g}"
    return _old(row, "attention", row["passes"], case, row["mask"])


def _memory(row: Mapping[str, str]) -> Row:
    return replace(_old(row, "attention", "both", "12 heads, memory", "causal"), head_dim=64)


def _feature(row: Mapping[str, str]) -> Row:
    return _old(row, "attention", "both", row["feature"], row["feature"])


def _decode(row: Mapping[str, str]) -> Row:
    case = f"batch {row['batch']}, heads {row['heads']}:{row['kv_heads']}"
    return _old(row, "decode", "forward", case)


def _rotary(row: Mapping[str, str]) -> Row:
    return _old(row, "rotary", row["passes"], f"batch {row['batch']}, {row['heads']} heads")


def _gpt2(row: Mapping[str, str]) -> Row:
    case = f"{_model(row['size'])}, batch {row['batch']}, dropout {float(row['dropout']):g}"
    return _old(row, "gpt2", "step", case, implementation=_attention_alone(row["implementation"]))


def _attention_alone(name: str) -> str:
    """What the files of before called fastattn of a model's training step was its attention alone."""
    return ATTENTION if name == OURS else name


def _model(size: str) -> str:
    return {"gpt2": "GPT-2 124M", "gpt2-medium": "GPT-2 355M"}.get(size, f"GPT-2 of size {size}")


def _compiler(row: Mapping[str, str]) -> Row:
    how = {"eager": "standard", "compile": "torch.compile", "optimize": OURS}.get(row["how"], row["how"])
    case = f"{_model(row['size'])}, naive attention compiled, dropout {float(row['dropout']):g}"
    return _old(row, "gpt2", "step", case, implementation=how)


_OLD: Final[dict[str, Callable[[Mapping[str, str]], Row]]] = {
    "attention": _attention,
    "attention_memory": _memory,
    "attention_features": _feature,
    "decode": _decode,
    "rotary": _rotary,
    "gpt2_step": _gpt2,
    "compiler_step": _compiler,
}


def _result(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError("expected the result of a command, with its schema")
    # `fastattn compare gpt2` has no kind of its own
    if "kind" in content or "sweep" not in content:
        return {"kind": "unknown"} | content
    return {"kind": "compare"} | (_of_before(content) if content["schema"] == 1 else content)


def _of_before(content: dict[str, Any]) -> dict[str, Any]:
    """A comparison of schema 1 as one of 2."""

    def by_name(rows: Mapping[str, Any]) -> dict[str, Any]:
        return {_attention_alone(name): row for name, row in rows.items()}

    named = {name: by_name(content[name]) for name in ("implementations", "train")}
    listed = {
        name: [row | {"implementation": _attention_alone(row["implementation"])} for row in content[name]]
        for name in ("sweep", "samples")
    }
    parity = content["parity"]
    parity |= {name: by_name(parity[name]) for name in ("largest", "last", "timing") if name in parity}
    verdict = content["verdict"]
    for old, now in (
        ("fastattn trains", "fastattn's attention trains"),
        ("; fastattn takes", "; attention takes"),
    ):
        verdict = verdict.replace(old, now)
    new = {"baseline": "standard", "ours": ATTENTION, "parity": parity, "verdict": verdict}
    return content | named | listed | new
