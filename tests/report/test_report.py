"""`fastattn report`: rows of every kind in one shape, a page that is whole and asks for nothing."""

from __future__ import annotations

import csv
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

from fastattn import report
from fastattn.cli import main
from fastattn.report import features, figures, rows, tables
from fastattn.report.look import look_of
from fastattn.testing import FEATURES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MACHINE = {"cpu": "A CPU", "isa": "AVX2", "cores": 2, "gpu": None, "memory_bytes": 24e9, "threads": 2}


def tidy(**columns: Any) -> dict[str, Any]:
    """A row of schema 2, made up."""
    row = {
        **{"schema": 2, "started": "2026-01-02T03:04:05+00:00", "suite": "attention", "device": "cpu"},
        **{
            "processor": "A CPU",
            "isa": "avx2",
            "threads": 2,
            "torch": "2.13.0",
            "triton": "",
            "fastattn": "1.0",
        },
        **{"op": "attention", "pass": "both", "dtype": "float32", "batch": 1, "heads": 4, "kv_heads": 4},
        **{"length": 512, "head_dim": 64, "v_dim": 64, "mask": "causal", "dropout": 0, "extra": ""},
        **{"implementation": "fastattn", "version": "", "kernel": "cpu", "status": "ok", "note": ""},
        **{"error_of_budget": 0.1, "rounds": 5, "p20_ms": 9.0, "p50_ms": 10.0, "p80_ms": 11.0, "flops": 1e9},
        **{"bytes": 1e6, "gflops": 100.0, "gb_per_s": 1.0, "share_of_ceiling": 0.5, "ceiling": "fma"},
        "peak_mb": 5.0,
    }
    assert set(columns) <= set(row)
    return row | columns


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind: two runs of attention, a training step, and the results of commands."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for length in (512, 1024):
        for head_dim, mask in ((64, "causal"), (128, "none")):
            case = {"length": length, "head_dim": head_dim, "mask": mask}
            lines.append(tidy(**case))
            lines.append(
                tidy(**case, implementation="sdpa", kernel="flash", p50_ms=25.0, gflops=40.0, peak_mb=6.0)
            )
    lines.append(tidy(implementation="naive", status="wrong", p50_ms=""))
    lines.append(tidy(op="ceiling", implementation="fma", gflops=200.0, p50_ms="", **{"pass": "forward"}))
    step = {
        "op": "gpt2",
        "pass": "step",
        "length": 1024,
        "head_dim": "",
        "mask": "",
        "extra": '{"size":"GPT-2 124M"}',
    }
    lines.append(tidy(**step, p50_ms=5000.0, peak_mb=4000.0, gflops=""))
    lines.append(tidy(**step, implementation="standard", p50_ms=11000.0, peak_mb=6000.0, gflops=""))
    write(folder / "runs" / "new.csv", lines)
    write(folder / "runs" / "old.csv", [tidy(started="2025-01-01", p50_ms=99.0)])
    for name, result in results().items():
        (folder / f"{name}.json").write_text(json.dumps(result))
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


def test_every_part_has_plots_or_tables_that_are_not_empty(page: Path) -> None:
    text, reader = page.read_text(), read(page)
    parts = re.findall(r'<section id="([a-z]+)">(.*?)</section>', text, re.DOTALL)
    assert [name for name, _ in parts] == [
        *("speed", "peers", "ceiling", "memory", "training", "longest", "quality", "features", "rows")
    ]
    for name, body in parts:
        assert "<svg" in body or "<td" in body, name
        for svg in re.findall(r"<svg.*?</svg>", body, re.DOTALL):
            # curves or bars, and words: more than the frame that an empty plot has
            assert svg.count("<path") > 8 and svg.count("<text") > 5, name
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


def test_the_last_run_counts_and_what_is_wrong_does_not(folder: Path) -> None:
    found = rows.read_folder(folder)
    assert [why.partition(":")[0] for why in found.unread] == ["other.csv"]
    assert not any(row.implementation == "naive" for row in found.rows)
    ratios = {(ours.op, peer.implementation): ratio for ours, peer, ratio in rows.speedups(found.rows)}
    assert ratios == {("attention", "sdpa"): 2.5, ("gpt2", "standard"): 2.2}
    table = tables.training(found.rows, found.results)
    ours = next(line for line in table.lines if line[2] == "fastattn")
    # 817e9 operations in 5 s of a ceiling of 200e9 a second
    assert ours[3:] == ["5.00", "205", "82 %", "4.00", "2.20×"]


def test_kept_rows_are_read_whole(tmp_path: Path) -> None:
    found = rows.read_folder(RESULTS)
    assert len(found.rows) > 250
    assert {row.op for row in found.rows} >= {"attention", "decode", "gpt2"}
    # one measurement of each implementation for a problem of a run
    seen: set[tuple[Any, ...]] = set()
    for row in rows.latest(found.rows):
        key = (row.run, row.processor, row.problem, row.implementation)
        assert key not in seen
        seen.add(key)
    assert all(ours.p50_ms and peer.p50_ms for ours, peer, _ in rows.speedups(found.rows))
    for draw in (figures.speed_by_length, figures.speedup_by_peer, figures.share_of_ceiling):
        assert draw(found.rows) is not None


def test_rows_of_a_gpu_check_are_read(tmp_path: Path) -> None:
    from fastattn.gpu_check.rows import COLUMNS

    row = dict.fromkeys(COLUMNS, "") | {"date": "2026-01-02", "started": "03:04:05", "run": "gpu"}
    row |= {"machine": "A GPU", "status": "ok", "passes": "forward", "case": "causal d 64", "tflops": "300"}
    row |= {"implementation": "fastattn", "p50_ms": "1.5", "length": "4096", "head_dim": "64"}
    write(tmp_path / "gpu.csv", [row, row | {"status": "wrong"}, row | {"run": "dry-run"}])
    (one,) = rows.read_folder(tmp_path).rows
    assert (one.processor, one.gflops, one.mask, one.length) == ("A GPU", 300_000, "causal", 4096)


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


def test_no_two_implementations_look_alike() -> None:
    looks = look_of(["sdpa", "naive", "fastattn", "flex", "naive compiled", "xformers"])
    assert len({look["color"] for look in looks.values()}) == 6
    assert looks["fastattn"]["color"] == look_of(["fastattn"])["fastattn"]["color"]


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


def test_what_a_kept_comparison_called_fastattn_was_its_attention() -> None:
    found = rows._result(RESULTS / "compare_gpt2_1024.json")
    assert (found["baseline"], found["ours"]) == ("standard", "attention")
    assert list(found["train"]) == list(found["implementations"]) == ["standard", "sdpa", "attention"]
    assert {s["implementation"] for s in found["samples"] + found["sweep"]} == set(found["train"])
    assert set(found["parity"]["largest"]) == {"sdpa", "attention"} and found["versions"]["fastattn"]
    assert found["verdict"].startswith("fastattn's attention trains")
