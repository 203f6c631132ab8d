"""Options of `fastattn bench` that all suites share, the run's tidy rows, and what the machine is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from bench import contest, rows
from bench.against import kept
from bench.ceilings import measure
from bench.tidy import RUN, isa_of
from fastattn import _backends
from fastattn.machine import Machine, details

HERE = Path(__file__).resolve().parent
# Minutes each: they run where they are named, by `--op` or by their folder, or with `--all-cases`.
LONG = ("compiler", "gpt2")
# Where nothing is named, so many cases of each suite are run: a look at every operation in a few minutes.
FIRST, FIRST_OF = 2, {"test_peers.py": 11}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn bench")
    group.addoption("--op", help="comma-separated operations: the folders of bench/")
    group.addoption("--pass", dest="passes", help="comma-separated: forward, backward, both")
    group.addoption("--dtype", help="comma-separated: float32, bfloat16, float16")
    group.addoption("--length", help="comma-separated lengths")
    group.addoption("--head-dim", help="comma-separated sizes of a head")
    group.addoption("--mask", help="comma-separated: causal, none, window, documents, ...")
    group.addoption("--peers", help="comma-separated names in bench/peers.py, or all")
    group.addoption("--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one)")
    group.addoption("--all-cases", action="store_true", help="every case, not the short list")
    group.addoption("--seconds", type=float, default=4.0, help="timed seconds a case, about (default 4)")
    group.addoption("--no-memory", action="store_true", help="leave out peak memory, a process for each")
    group.addoption("--against", help="a file of tidy rows, or a commit: how much faster or slower this is")
    group.addoption("--rows", type=Path, help="folder of the tidy rows (default bench/results/runs)")


def words(config: pytest.Config, option: str) -> list[str] | None:
    """What a comma-separated option lists; None where it was not given."""
    found = config.getoption(option, None)
    return None if found is None else [word.strip() for word in str(found).split(",")]


def _named(config: pytest.Config) -> set[str]:
    """The folders of bench/ among the arguments."""
    paths = [Path(str(word).partition("::")[0]).resolve() for word in config.args]
    return {part for path in paths if path.is_relative_to(HERE) for part in path.relative_to(HERE).parts[:1]}


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = {path.parent.name for path in HERE.glob("*/test_*.py")}
    if not set(words(config, "--op") or []) <= ops:
        raise pytest.UsageError(
            f"--op: expected some of {', '.join(sorted(ops))}; got {config.getoption('--op')}"
        )
    suite = "-".join(words(config, "--op") or sorted(_named(config)) or ["bench"])
    RUN.begin(suite, device, config.getoption("--rows"))


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Against a commit other processes measure, and no benchmark of this one is run."""
    ref = config.getoption("--against")
    if ref is None or Path(ref).is_file():
        return None
    from bench.against import paired

    if config.getoption("--device") == "cuda":
        raise pytest.UsageError("--against a commit measures the CPU; take a file for a GPU")
    for option in ("--dtype", "--head-dim", "--mask", "--peers", "--all-cases", "--no-memory"):
        if config.getoption(option):
            raise pytest.UsageError(f"{option}: expected without --against a commit, which has its own calls")
    config._do_configure()
    sizes = [int(n) for n in words(config, "--length") or [str(paired.SIZE)]]
    passes = words(config, "passes") or ["forward", "both"]
    try:
        seconds = config.getoption("--seconds")
        pairs = paired.compare(ref, print, words(config, "--op"), sizes, passes, seconds)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    print(f"{len(RUN.rows)} rows in {RUN.close()}")
    return int(any(pair.wrong for pair in pairs))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out operations that were not asked for, and what takes minutes unless it was."""
    if collection_path == HERE or not collection_path.is_relative_to(HERE):
        return None
    folder = collection_path.relative_to(HERE).parts[0]
    wanted = words(config, "--op")
    if wanted is not None:
        return True if folder not in wanted else None
    named = folder in _named(config)
    return True if folder in LONG and not named and not config.getoption("--all-cases") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if _is_wanted(config, item)]
    chosen = ("--op", "--all-cases", "keyword", "--length", "--mask", "--dtype")
    if not (_named(config) or any(config.getoption(option) for option in chosen)):
        seen: Counter[Path] = Counter()
        short = []
        for item in wanted:
            seen[item.path] += 1
            if seen[item.path] <= FIRST_OF.get(item.path.name, FIRST):
                short.append(item)
        wanted = short
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def _is_wanted(config: pytest.Config, item: pytest.Item) -> bool:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if case is None:
        return True
    # A case is left out by what it says of itself; it is not by what it has no word for.
    for option, names in (
        ("passes", ("passes",)),
        ("--dtype", ("dtype",)),
        ("--length", ("length",)),
        ("--head-dim", ("dim", "head_dim")),
        ("--mask", ("mask",)),
    ):
        chosen = words(config, option)
        value = next((getattr(case, name) for name in names if hasattr(case, name)), None)
        values = value if isinstance(value, tuple) else (value,)
        if chosen and value is not None and not {str(x).removeprefix("torch.") for x in values} & set(chosen):
            return False
    return True


@pytest.fixture
def compete(
    benchmark: Any, request: pytest.FixtureRequest, ceilings: dict[str, float]
) -> Callable[[contest.Problem], None]:
    """A contest over a problem."""
    return lambda problem: contest.compete(problem, benchmark, request.config)


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What the machine can do at all: gflops of ``fma`` (``matmul`` on a GPU) and gb_per_s of ``copy``."""
    if not RUN.ceilings:
        for row in measure(Machine(dry_run=False, device=RUN.device)):
            RUN.add({"op": "ceiling", "status": "ok", "isa": isa_of("fastattn", RUN.device)} | row)
            RUN.ceilings[row["implementation"]] = row.get("gflops") or row["gb_per_s"]
    return RUN.ceilings


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What times depend on, into the files that `pytest-benchmark compare` reads."""
    machine_info["fastattn"] = rows.common(RUN.suite, RUN.device) | {
        "fastattn": fastattn.__version__,
        "isa": {"fastattn": isa_of("fastattn"), "torch": torch.backends.cpu.get_cpu_capability()},
        "isas": [] if _backends.unavailable("cpu") else list(_backends.isas_present()),
    }
    if torch.cuda.is_available():
        machine_info["gpu"] = {"name": torch.cuda.get_device_name(), **dict(details(dry_run=False))}


def beside(measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each race and pass: the medians of all, the others' also over ours."""
    races: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in measured:
        if row.get("race") not in (None, "") and row.get("p50_ms"):
            own = (row["race"], row["op"], row["pass"], row.get("length") or "", row.get("mask") or "")
            races.setdefault((*own, row.get("extra") or ""), {})[row["implementation"]] = float(row["p50_ms"])
    for (_, *problem), medians in races.items():
        ours = medians.get("fastattn")
        told = [
            f"{name} {ms:.4g} ms" + (f" ({ms / ours:.2f}x)" if ours and name != "fastattn" else "")
            for name, ms in medians.items()
        ]
        yield f"{' '.join(str(part) for part in problem if part)}: {', '.join(told)}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path, older = RUN.close(), config.getoption("--against")
    for line in beside(RUN.rows):
        terminalreporter.write_line(line)
    if path is not None:
        terminalreporter.write_line(f"{len(RUN.rows)} rows in {path}")
    for line in kept.lines(Path(older), RUN.rows) if older is not None else ():
        terminalreporter.write_line(line)
