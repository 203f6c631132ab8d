"""`fastattn compare gpt2`: GPT-2 by standard attention, by torch's best, and by ours in part and in whole.

The command is `add_arguments` and `run`. A `Session` runs child processes (`worker`, seen from the parent by
`process`) and keeps their samples, `result` makes numbers of these, `report` and `plots` a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from fastattn.gpt2.compare.progress import Progress, gigabytes
from fastattn.gpt2.compare.report import sweep_table, train_table, warnings, write_report
from fastattn.gpt2.compare.result import result_of
from fastattn.gpt2.compare.session import Session
from fastattn.gpt2.compare.settings import IMPLEMENTATIONS, Settings, add_arguments, settings_of

__all__ = ["add_arguments", "compare", "run"]


def run(args: argparse.Namespace) -> int:
    """Run `fastattn compare gpt2` and print its table and verdict.

    Args:
        args: of a parser that `add_arguments` was given.

    Returns:
        0; 1 where an implementation failed or ours differs in its losses; 2 for options that do not fit;
        130 after Ctrl-C. The report is written in each case but 2.

    Raises:
        ModuleNotFoundError: transformers is missing.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"gpt2-compare-{stamp}"
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("fastattn compare gpt2 trains transformers' GPT-2", name="transformers")
    try:
        settings = settings_of(args)
    except ValueError as error:
        return _refuse(error)
    return compare(settings, folder)


def compare(settings: Settings, folder: Path) -> int:
    """Compare by `settings` and write the report to `folder`; returns `run`'s status."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.monotonic()
    interrupted = False
    with Progress(settings.implementations) as progress:
        budget = settings.time_budget
        time_limit = "no time budget" if budget is None else f"time budget {budget / 60:.1f} min"
        progress.say(
            f"{settings.title()}, batch {settings.batch} × {settings.context:,} tokens, {settings.dtype} on "
            f"{settings.device}, dropout {settings.dropout}: {settings.steps} steps each; {time_limit}"
        )
        try:
            session = Session(settings, progress)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            return _refuse(error)
        with session:
            memory = session.device_budget or session.memory_budget
            progress.say(f"memory budget {gigabytes(memory)}; what needs more is stopped or not run")
            try:
                session.run()
            except KeyboardInterrupt:
                interrupted = True
    seconds = time.monotonic() - begin
    result = result_of(session, started=started, seconds=seconds, interrupted=interrupted)
    write_report(result, folder)
    print(train_table(result["train"], result["parity"]["largest"]))
    if result["sweep"]:
        print(f"\none training step by context:\n{sweep_table(result)}")
    for warning in warnings(result):
        print(f"! {warning}")
    print(f"\n{result['verdict']}\nreport: {folder / 'report.md'}")
    if interrupted:
        return 130
    # torch.compile needs a compiler that may be missing: its failure is told, and is none of the comparison
    failed = any(
        stop.status == "failed" and not IMPLEMENTATIONS[name].compiled
        for name, stop in session.stopped.items()
    )
    unlike = result["parity"]["passed"] is False
    return int(failed or unlike or settings.ours not in result["train"])


def _refuse(error: Exception) -> int:
    print(f"fastattn compare gpt2: {error}", file=sys.stderr)
    return 2
