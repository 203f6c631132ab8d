"""`fastattn report`: one page of tables and plots from measured rows.

`rows` reads every file that is kept, `sections` says what to show of it with the figures of `figures` and the
tables of `tables`, `page` writes it down.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastattn.report.rows import read_folder

__all__ = ["add_arguments", "run", "write"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastattn report`.

    Args:
        parser: gets the options.
    """
    parser.add_argument(
        "rows", type=Path, nargs="?", default=Path("bench/results"), help="folder of rows (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `fastattn report` and tell where the page is.

    Returns:
        0, or 1 where there are no rows.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        page = write(args.rows, args.out)
    except FileNotFoundError as error:
        print(f"fastattn report: {error}", file=sys.stderr)
        return 1
    print(f"report: {page} ({page.stat().st_size / 1e6:.2f} MB), {page.with_name('report.md')}")
    return 0


def write(rows: Path, folder: Path) -> Path:
    """Write index.html, report.md and its images.

    Args:
        rows: folder of the files that `rows` reads, at any depth.
        folder: made if it is not there.

    Returns:
        The HTML page.

    Raises:
        FileNotFoundError: no rows.
        ModuleNotFoundError: matplotlib is missing.
    """
    found = read_folder(rows)
    from fastattn.report import page, sections  # noqa: PLC0415, needs matplotlib

    parts, heads = sections.sections(found), sections.headlines(found)
    folder.mkdir(parents=True, exist_ok=True)
    page.write_images(parts, folder)
    (folder / "report.md").write_text(page.markdown_page(found, parts, heads), encoding="utf-8")
    written = folder / "index.html"
    written.write_text(page.html_page(found, parts, heads), encoding="utf-8")
    return written
