"""`fastattn longcontext`: the longest context that trains GPT-2 in some memory, and what it is good for.

The command is `add_arguments` and `run`. `search` chooses what to try, a `Session` runs it in child processes
(`worker`), `result` makes numbers of it, `report` and `plots` a folder. ``--quality`` is in `quality`.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from fastattn.gpt2.compare.progress import Progress, gigabytes
from fastattn.gpt2.longcontext import quality
from fastattn.gpt2.longcontext import settings as options
from fastattn.gpt2.longcontext.report import longest_table, memory_table, write_report
from fastattn.gpt2.longcontext.result import result_of
from fastattn.gpt2.longcontext.session import Session
from fastattn.gpt2.longcontext.settings import Settings, settings_of

__all__ = ["add_arguments", "find", "run"]

_SEARCH_ALONE: Final = ("model", "memory", "implementations", "max_context", "at", "dropout", "loss_chunk")
_QUALITY_ALONE: Final = ("contexts", "layers", "heads", "width", "lr", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastattn longcontext`."""
    options.add_arguments(parser)
    quality.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `fastattn longcontext` and print its table and headline.

    Args:
        args: of a parser that `add_arguments` was given.

    Returns:
        0; 1 where nothing trained or an implementation failed; 2 for options that do not fit; 130 after
        Ctrl-C. The report is written in each case but 2.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        _check_options(args)
        if args.quality:
            return quality.run(args)
        settings = settings_of(args)
    except ValueError as error:
        return _refuse(error)
    return find(settings, args.out or Path("runs") / f"longcontext-{stamp}")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options of the search with --quality, and the other way round: they would change nothing."""
    unused, settings = (_SEARCH_ALONE, Settings) if args.quality else (_QUALITY_ALONE, quality.Settings)
    for name in unused:
        if getattr(args, name) != getattr(settings, name):
            where = "without" if args.quality else "with"
            raise ValueError(f"--{name.replace('_', '-')}: expected {where} --quality alone")


def find(settings: Settings, folder: Path) -> int:
    """Search by `settings` and write the report to `folder`; returns `run`'s status."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.monotonic()
    interrupted = False
    with Progress(list(settings.implementations)) as progress:
        limit = "no time limit" if settings.minutes is None else f"at most {settings.minutes:g} minutes"
        progress.say(
            f"{settings.title()}, batch 1, {settings.dtype} on {settings.device}, "
            f"dropout {settings.dropout}: longest context within {gigabytes(settings.memory)}; {limit}"
        )
        try:
            session = Session(settings, progress)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            return _refuse(error)
        with session:
            try:
                session.run()
            except KeyboardInterrupt:
                interrupted = True
    seconds = time.monotonic() - begin
    result = result_of(session, started=started, seconds=seconds, interrupted=interrupted)
    write_report(result, folder)
    print(f"{longest_table(result)}\n\npeak memory at the same contexts, GB:\n{memory_table(result)}")
    for note in result["notes"]:
        print(f"! {note}")
    print(f"\n{result['verdict']}\nreport: {folder / 'longcontext.md'}")
    if interrupted:
        return 130
    failed = any(point["status"] == "failed" for point in result["points"])
    return int(failed or not any(row["longest"] for row in result["implementations"].values()))


def _refuse(error: Exception) -> int:
    print(f"fastattn longcontext: {error}", file=sys.stderr)
    return 2
