"""Every block of code on every page runs, and prints what the page says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import pages
from tests.support.pages import PAGES, ROOT

OURS = "cuda", "sklearn", "matplotlib"  # what our own extras install: such blocks run here, without a warning


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, and without Triton's interpreter: on CPUs pages speak of ATen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(page)], ids=_name)
def test_page(page: Path) -> None:
    foreign = [name for block in pages.blocks(page) for name in block.needs if name not in OURS]
    run = _run_apart if any(pages.available(name) for name in foreign) else pages.run
    left_out = run(page)
    if left_out:
        pytest.skip("; ".join(left_out))


def _run_apart(page: Path) -> list[str]:
    """In a process of its own: frameworks change the process they are in, and warn as they please."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.support.pages", str(page)]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if " needs " in line]


def _page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "does not print"),
        ("```diff\n-print(1)\n+print(2)\n```\n```text\n1\n```\n", "does not print"),
        ("```sh\nfused-legw plan\n```\n", "ended with 2"),
        ("```sh\nfused-legw nothing\n```\n", "ended with 2"),
        ("```sh\nmake nothing\n```\n", "no such target"),
        ("```diff\nprint(1)\n```\n", "begin with neither"),
    ],
)
def test_a_page_that_says_something_else_is_found(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text("test: ready\n")
    with pytest.raises(pages.Failure, match=says):
        pages.run(_page(tmp_path, text))


def test_blocks_of_a_page_share_names_and_a_diff_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    text = "```python\na = 1\n```\nprose\n```diff\n b = 0\n-b = 1\n+b = 2\n```\n"
    text += "```python\nprint(a, b)\n```\n```text\n1 2\n```\n"
    assert pages.run(_page(tmp_path, text)) == []


def test_a_block_that_needs_more_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = _page(tmp_path, "```python\n# needs no_such_package, torch\nraise RuntimeError\n```\n")
    assert pages.run(page) == ["page.md:2 needs no_such_package"]


def test_errors_have_the_line_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(ZeroDivisionError) as raised:
        pages.run(_page(tmp_path, "# title\n\n```python\na = 1\n1 / 0\n```\n"))
    assert raised.traceback[-1].lineno == 4  # counted from 0
