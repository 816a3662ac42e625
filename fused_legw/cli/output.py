"""Output of the command line: errors in one line, and tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """The arguments are not valid. The message names the argument and its value."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fused-legw: error: {message}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True))


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def valid(make: Any, *args: Any, note: str = "", **kwargs: Any) -> Any:
    """Call `make`. Turns its ValueError into a UsageError, and the argument's name at its start into the option's."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise UsageError(re.sub(r"^\w+", lambda name: option(name[0]), str(error)) + note) from error
