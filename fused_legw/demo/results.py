"""What the demo's runs leave behind: a CSV file, a table, and a plot of LR and loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..schedules.legw import LEGW

RUN_COLUMNS = (
    *("scaling", "batch", "seed", "peak_lr", "warmup_epochs", "warmup_updates", "updates"),
    *("test_accuracy", "final_loss", "seconds"),
)
SUMMARY_COLUMNS = (
    *("scaling", "batch", "peak LR", "warm-up epochs", "updates"),
    *("accuracy, %", "vs baseline, points", "lowest to highest", "seconds"),
)


@dataclass(frozen=True)
class TrainingRun:
    """A training run and what came of it."""

    scaling: str
    schedule: LEGW
    seed: int
    accuracy: float  # percent of the test images
    losses: list[float]  # the mean training loss of every epoch
    seconds: float  # of training alone


def grouped(runs: Iterable[TrainingRun]) -> dict[tuple[str, int], list[TrainingRun]]:
    """The runs of each (scaling, batch), in the order in which they were made."""
    groups = dict[tuple[str, int], list[TrainingRun]]()
    for run in runs:
        groups.setdefault((run.scaling, run.schedule.batch_size), []).append(run)
    return groups


def write_runs(file: Path, runs: Iterable[TrainingRun]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([RUN_COLUMNS, *map(run_row, runs)])


def run_row(run: TrainingRun) -> tuple[str, ...]:
    s = run.schedule
    what = run.scaling, f"{s.batch_size}", f"{run.seed}", f"{s.peak_lr:.6g}", f"{s.warmup_epochs:g}"
    updates = f"{s.warmup_steps:g}", f"{s.total_steps:g}"
    return (*what, *updates, f"{run.accuracy:.2f}", f"{run.losses[-1]:.6g}", f"{run.seconds:.2f}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    header, *lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in zip(*columns, strict=True)]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([header, rule, *lines])


def summary(groups: Mapping[tuple[str, int], Sequence[TrainingRun]], baseline: Sequence[TrainingRun]) -> str:
    return markdown_table(SUMMARY_COLUMNS, [_summary_row(runs, baseline) for runs in groups.values()])


def _summary_row(runs: Sequence[TrainingRun], baseline: Sequence[TrainingRun]) -> tuple[str, ...]:
    """One line for all seeds: mean ± standard deviation. Each run is compared with the baseline's run of its seed."""
    s = runs[0].schedule
    what = runs[0].scaling, f"{s.batch_size} (×{s.scale:g})", f"{s.peak_lr:.4g}", f"{s.warmup_epochs:g}"
    accuracies = [run.accuracy for run in runs]
    accuracy = f"{fmean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else "")
    against, span = "", ""
    if runs is not baseline:
        paired = [run.accuracy - base.accuracy for run, base in zip(runs, baseline, strict=True)]
        against = f"{fmean(paired):+.2f}"
        span = f"{min(paired):+.2f} to {max(paired):+.2f}" if len(runs) > 1 else ""
    return (*what, f"{s.total_steps:g}", accuracy, against, span, f"{fmean(run.seconds for run in runs):.1f}")


def plot(
    file: Path,
    groups: Mapping[tuple[str, int], Sequence[TrainingRun]],
    baseline: Sequence[TrainingRun],
    titles: Mapping[str, str],
) -> None:
    """A column per scaling, with its title as the heading. LR above, training loss below, a line per batch."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(titles), sharex=True, sharey="row", squeeze=False)
    batches = sorted({batch for (_, batch), runs in groups.items() if runs is not baseline})
    for (top, bottom), (scaling, title) in zip(axes.T, titles.items(), strict=True):
        shown: list[tuple[str, Any, Sequence[TrainingRun]]] = [
            (f"batch {baseline[0].schedule.batch_size}, the baseline", "black", baseline)
        ]
        for i, batch in enumerate(batches):
            runs = groups[scaling, batch]
            label = f"batch {batch} (×{runs[0].schedule.scale:g})"
            shown.append((label, colormaps["viridis"](0.9 - 0.8 * i / max(1, len(batches) - 1)), runs))
        for label, color, runs in shown:
            runs[0].schedule.plot(top, color=color, label=label)
            _draw_losses(bottom, runs, color)
        top.set(title=title, yscale="log", xlabel="", ylabel="")
        bottom.set(yscale="log", xlabel="epoch")
    axes[0, 0].set_ylabel("learning rate")
    axes[1, 0].set_ylabel("training loss, mean of an epoch")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.savefig(file, dpi=150)


def _draw_losses(ax: Any, runs: Sequence[TrainingRun], color: Any) -> None:
    """The mean of the seeds, in a band from the lowest to the highest. A cross marks the last finite epoch."""
    epochs = list(zip(*(run.losses for run in runs), strict=True))
    finite = [(epoch, losses) for epoch, losses in enumerate(epochs, 1) if all(map(math.isfinite, losses))]
    x, means = [epoch for epoch, _ in finite], [fmean(losses) for _, losses in finite]
    ax.plot(x, means, color=color)
    ax.fill_between(
        x, [min(values) for _, values in finite], [max(values) for _, values in finite], color=color, alpha=0.2
    )
    if finite and len(finite) < len(epochs):
        ax.plot(x[-1], means[-1], "x", color=color)
