"""What the pages hold themselves to: their length, their links, every public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import fused_legw
from fused_legw import variants
from tests.support.pages import PAGES, ROOT, tables, words

README = ROOT / "README.md"
PROSE = [page for page in PAGES if page.parent.name != "api" and page.name not in ("README.md", "design.md")]


def test_the_readme_is_short_and_says_early_how_to_install():
    assert len(words(README)) <= 700
    lines = README.read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("pip install")) < 60


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_short(page: Path) -> None:
    assert len(words(page)) <= 600


def test_words_are_those_of_the_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n![no](no.png)<br>two [words](a.md) `no`\n\n```python\nno = 1\n```\n| 1.5 | x |\n|--|--|\n"
    )
    assert words(page) == ["A", "title", "two", "words", "1.5", "x"]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_of_the_readme_lead_somewhere():
    """The site's own links are checked where it is built."""
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = ROOT / path if path else README
        assert page.exists(), target
        assert not anchor or anchor in _anchors(page), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:benchmarks|docs|examples|fused_legw|kernels|tests)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_public_name_is_in_the_reference():
    shown = set(re.findall(r"(?m)^::: fused_legw\.(?:[a-z_]+\.)*(\w+)$", "".join(p.read_text() for p in PAGES)))
    assert set(fused_legw.__all__) <= shown


@pytest.mark.parametrize(("number", "rows"), [(0, variants.LARS), (1, variants.LAMB)], ids=["LARS", "LAMB"])
def test_the_tables_of_variants_are_those_of_the_code(number: int, rows: dict) -> None:
    table = tables(ROOT / "docs/guides/variants.md")[number]
    assert [row["variant"] for row in table] == list(rows)
    for row in table:
        axes = variants.axes(rows, {"variant": row.pop("variant")})
        assert row == {axis: "" if axes[axis] is None else str(axes[axis]) for axis in row}


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
    assert spec and spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]
    assert (ROOT / "docs/images/schedule.png").exists()
