"""`fastattn report`: a page that is whole, shows everything that was measured, and asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from fastattn import report
from fastattn.cli import main
from fastattn.report import features, sections
from fastattn.report.rows import read_folder
from fastattn.testing import FEATURES
from tests.report.measured import attention, begin, ceilings, step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MACHINE = {"cpu": "A CPU", "isa": "AVX2", "cores": 2, "gpu": None, "memory_bytes": 24e9, "threads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of attention, one of training steps, and the results of commands."""
    folder = tmp_path_factory.mktemp("rows")
    run = begin(folder / "runs")
    ceilings(run)
    for length in (512, 1024):
        for mask, dim in (("causal", 64), ("none", 128), ("window", 64)):
            for passes in ("forward", "both"):
                times = {"fastattn": length / 50, "sdpa default": length / 20, "naive": length / 4}
                attention(run, times, mask=mask, length=length, dim=dim, passes=passes, peak_mb=length / 100)
    step(run, {"fastattn": 5000.0, "sdpa": 10000.0, "standard": 11000.0})
    run.close()
    for name, result in results().items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    shutil.copy(RESULTS / "compare_gpt2_1024.json", folder)
    (folder / "other.csv").write_text("a,b\n1,2\n")
    return folder


def results() -> dict[str, dict[str, Any]]:
    common = {"schema": 1, "started": "2026-01-02", "machine": MACHINE, "versions": {"torch": "2.13.0"}}
    point = {"status": "trained", "ms": 1.0, "loss": 1.0, "reason": None}
    summary = {
        "edge": "run",
        "predicted": None,
        "refused": 2048,
        "ms": 9.0,
        "peak_bytes": 10**9,
        "stopped": None,
    }
    longest = common | {
        "kind": "longcontext",
        "settings": {
            "memory": 2**34,
            "dtype": "float32",
            "at": [1024],
            "dropout": 0.1,
            "positions": "learned",
        },
        "model": {"title": "GPT-2 124M"},
        "implementations": {"standard": summary | {"longest": 1024}, "fastattn": summary | {"longest": 9216}},
        "points": [
            {"implementation": name, "context": t, "peak_bytes": t * size} | point
            for name, size in (("standard", 9000), ("fastattn", 1000))
            for t in (512, 1024)
        ],
        "memory_at": {"1024": {"measured": {"standard": 9216000, "fastattn": 1024000}, "predicted": {}}},
        "verdict": "A verdict on length.",
    }
    without = longest | {
        "settings": longest["settings"] | {"dropout": 0.0},
        "implementations": {"fastattn": summary | {"longest": 3072}},
        "verdict": "A verdict on length without dropout.",
    }
    held = {"512": 2.0, "1024": 1.5}
    quality = common | {
        "kind": "quality",
        "rows": [{"context": t, "held_out_loss": 1.5, "held_out": held} for t in (256, 1024)],
        "verdict": "A verdict on quality.",
    }
    training = common | {
        "kind": "training",
        "settings": {"margin": 0.02},
        "runs": [{"implementation": n, "seed": 1, "held_out": held} for n in ("standard", "fastattn")],
        "verdict": "A verdict on training.",
    }
    return {"longcontext": longest, "longcontext-without": without, "quality": quality, "training": training}


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(folder, tmp_path_factory.mktemp("report"))


class Reader(HTMLParser):
    """What a page is made of, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.asks: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            fetched = name in ("src", "srcset", "data", "poster", "background", "action") or name.endswith(
                "href"
            )
            if fetched and not (value or "").startswith(("#", "data:")):
                self.asks.append(f"{tag} {name}={value}")
            for address in re.findall(r"url\(([^)]*)\)", value or ""):
                if not address.startswith(("#", "data:")):
                    self.asks.append(address)
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.asks.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "td":
            self.cells.append(data)
        if self.tags and self.tags[-1] == "style" and re.search(r"@import|url\(|//", data):
            self.asks.append("style")


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    return reader


def test_the_page_asks_for_nothing_and_is_small(page: Path) -> None:
    reader = read(page)
    assert reader.asks == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert page.stat().st_size < 3_000_000


# What there is to see: the panels of each picture, by section.
SHOWN = {
    "speed": {"speed-0": 3, "speed-1": 3},
    "peers": {"peers-0": 1},
    "ceiling": {"ceiling-0": 1},
    "memory": {"memory-0": 3, "memory-1": 3},
    "training": {"steps": 1, "loss": 3, "seeds": 2},
    "longest": {"longest-0": 2, "longest-1": 2},
    "quality": {"quality": 2},
    "features": {},
    "rows": {},
}


def test_every_part_has_its_plots_and_no_panel_of_them_is_empty(folder: Path) -> None:
    parts = sections.sections(read_folder(folder))
    panels = {part.name: {picture.name: drawn(picture.figure) for picture in part.pictures} for part in parts}
    assert {name: {one: len(own) for one, own in own.items()} for name, own in panels.items()} == SHOWN
    assert all(own for by_picture in panels.values() for picture in by_picture.values() for own in picture)
    # three implementations at two lengths each, in every panel
    for name in ("speed", "memory"):
        for picture in panels[name].values():
            assert all([len(line) for line in own] == [2, 2, 2] for own in picture)
    assert len(panels["training"]["steps"][0]) == 3
    tables = {part.name: [len(table.lines) for _, table in part.tables] for part in parts}
    assert tables["training"] == [6] and tables["peers"] == [6] and tables["rows"] == [39]


def drawn(figure: Figure) -> list[list[list[float]]]:
    """Of each panel: the values of every line that has points, and of every bar; not of lines across."""
    found = []
    for axes in figure.axes:
        if axes.get_visible():
            lines = [line.get_ydata() for line in axes.lines if line.get_transform() == axes.transData]
            bars = [[bar.get_width() * bar.get_height()] for bar in axes.patches]
            found.append([[float(y) for y in own] for own in (*lines, *bars) if len(own)])
    return found


def test_the_page_has_what_its_parts_have(page: Path) -> None:
    text, reader = page.read_text(), read(page)
    parts = re.findall(r'<section id="([a-z]+)">(.*?)</section>', text, re.DOTALL)
    assert [name for name, _ in parts] == list(SHOWN)
    for name, body in parts:
        assert body.count("<svg") == len(SHOWN[name]), name
    assert "class=ours" in text and "2.50×" in reader.cells
    assert "#1b1f24" not in text.split("</style>")[1], "ink that a dark page would hide"
    lengths = ("A verdict on length.", "A verdict on length without dropout.")
    for verdict in (*lengths, "A verdict on quality.", "A verdict on training."):
        assert verdict in text
    # each part is reached from the top, and each reference leads somewhere
    assert all(f'href="#{name}"' in text for name, _ in parts)
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(reader.ids)


def test_markdown_says_the_same_with_images_that_are_there(page: Path) -> None:
    text = page.with_name("report.md").read_text()
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(images) >= 7
    for image in images:
        assert (page.parent / image).read_bytes()[:4] == b"\x89PNG"
    assert "A verdict on length." in text and "**9,216**" in text and "other.csv" in text


def test_no_rows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "expected a folder" in error and "found none" in error


def test_the_feature_table_is_the_readmes_and_covers_what_is_tested() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | fastattn | flash-attn 2"))
    assert tuple(split(lines[start])[1:]) == features.SYSTEMS
    readme = [split(line) for line in lines[start + 2 :][: len(features.TABLE) + 1]]
    assert readme[-1] == [""], "a row more in the README than in fastattn/report/features.py"
    assert readme[:-1] == [[row.name, *row.cells] for row in features.TABLE]
    tested = [name for row in features.TABLE for name in row.tested]
    assert sorted(tested) == sorted(FEATURES)


def split(line: str) -> list[str]:
    """The cells of a line, without links; a bar within backticks is no border."""
    cells = re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip().removeprefix("|").removesuffix("|"))
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell.strip()) for cell in cells]


def browsers() -> Iterator[str]:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        found = shutil.which(name)
        if found:
            yield found


def test_chromium_shows_it_in_both_colour_schemes(page: Path, tmp_path: Path) -> None:
    browser = next(browsers(), None)
    if browser is None:
        pytest.skip("no Chromium on PATH")
    images = []
    for name, scheme in (("light", 1), ("dark", 0)):
        image = tmp_path / f"{name}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / name}", f"--blink-settings=preferredColorScheme={scheme}"]
        command += ["--window-size=1180,2400", f"--screenshot={image}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not image.exists():
            pytest.skip(f"{browser} takes no screenshot here: {done.stderr.strip()[-200:]}")
        images.append(image.read_bytes())
    assert all(len(image) > 50_000 for image in images)
    assert images[0] != images[1]
