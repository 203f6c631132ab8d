"""The report as one HTML page that asks for nothing else, and as Markdown with images beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Final

from fastattn.report.look import png, svg
from fastattn.report.rows import Found
from fastattn.report.sections import Headline, Section
from fastattn.report.tables import Table

_TITLE: Final = "fastattn, measured"
_CSS: Final = Path(__file__).with_name("page.css")


def html_page(found: Found, parts: Sequence[Section], heads: Sequence[Headline]) -> str:
    """The whole page; light or dark as the reader's system is."""
    links = "".join(f'<a href="#{part.name}">{html.escape(part.title)}</a>' for part in parts)
    cards = "".join(
        f"<li><b>{_text(head.number)}</b> <strong>{_text(head.of)}</strong> {_text(head.what)}</li>"
        for head in heads
    )
    body = "".join(_html_section(part) for part in parts)
    about = "".join(f"<p>{_text(line)}</p>" for line in about_lines(found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_TITLE}</title><style>{_CSS.read_text(encoding='utf-8')}</style></head>\n<body>"
        f"<header><h1>{_TITLE}</h1>{about}<nav>{links}</nav></header>\n<main>"
        f'<ul class="cards">{cards}</ul>{body}</main>'
        f"<footer>{''.join(f'<p>{_text(line)}</p>' for line in source_lines(found))}</footer></body></html>\n"
    )


def markdown_page(found: Found, parts: Sequence[Section], heads: Sequence[Headline]) -> str:
    """The same in Markdown; figures are PNG files beside it, named as their pictures are."""
    blocks = [f"# {_TITLE}", *about_lines(found)]
    if heads:
        blocks.append("\n".join(f"- **{head.number}** {head.of}, {head.what}" for head in heads))
    for part in parts:
        blocks += [f"## {part.title}", *part.words]
        blocks += [f"![{picture.label}]({picture.name}.png)" for picture in part.pictures]
        for caption, table in part.tables:
            if table.lines:
                shown = _markdown_table(table)
                summary = f"<details><summary>{len(table.lines)} rows</summary>\n\n{shown}\n\n</details>"
                blocks += [*([caption] if caption else []), summary if part.folded else shown]
    return "\n\n".join([*blocks, "---", *source_lines(found)]) + "\n"


def write_images(parts: Sequence[Section], folder: Path) -> list[Path]:
    """A PNG of each picture."""
    written = []
    for part in parts:
        for picture in part.pictures:
            written.append(folder / f"{picture.name}.png")
            written[-1].write_bytes(png(picture.figure))
    return written


def about_lines(found: Found) -> list[str]:
    """Where and when the rows were measured."""
    named = sorted({str(row.machine) for row in found.rows})
    # without the one that is only said with less detail
    places = [place for place in named if not any(other.startswith(place + ",") for other in named)]
    versions = sorted({row.versions for row in found.rows})
    days = sorted({row.date.date().isoformat() for row in found.rows})
    lines = []
    if places:
        lines.append("Measured on " + "; ".join(places) + ".")
    if days:
        span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(f"{len(found.rows):,} rows of {span}, with {'; '.join(versions)}.")
    return lines


def source_lines(found: Found) -> list[str]:
    """What was read, and what was not."""
    lines = [
        "Times are medians, and ratios of times that were taken in turns. Of a problem that was measured "
        "more than once on a machine, the last race is shown.",
        f"Made on {date.today().isoformat()} by fastattn report from: {', '.join(found.files)}.",
    ]
    if found.unread:
        lines.append(f"Not read: {'; '.join(found.unread)}.")
    return lines


def _html_section(part: Section) -> str:
    words = "".join(f"<p>{_text(text)}</p>" for text in part.words)
    pictures = "".join(
        f"<figure>{svg(picture.figure, picture.name, html.escape(picture.label, quote=True))}</figure>"
        for picture in part.pictures
    )
    shown = ""
    for caption, table in part.tables:
        if table.lines:
            made = _html_table(caption, table)
            count = len(table.lines)
            shown += f"<details><summary>{count} rows</summary>{made}</details>" if part.folded else made
    return f'<section id="{part.name}"><h2>{html.escape(part.title)}</h2>{words}{pictures}{shown}</section>\n'


def _html_table(caption: str, table: Table) -> str:
    numeric = [_is_numeric(table, column) for column in range(len(table.head))]
    head = "".join(f"<th{_class(n)}>{_text(cell)}</th>" for cell, n in zip(table.head, numeric, strict=True))
    lines = ""
    for i, line in enumerate(table.lines):
        cells = "".join(f"<td{_class(n)}>{_text(cell)}</td>" for cell, n in zip(line, numeric, strict=True))
        lines += f"<tr{' class=ours' if i in table.ours else ''}>{cells}</tr>"
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _is_numeric(table: Table, column: int) -> bool:
    cells = [line[column] for line in table.lines if line[column]]
    return bool(cells) and all(re.match(r"[\d.,]+( ?[×%])?$", cell) for cell in cells)


def _class(numeric: bool) -> str:
    return " class=n" if numeric else ""


def _text(text: str) -> str:
    """Escaped, with what is between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _markdown_table(table: Table) -> str:
    numeric = [_is_numeric(table, column) for column in range(len(table.head))]
    rule = "|".join("---:" if n else "---" for n in numeric)
    lines = [table.head, *table.lines]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    for i in table.ours:
        cells[i + 1] = [f"**{cell}**" if cell else "" for cell in cells[i + 1]]
    text = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([text[0], f"|{rule}|", *text[1:]])
