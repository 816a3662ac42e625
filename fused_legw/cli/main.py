"""The command line: plan a recipe, verify the kernels on this machine, say what runs where, or run the demo."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .info import run_info
from .output import Parser, UsageError
from .plan import add_plan
from .verify import add_verify


def _add_demo(parser: argparse.ArgumentParser) -> None:
    # Imported here, because only this command needs its dependencies.
    try:
        demo = importlib.import_module("fused_legw.demo.program")
    except ImportError as error:
        raise UsageError(f"demo needs its extra, pip install 'fused-legw[demo]': {error}") from error
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog="fused-legw", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fused-legw {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    about = {
        "plan": "scale a tuned recipe to other batch sizes",
        "verify": "check the fused optimizers against the float64 reference, on this machine",
        "info": "say which versions and devices there are, and what runs on each",
        "demo": "train on real data at several batch sizes",
    }
    made = {
        name: commands.add_parser(name, help=does, description=does, allow_abbrev=False) for name, does in about.items()
    }
    add_plan(made["plan"])
    add_verify(made["verify"])
    made["info"].add_argument("--json", action="store_true", help="print JSON")
    made["info"].set_defaults(run=run_info)
    if command == "demo":
        _add_demo(made["demo"])
    return parser


def _run(argv: Sequence[str]) -> int:
    parser = _parser(argv[0] if argv else None)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    status: int = args.run(args)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status.

    Raises:
        SystemExit: with status 2, for arguments that are not valid.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except UsageError as error:
        Parser().error(str(error))
    except KeyboardInterrupt:
        print("fused-legw: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader is gone (`| head`). Python's remaining output must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        Parser().error(str(error))
