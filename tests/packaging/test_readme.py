"""The README's Python runs as it stands, and its table names the variables there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_examples_run() -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)


def test_variables_are_those_of_the_code() -> None:
    named = set(re.findall(r"`(FASTATTN_[A-Z_]+)`", (ROOT / "README.md").read_text()))
    sources = [ROOT / "setup.py", *(ROOT / "fastattn").rglob("*.py")]
    read = {
        name
        for path in sources
        for name in re.findall(r"environ(?:\.get\(|\[)\"(FASTATTN_[A-Z_]+)\"", path.read_text())
    }
    assert named == read


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    assert not [link for link in links if not (page.parent / link).exists()]
