"""`fused-legw plan`: takes a tuned recipe to other batch sizes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from ..checks import number
from ..schedules.decays import DECAYS, Decay
from ..schedules.legw import LEGW
from ..training.noise_scale import time_and_samples
from .output import UsageError, option, table, valid

_DECAYS = {name.lower(): decay for name, decay in DECAYS.items()}


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    tuned = parser.add_argument_group("the recipe, tuned at its own batch size")
    tuned.add_argument("--base-lr", type=float, required=True, help="peak LR")
    tuned.add_argument("--base-batch-size", type=int, required=True, help="global batch, in samples")
    tuned.add_argument("--base-warmup-epochs", type=float, required=True, help="0 for no warm-up")
    tuned.add_argument("--dataset-size", type=int, required=True, help="samples per epoch")
    tuned.add_argument("--epochs", type=float, help="length of the run; polynomial and cosine need it")
    parser.add_argument("--batch-size", type=int, nargs="+", required=True, metavar="B", help="batches to plan for")
    parser.add_argument("--scaling", choices=["sqrt", "linear", "none"], default="sqrt", help="of the peak LR")
    parser.add_argument("--decay", choices=_DECAYS, default="constant", help="after the warm-up")
    # Without defaults, so that an option of another decay can be noticed and refused.
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


def _decay(args: argparse.Namespace) -> Decay:
    cls = _DECAYS[args.decay]
    own = {field.name: field for field in fields(cls)}
    given = {field.name: vars(args)[field.name] for c in _DECAYS.values() for field in fields(c) if field.name in args}
    for name, value in given.items():
        if name not in own:
            raise UsageError(f"{option(name)} {value} does not belong to --decay {args.decay}")
    for name, field in own.items():
        if name not in given and field.default is MISSING:
            raise UsageError(f"{option(name)} is required for --decay {args.decay}")
    decay: Decay = valid(cls, **given)
    return decay


def _schedules(args: argparse.Namespace) -> list[LEGW]:
    names = ("base_lr", "base_batch_size", "base_warmup_epochs", "dataset_size", "epochs", "scaling")
    tuned = {name: getattr(args, name) for name in names}
    decay = _decay(args)
    return [
        valid(LEGW, **tuned, batch_size=batch, decay=decay, note=f" (--batch-size {batch})")
        for batch in args.batch_size
    ]


def _notes(s: LEGW) -> list[str]:
    """Warnings about a plan, to be read before training by it."""
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
    """Warnings about batches past the noise scale, where more samples are spent than updates saved."""
    notes = []
    for batch in (s.batch_size for s in schedules if s.batch_size > critical):
        updates, samples = time_and_samples(batch, critical)
        notes.append(
            f"batch {batch}: past the noise scale of {critical:g}: {samples:.3g} times the fewest samples, for "
            f"{updates:.3g} times the fewest updates"
        )
    return notes


def run_plan(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    schedules = _schedules(args)
    notes = [note for schedule in schedules for note in _notes(schedule)]
    critical = args.noise_scale
    if critical is not None:
        critical = valid(number, "noise_scale", critical)
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
    print(table(header, rows))
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
    """Draw updates against samples, both over the fewest possible, and the batches on that curve."""
    smooth = [time_and_samples(critical * 10 ** (i / 50), critical) for i in range(-75, 76)]
    ax.plot([samples for _, samples in smooth], [updates for updates, _ in smooth], color="black", lw=1)
    for i, batch in enumerate(batches):
        updates, samples = time_and_samples(batch, critical)
        ax.plot(samples, updates, "o", label=f"batch {batch}", c=_color(i, len(batches)))
    ax.plot(2, 2, "x", color="black", label=f"the noise scale, {critical:g}")
    ax.set(xscale="log", yscale="log", xlabel="samples, over the fewest", ylabel="updates, over the fewest")
    ax.set_title("to a given loss: (S/S_min − 1)(E/E_min − 1) = 1", loc="left")
    _finish(ax)
