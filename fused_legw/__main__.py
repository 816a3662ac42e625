"""The command line: plan a recipe, verify the kernels on this machine, say what runs where, or run the demo."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

import torch

from . import __version__, backends, selfcheck
from .decays import DECAYS, Decay, number
from .noise_scale import time_and_samples
from .schedule import LEGW

_DECAYS = {name.lower(): decay for name, decay in DECAYS.items()}


class UsageError(Exception):
    """What the user asked for makes no sense; the message names the argument and its value."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fused-legw: error: {message}\n")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True))


# plan


def _add_plan(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("the recipe, tuned at its own batch size")
    recipe.add_argument("--base-lr", type=float, required=True, help="peak LR")
    recipe.add_argument("--base-batch-size", type=int, required=True, help="global batch, in samples")
    recipe.add_argument("--base-warmup-epochs", type=float, required=True, help="0 for no warm-up")
    recipe.add_argument("--dataset-size", type=int, required=True, help="samples per epoch")
    recipe.add_argument("--epochs", type=float, help="length of the run; polynomial and cosine need it")
    parser.add_argument("--batch-size", type=int, nargs="+", required=True, metavar="B", help="batches to plan for")
    parser.add_argument("--scaling", choices=["sqrt", "linear", "none"], default="sqrt", help="of the peak LR")
    parser.add_argument("--decay", choices=_DECAYS, default="constant", help="after the warm-up")
    # Without defaults, to tell what was given: an option of another decay is an error.
    own = parser.add_argument_group("options of one decay", argument_default=argparse.SUPPRESS)
    own.add_argument("--milestones", type=float, nargs="*", metavar="E", help="multistep: epochs, increasing")
    own.add_argument("--factor", type=float, help="multistep: at each milestone")
    own.add_argument("--rate", type=float, help="exponential: per period")
    own.add_argument("--start-epoch", type=float, help="exponential: where it starts")
    own.add_argument("--every-epochs", type=float, help="exponential: length of a period")
    own.add_argument("--staircase", action=argparse.BooleanOptionalAction, help="exponential: whole periods only")
    own.add_argument("--power", type=float, help="polynomial")
    own.add_argument("--span", choices=["remaining", "whole"], help="polynomial: what it decays over")
    own.add_argument("--end-lr", type=float, help="polynomial, cosine: this run's LR at the end, not scaled")
    parser.add_argument(
        "--noise-scale",
        type=float,
        metavar="S",
        help="gradient noise scale in samples, as GradientNoiseScale measures it late in a baseline run: adds the "
        "updates and samples to a given loss over the fewest possible, and marks batches past S",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw LR against epochs, all batches in one figure")
    parser.set_defaults(run=run_plan)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _valid(make: Any, *args: Any, note: str = "", **kwargs: Any) -> Any:
    """make(...), its ValueError turned into one that names the option: its messages start with the argument's name."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise UsageError(re.sub(r"^\w+", lambda name: _option(name[0]), str(error)) + note) from error


def _decay(args: argparse.Namespace) -> Decay:
    cls = _DECAYS[args.decay]
    own = {field.name: field for field in fields(cls)}
    given = {field.name: vars(args)[field.name] for c in _DECAYS.values() for field in fields(c) if field.name in args}
    for name, value in given.items():
        if name not in own:
            raise UsageError(f"{_option(name)} {value} does not belong to --decay {args.decay}")
    for name, field in own.items():
        if name not in given and field.default is MISSING:
            raise UsageError(f"{_option(name)} is required for --decay {args.decay}")
    decay: Decay = _valid(cls, **given)
    return decay


def _schedules(args: argparse.Namespace) -> list[LEGW]:
    names = ("base_lr", "base_batch_size", "base_warmup_epochs", "dataset_size", "epochs", "scaling")
    recipe = {name: getattr(args, name) for name in names}
    decay = _decay(args)
    return [
        _valid(LEGW, **recipe, batch_size=batch, decay=decay, note=f" (--batch-size {batch})")
        for batch in args.batch_size
    ]


def _notes(s: LEGW) -> list[str]:
    """What someone should know before they train by this plan."""
    notes = []
    if s.steps_per_epoch < 1:
        notes.append(f"larger than the data set of {s.dataset_size}: less than one update an epoch")
    if s.total_steps is not None and s.warmup_steps >= s.total_steps:
        notes.append(f"{s.epochs:g} epochs end inside the warm-up of {s.warmup_epochs:g}: the peak is not reached")
    milestones = list(zip(getattr(s.decay, "milestones", ()), s.milestones, strict=True))
    if early := [epoch for epoch, t in milestones if t <= s.warmup_steps]:
        notes.append(
            f"milestones {early} fall inside the warm-up of {s.warmup_epochs:g} epochs: they count from its end"
        )
    if s.total_steps is not None and (late := [epoch for epoch, t in milestones if t >= s.total_steps]):
        notes.append(f"milestones {late} are never reached in {s.epochs:g} epochs")
    return [f"batch {s.batch_size}: {note}" for note in notes]


def _noise_notes(schedules: Sequence[LEGW], critical: float) -> list[str]:
    """Batches past the noise scale: there another doubling spends more samples than it saves updates."""
    notes = []
    for batch in (s.batch_size for s in schedules if s.batch_size > critical):
        updates, samples = time_and_samples(batch, critical)
        notes.append(
            f"batch {batch}: past the noise scale of {critical:g}: {samples:.3g} times the fewest samples, for "
            f"{updates:.3g} times the fewest updates"
        )
    return notes


def run_plan(args: argparse.Namespace) -> int:
    schedules = _schedules(args)
    notes = [note for schedule in schedules for note in _notes(schedule)]
    critical = args.noise_scale
    if critical is not None:
        critical = _valid(number, "noise_scale", critical)
        notes += _noise_notes(schedules, critical)
    if args.plot is not None:
        _plot(schedules, args)
    if args.json:
        names = ("batch_size", "scale", "peak_lr", "warmup_epochs", "warmup_steps", "steps_per_epoch", "total_steps")
        plans = [{name: getattr(s, name) for name in names} | {"schedule": s.to_dict()} for s in schedules]
        if critical is not None:
            for plan, s in zip(plans, schedules, strict=True):
                plan["relative_updates"], plan["relative_samples"] = time_and_samples(s.batch_size, critical)
        print(json.dumps({"plans": plans, "notes": notes}, indent=2))
        return 0
    rows = []
    for s in schedules:
        total = "-" if s.total_steps is None else f"{s.total_steps:.2f}"
        epochs = f"{s.warmup_epochs:.6g}", f"{s.warmup_steps:.2f}", f"{s.steps_per_epoch:.2f}"
        last = "-" if s.total_steps is None else f"{s(math.ceil(s.total_steps) - 1):.4g}"
        curve = () if critical is None else (f"{x:.3g}" for x in time_and_samples(s.batch_size, critical))
        rows.append((str(s.batch_size), f"{s.scale:.6g}", f"{s.peak_lr:.6g}", *epochs, total, last, *curve))
    header = ["batch", "k", "peak LR", "warm-up epochs", "warm-up updates", "updates/epoch", "total updates", "last LR"]
    header += [] if critical is None else ["S/S_min", "E/E_min"]
    print(_table(header, rows))
    print(*notes, sep="\n", end="\n" if notes else "")
    return 0


def _plot(schedules: Sequence[LEGW], args: argparse.Namespace) -> None:
    if not os.path.splitext(args.plot)[1] or os.path.isdir(args.plot):
        raise UsageError(f"--plot must be a file name that ends in .png, .pdf, .svg, ..., got {args.plot!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot {args.plot} needs matplotlib: pip install 'fused-legw[plot]'") from error
    noisy = args.noise_scale is not None
    figure = Figure(figsize=(12 if noisy else 7, 4), layout="constrained")
    ax, *others = figure.subplots(1, 2 if noisy else 1, squeeze=False)[0]
    for i, schedule in enumerate(schedules):
        schedule.plot(
            ax, color=_color(i, len(schedules)), label=f"batch {schedule.batch_size}: peak {schedule.peak_lr:.4g}"
        )
    ax.set_title(f"LEGW, {args.scaling} scaling, {args.decay} decay", loc="left")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    _finish(ax)
    for beside in others:
        _draw_curve(beside, [s.batch_size for s in schedules], args.noise_scale)
    try:
        figure.savefig(args.plot, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {args.plot} cannot be written: {error}") from error
    print(f"plot written to {args.plot}", file=sys.stderr)


def _color(i: int, n: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(1, n - 1))


def _finish(ax: Any) -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(framealpha=1, edgecolor="none")


def _draw_curve(ax: Any, batches: Sequence[int], critical: float) -> None:
    """Updates against samples, both over the fewest possible, with the batches on the curve."""
    smooth = [time_and_samples(critical * 10 ** (i / 50), critical) for i in range(-75, 76)]
    ax.plot([samples for _, samples in smooth], [updates for updates, _ in smooth], color="black", lw=1)
    for i, batch in enumerate(batches):
        updates, samples = time_and_samples(batch, critical)
        ax.plot(samples, updates, "o", label=f"batch {batch}", c=_color(i, len(batches)))
    ax.plot(2, 2, "x", color="black", label=f"the noise scale, {critical:g}")
    ax.set(xscale="log", yscale="log", xlabel="samples, over the fewest", ylabel="updates, over the fewest")
    ax.set_title("to a given loss: (S/S_min − 1)(E/E_min − 1) = 1", loc="left")
    _finish(ax)


# verify


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200, help="scheduled updates of each run (default: 200)")
    parser.add_argument("--backend", choices=sorted(backends.BACKENDS), help="only this one (default: all there are)")
    parser.add_argument("--case", choices=selfcheck.CASES, nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--dtype",
        choices=selfcheck.DTYPES,
        nargs="+",
        help="only these (default: all; in Triton's interpreter float32, and two more for the first case)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    if args.steps < 1:
        raise UsageError(f"--steps must be a positive integer, got {args.steps}")
    if args.backend == "triton" and not backends.has_triton():
        raise UsageError("--backend triton cannot run: triton is not installed")
    notes = list[str]()
    results = list(selfcheck.check(args.steps, notes, backend=args.backend, cases=args.case, dtypes=args.dtype))
    passed = all(result["passed"] for result in results)
    if args.json:
        print(json.dumps({"passed": passed, "notes": notes, "results": results}, indent=2))
        return int(not passed)
    rows = []
    for r in results:
        worst, where = r["worst"], r["device"] + (", interpreted" if r["interpreted"] else "")
        errors = f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}", f"{r['lr_error']:.1e}"
        counted = f"{r['steps_applied']}/{r['steps']}"
        rows.append((r["case"], r["backend"], where, r["dtype"], counted, *errors, "ok" if r["passed"] else "FAILED"))
    print(_table(("case", "backend", "device", "dtype", "steps", "error", "tolerance", "LR error", ""), rows))
    print(*notes, sep="\n", end="\n" if notes else "")
    print(f"{sum(r['passed'] for r in results)} of {len(results)} within tolerance of the float64 reference")
    return int(not passed)


# info


def run_info(args: argparse.Namespace) -> int:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices = []
    for name in names:
        backend, why = backends.explain_backend(torch.device(name))
        hardware = platform.processor() or platform.machine() if name == "cpu" else torch.cuda.get_device_name(name)
        devices.append({"device": name, "name": hardware, "backend": backend, "why": why})
    triton = importlib.import_module("triton").__version__ if backends.has_triton() else None
    versions = {"fused-legw": __version__, "torch": torch.__version__, "triton": triton}
    versions["python"] = platform.python_version()
    if args.json:
        print(json.dumps({"versions": versions, "interpreter": backends.interpreted(), "devices": devices}, indent=2))
        return 0
    for package, version in versions.items():
        print(f"{package:12}{version or 'absent'}")
    print(f"{'interpreter':12}{'on' if backends.interpreted() else 'off'}")
    for d in devices:
        print(f"{d['device']:12}{d['backend']} ({d['why']}), {d['name']}")
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    # Only for this command: it imports what the others do not need.
    try:
        demo = importlib.import_module("fused_legw.demo")
    except ImportError as error:
        raise UsageError(f"demo: {error}; pip install 'fused-legw[demo]'") from error
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="fused-legw", description=__doc__, allow_abbrev=False)
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
    _add_plan(made["plan"])
    _add_verify(made["verify"])
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
    """Run the command line; returns the exit status. Raises SystemExit(2) for arguments that make no sense."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except UsageError as error:
        _Parser().error(str(error))
    except KeyboardInterrupt:
        print("fused-legw: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`); what Python still holds for it must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _Parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
