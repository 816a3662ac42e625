"""The pages of the documentation: their blocks of code, run in order, and their prose.

    python -m tests.support.pages PAGE    runs a page's blocks; prints those that it left out, and why

Python blocks share one namespace per page. A block whose first line is `# needs NAME, NAME` is left out where one of
those cannot be imported; `cuda` stands for a GPU. A diff is run as the program that it changes, and then as the one
that it makes, which goes on. Of shell blocks the commands `fused-legw plan` and `fused-legw info` are run. A text block
right after one of these is what it prints; `...` in it stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import shlex
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from fused_legw.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNS = "plan", "info"  # the commands that are run; of others their names are checked
FENCE = re.compile(r"(?ms)^```(\w*)[^\n]*\n(.*?)^```\n?")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, on which the code begins
    output: str | None  # of the text block right after

    @property
    def needs(self) -> list[str]:
        first = self.code.partition("\n")[0]
        return [name.strip() for name in first[len("# needs ") :].split(",")] if first.startswith("# needs ") else []

    @property
    def missing(self) -> list[str]:
        """What it needs and this machine lacks."""
        return [name for name in self.needs if not available(name)]


class Failure(AssertionError):
    """A block that does not do what its page says."""


def available(name: str) -> bool:
    return torch.cuda.is_available() if name == "cuda" else importlib.util.find_spec(name) is not None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    result = []
    for match, after in zip_longest(found, found[1:]):
        printed = after and after[1] == "text" and not text[match.end() : after.start()].strip()
        line = text.count("\n", 0, match.start(2)) + 1
        result.append(Block(match[1], match[2], line, after[2] if after and printed else None))
    return result


def sides(diff: str) -> tuple[str, str]:
    """The program that a diff changes, and the one that it makes."""
    lines = diff.splitlines(keepends=True)
    if odd := [line for line in lines if line[0] not in "+- \n"]:
        raise Failure(f"a diff has lines that begin with neither +, - nor a space: {odd}")
    return tuple("".join(line[1:] or "\n" for line in lines if line[0] != left) for left in "+-")  # type: ignore[return-value]


def commands(shell: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines() if line.strip()]


def run(page: Path) -> list[str]:
    """Run a page's blocks; those that were left out, and why."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    left_out = []
    for block in blocks(page):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.missing:
            left_out.append(f"{place} needs {', '.join(block.missing)}")
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.language == "python":
                execute(block.code, page, block.line, namespace)
            elif block.language == "diff":
                before, after = sides(block.code)
                execute(before, page, block.line, {"__name__": "__main__"})
                execute(after, page, block.line, namespace)
            elif block.language == "sh":
                for words in commands(block.code):
                    command(words)
        if block.output is not None and block.language in ("python", "diff", "sh"):
            compare(block.output, printed.getvalue(), place)
    return left_out


def execute(code: str, page: Path, line: int, namespace: dict[str, object]) -> None:
    # Empty lines before it, so that a traceback has the page's line.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def command(words: list[str]) -> None:
    if words[0] == "fused-legw":
        try:
            main(words[1:] if words[1] in RUNS else [words[1], "--help"])
        except SystemExit as stopped:
            if stopped.code:
                raise Failure(f"{shlex.join(words)} ended with {stopped.code}") from stopped
    elif words[0] == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
        if words[1] not in targets:
            raise Failure(f"{shlex.join(words)}: the Makefile has no such target")


def compare(expected: str, printed: str, place: str) -> None:
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not checker.check_output(expected, printed, flags):
        example = doctest.Example("", expected)
        raise Failure(f"{place} does not print what the page says\n{checker.output_difference(example, printed, 0)}")


def words(page: Path) -> list[str]:
    """The prose of a page: without code, pictures, tags, addresses and directives."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"(?s)<!--.*?-->|<[^>]+>", " ", text)
    text = re.sub(r"(?m)^:::.*\n(?: +.*\n)*", "", text)
    text = re.sub(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])", " ", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"`[^`]*`", " ", text)
    return re.findall(r"\w[\w.,'’–-]*", text)


def tables(page: Path) -> list[list[dict[str, str]]]:
    """The tables of a page: a dict per row, without the marks of code."""
    found = []
    for table in re.findall(r"(?m)(?:^\|.*\n)+", page.read_text()):
        head, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


if __name__ == "__main__":
    print(*run(Path(sys.argv[1])), sep="\n")
