"""How the command line speaks: errors in one line, and tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """What the user asked for makes no sense; the message names the argument and its value."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fused-legw: error: {message}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True))


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def valid(make: Any, *args: Any, note: str = "", **kwargs: Any) -> Any:
    """make(...), its ValueError turned into one that names the option: its messages start with the argument's name."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise UsageError(re.sub(r"^\w+", lambda name: option(name[0]), str(error)) + note) from error
