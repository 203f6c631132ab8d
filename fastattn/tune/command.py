"""The arguments of `fastattn tune`, and what it does with them."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

import torch

from fastattn import _backends
from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.tuning import Config, Row
from fastattn.testing.cases import Sizes
from fastattn.tune.calls import Case, features_as_words
from fastattn.tune.candidates import Compiled, candidates, compile_all, without_measuring
from fastattn.tune.measure import Outcome, measure

_DTYPES: Final = ("float32", "bfloat16", "float16")
_HIDDEN: Final = 2048
_TOKENS: Final = 16384
# A row is replaced where another is faster by more than what two runs of one differ by.
_WORTH: Final = 0.99
_YES: Final = {True: "yes", False: "no"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastattn tune`."""
    parser.add_argument("--kernel", nargs="+", choices=tuning.KERNELS, default=["forward", "dkdv", "dq"])
    parser.add_argument(
        "--dim", nargs="+", type=int, choices=tuning.DIMS, default=[64, 128], help="head dims"
    )
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"])
    parser.add_argument("--causal", nargs="+", choices=("yes", "no"), default=["yes", "no"])
    parser.add_argument(
        "--rich",
        nargs="+",
        choices=("yes", "no"),
        default=["no", "yes"],
        help="with what takes more registers (dropout, biases, ...), or without",
    )
    parser.add_argument("--length", type=_positive, default=4096, help="queries and keys (default 4096)")
    parser.add_argument(
        "--rounds", type=_positive, default=30, help="how often a finalist is timed (default 30)"
    )
    parser.add_argument("--most", type=_positive, help="compile at most this many candidates of a case")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="compile for --arch and print what would be measured and what is ruled out; write nothing",
    )
    how.add_argument(
        "--static",
        action="store_true",
        help="measure nothing: take what compiles for --arch without spills and keeps most warps at work",
    )
    parser.add_argument(
        "--arch", help="sm_80, sm_90, gfx942, ...: for --dry-run and --static; the GPU's if there is one"
    )
    parser.add_argument(
        "--output", type=Path, default=tuning.TABLE, help="the table to change (default: fastattn's)"
    )


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    """Tune; the exit status."""
    try:
        arch = _architecture(args)
        table = _table(args)
    except (OSError, ValueError) as error:
        print(f"fastattn tune: {error}", file=sys.stderr)
        return 1
    without = 0
    for case in _cases(args):
        row = _row_of(case, arch, args)
        if row is None:
            without += 1
        elif not args.dry_run:
            table = tuning.merged(table, [row])
            tuning.write(table, args.output)  # after each case, so that a run cut off loses one
    if without:
        print(f"fastattn tune: {without} of the cases have no candidate that can run", file=sys.stderr)
    return 1 if without else 0


def _row_of(case: Case, arch: str, args: argparse.Namespace) -> Row | None:
    """The new row of a case, printing how it comes about; None where no candidate will do."""
    default = tuning.config(case.kernel, arch, case.dim, case.dtype, case.causal, case.rich)
    print(f"{case} on {arch}, now {_words(default)}")
    if args.static:
        chosen = without_measuring(case, arch, _tell)
        return None if chosen is None else _static_row(case, arch, chosen.config)
    sizes = _sizes(case, args.length)
    variants = "; ".join(map(features_as_words, case.variants))
    print(f"  {sizes.batch} x {sizes.heads} heads x {sizes.k_length} keys: {variants}")
    wanted = list(dict.fromkeys((*candidates(case, arch)[: args.most], default)))
    fitting = []
    for found in compile_all(case, arch, wanted):
        _tell(found)
        if not found.reason:
            fitting.append(found.config)
    if args.dry_run:
        return _static_row(case, arch, fitting[0]) if fitting else None
    device = torch.device("cuda", torch.cuda.current_device())
    outcome = measure(case, default, fitting, sizes, device, args.rounds)
    _print(outcome, default)
    best = outcome.timings[0]
    before = next(timing for timing in outcome.timings if timing.config == default)
    config = best.config if best.milliseconds < _WORTH * before.milliseconds else default
    source = f"measured {torch.cuda.get_device_name(device)} {datetime.date.today()}"
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(case.kernel, arch, case.dim, dtype, _YES[case.causal], _YES[case.rich], config, source)


def _architecture(args: argparse.Namespace) -> str:
    """What to compile for.

    Raises:
        ValueError: it can't be told, or there is no GPU to measure on.
    """
    if _backends.interpreting():
        raise ValueError(
            "expected an environment without TRITON_INTERPRET, which makes Triton compile nothing"
        )
    here = None
    if torch.cuda.is_available():
        here = tuning.architecture(torch.device("cuda", torch.cuda.current_device()))
    if args.dry_run or args.static:
        if args.arch is None and here is None:
            raise ValueError("--arch: expected an architecture such as sm_90, there is no GPU here to ask")
        arch = str(args.arch or here)
        tuning.relatives(arch)
        return arch
    if here is None:
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, and nothing is measured without one. "
            "--dry-run --arch sm_90 shows what would be"
        )
    if args.arch not in (None, here):
        raise ValueError(f"--arch: expected {here}, which is the GPU here, got {args.arch}")
    return here


def _table(args: argparse.Namespace) -> list[Row]:
    """The rows that are to be changed.

    Raises:
        OSError, ValueError: the file can't be read or written.
    """
    path: Path = args.output
    if not args.dry_run and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--output: expected a file that can be written, got {path}")
    return tuning.read(path if path.exists() else tuning.TABLE)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    causal = ["yes"] if args.static else args.causal  # a static row is for both
    for kernel, dim, dtype, masked, rich in product(args.kernel, args.dim, args.dtype, causal, args.rich):
        # The gradient of a bias is of a problem that has one.
        if rich == "yes" or kernel not in ("bias", "relative"):
            yield Case(kernel, dim, getattr(torch, dtype), masked == "yes", rich == "yes")


def _sizes(case: Case, length: int) -> Sizes:
    """16,384 tokens of 2,048 features; for decoding 8 sequences of 32 query heads and 8 key heads."""
    if case.kernel == "decode":
        return Sizes(batch=8, heads=32, kv_heads=8, q_length=1, k_length=length)
    heads = _HIDDEN // case.dim
    return Sizes(max(1, _TOKENS // length), heads, heads, length, length)


def _tell(found: Compiled) -> None:
    print(f"  {'ruled out' if found.reason else 'fits'}: {found}", flush=True)


def _print(outcome: Outcome, default: Config) -> None:
    for config, reason in outcome.ruled_out.items():
        print(f"  ruled out: {_words(config)}: {reason}")
    for timing in outcome.timings:
        now = " (in use)" if timing.config == default else ""
        print(
            f"  {timing.milliseconds:.4f} ms [{timing.low:.4f}, {timing.high:.4f}] of {timing.rounds}: "
            f"{_words(timing.config)}{now}"
        )


def _static_row(case: Case, arch: str, config: Config) -> Row:
    """A row for both 16-bit dtypes, or float32, with a causal mask or none."""
    dtype = "float32" if case.dtype == torch.float32 else tuning.ANY
    return Row(case.kernel, arch, case.dim, dtype, tuning.ANY, _YES[case.rich], config, "static")


def _words(config: Config) -> str:
    return " ".join(f"{name} {value}" for name, value in config._asdict().items())
