"""Block sizes, warps and stages of each kernel, by architecture: the rows of tuning.csv.

A row is looked up, never tried out in a user's process: a first call costs no measuring, and the same call
takes the same tiles on every run. `source` in the file says how a row was found: `static`, by compiling ahead
of time (no spills, and of what is left the least traffic), or `measured <device> <date>`, by `fastattn tune`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import torch

from fastattn import _backends

TABLE: Final = Path(__file__).with_name("tuning.csv")
KERNELS: Final = ("forward", "dkdv", "dq", "bias", "relative", "decode")
DIMS: Final = (16, 32, 64, 128, 256, 512)
ANY: Final = "any"
COLUMNS: Final = (
    "kernel",
    "arch",
    "dim",
    "dtype",
    "causal",
    "rich",
    "block_q",
    "block_k",
    "warps",
    "stages",
    "source",
)
# Shared memory that one block of threads may take, in bytes.
SHARED_MEMORY: Final = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_110": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx950": 160 * 1024,
}
_AMD_SHARED_MEMORY: Final = 64 * 1024
# The same instructions, the same sizes.
_TWINS: Final = {"bfloat16": "float16", "float16": "bfloat16"}
# An architecture without a row of its own takes those of the next one.
_NEAREST: Final = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_90",
    "sm_120": "sm_86",
    "sm_121": "sm_120",
}


# In the place of the device at hand, and of the table: for compiling ahead of time, and for tuning.
forced_architecture: str | None = None
forced: Final[dict[str, Config]] = {}


class Config(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        block_q: query rows a tile.
        block_k: keys a tile.
        warps: warps a program.
        stages: tiles on their way from memory at a time.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int


class Row(NamedTuple):
    """One line of tuning.csv; `any` in dtype, causal or rich stands for all."""

    kernel: str
    arch: str
    dim: int
    dtype: str
    causal: str
    rich: str
    config: Config
    source: str

    def suits(self, dtype: str, causal: str, rich: str) -> bool:
        """Whether the row is one for this case; those of one 16-bit dtype are for the other as well."""
        dtypes = (ANY, dtype, _TWINS.get(dtype))
        return self.dtype in dtypes and self.causal in (ANY, causal) and self.rich in (ANY, rich)

    def specific(self, dtype: str) -> int:
        """How much of a case with `dtype` is named; dtype counts most, then rich."""
        named = 8 * (self.dtype == dtype) + 4 * (self.dtype == _TWINS.get(dtype))
        return named + 2 * (self.rich != ANY) + (self.causal != ANY)


def config(kernel: str, arch: str, dim: int, dtype: torch.dtype, causal: bool, rich: bool) -> Config:
    """The block sizes, warps and stages to launch a kernel with.

    Args:
        kernel: one of `KERNELS`.
        arch: ``"sm_90"``, ``"gfx942"``, ... or ``"interpreter"``. One without rows takes those of the nearest
            that has them, whose shared memory it has.
        dim: the larger of the head dims of q and v, padded to one of `DIMS`.
        dtype: of q.
        causal: whether keys are masked by a band.
        rich: whether the kernel has what needs more registers: softcap, a bias, dropout, a dense mask.

    Returns:
        The most specific row of the table.

    Raises:
        ValueError: no such kernel, head dim or architecture.

    Example:
        >>> config("forward", "interpreter", 64, torch.float32, True, False)
        Config(block_q=32, block_k=32, warps=4, stages=1)
    """
    return forced.get(kernel) or _look_up(kernel, arch, dim, dtype, causal, rich)


@cache
def _look_up(kernel: str, arch: str, dim: int, dtype: torch.dtype, causal: bool, rich: bool) -> Config:
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {list(KERNELS)}, got {kernel!r}")
    if dim not in DIMS:
        raise ValueError(f"dim: expected one of {list(DIMS)}, got {dim}")
    if arch == _backends.INTERPRETER:
        return Config(32, 32, 4, 1)
    name, by = str(dtype).removeprefix("torch."), ("no", "yes")
    table = _table()
    for nearest in relatives(arch):
        rows = table.get((kernel, nearest, dim), ())
        fitting = [row for row in rows if row.suits(name, by[causal], by[rich])]
        if fitting:
            return max(fitting, key=lambda row: row.specific(name)).config
    raise ValueError(f"arch: expected one that {TABLE.name} has {kernel} rows for, got {arch!r}")


def relatives(arch: str) -> list[str]:
    """`arch`, and the architectures whose rows it takes where it has none, nearest first.

    Raises:
        ValueError: not the name of a GPU architecture.

    Example:
        >>> relatives("sm_89")
        ['sm_89', 'sm_86']
    """
    if arch.startswith("gfx"):
        return list(dict.fromkeys((arch, "gfx942")))
    number = arch.removeprefix("sm_")
    if number == arch or not number.isdigit():
        raise ValueError(f"arch: expected 'sm_<number>' or 'gfx<number>', got {arch!r}")
    chain = [arch]
    while chain[-1] in _NEAREST:
        chain.append(_NEAREST[chain[-1]])
    if arch not in SHARED_MEMORY:  # newer than this table, or older than sm_80
        chain += ["sm_90"] if int(number) >= 90 else ["sm_86"]
    return chain


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that a block of threads may take; the nearest's where `arch` is not known.

    Example:
        >>> shared_memory("sm_90") // 1024
        227
    """
    if arch.startswith("gfx"):
        return SHARED_MEMORY.get(arch, _AMD_SHARED_MEMORY)
    return next(SHARED_MEMORY[name] for name in relatives(arch) if name in SHARED_MEMORY)


def architecture(device: torch.device) -> str:
    """The name in tuning.csv of what `device` is: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.

    Raises:
        ValueError: neither a GPU nor, for the interpreter, a CPU.
    """
    return forced_architecture or _backends.gpu_architecture(device)


def read(path: Path) -> list[Row]:
    """The rows of a tuning table.

    Raises:
        ValueError: a column is missing, or a line does not hold what it should.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected columns {list(COLUMNS)}, got {reader.fieldnames}")
        rows = []
        for fields in reader:
            try:
                rows.append(_row(fields))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}") from error
        return rows


def write(rows: Iterable[Row], path: Path) -> None:
    """Write a tuning table in its order; the file is replaced at once, never half written."""
    ordered = sorted(rows, key=_order)
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in ordered:
            writer.writerow((*row[:6], *row.config, row.source))
    new.replace(path)
    forget()


def forget() -> None:
    """Read the table anew when a row is next asked for."""
    _look_up.cache_clear()
    _table.cache_clear()


def merged(rows: Sequence[Row], newer: Sequence[Row]) -> list[Row]:
    """`rows` with `newer` in the place of those for the same case."""
    by_case = {row[:6]: row for row in (*rows, *newer)}
    return list(by_case.values())


def _row(fields: dict[str, str]) -> Row:
    kernel, dim = fields["kernel"], int(fields["dim"])
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {list(KERNELS)}, got {kernel!r}")
    if dim not in DIMS:
        raise ValueError(f"dim: expected one of {list(DIMS)}, got {dim}")
    for name in ("causal", "rich"):
        if fields[name] not in (ANY, "yes", "no"):
            raise ValueError(f"{name}: expected 'any', 'yes' or 'no', got {fields[name]!r}")
    numbers = Config(*(int(fields[name]) for name in Config._fields))
    for name in ("block_q", "block_k", "warps"):
        number = getattr(numbers, name)
        if number < 1 or number & (number - 1):
            raise ValueError(f"{name}: expected a power of two, got {number}")
    if numbers.block_q > 128:
        raise ValueError(f"block_q: expected at most 128, to which lse is padded, got {numbers.block_q}")
    if numbers.stages < 1:
        raise ValueError(f"stages: expected 1 or more, got {numbers.stages}")
    case = (fields["dtype"], fields["causal"], fields["rich"])
    return Row(kernel, fields["arch"], dim, *case, numbers, fields["source"])


def _order(row: Row) -> tuple[object, ...]:
    vendor, _, number = row.arch.rpartition("_")
    arch = (vendor != "sm", int(number) if vendor == "sm" else row.arch)
    case = (row.dtype, row.rich, row.causal)
    return (KERNELS.index(row.kernel), *arch, row.dim, *((word != ANY, word) for word in case))


@cache
def _table() -> dict[tuple[str, str, int], tuple[Row, ...]]:
    table: dict[tuple[str, str, int], tuple[Row, ...]] = {}
    for row in read(TABLE):
        key = (row.kernel, row.arch, row.dim)
        table[key] = (*table.get(key, ()), row)
    return table
