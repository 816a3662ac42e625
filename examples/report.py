"""What the recorded runs say: `python -m examples.report` writes RESULTS.md and the plots from the JSON lines."""

import argparse
import math
from pathlib import Path
from statistics import fmean, geometric_mean, stdev

from fused_legw.demo.results import markdown_table
from fused_legw.demo.training import TITLES

from .plots import overview, plot
from .record import Record, read
from .selection import choose

HERE = Path(__file__).parent
PAPER_SPEEDUP = 5.3  # You et al. 2019: average over the four LSTM applications
LSTMS = "mnist_lstm", "ptb_small", "ptb_large", "gnmt"


def applications():
    from . import gnmt, mnist1d, mnist_lstm, ptb_large, ptb_small, resnet

    return [
        mnist_lstm.MnistLSTM(),
        mnist1d.Mnist1D(),
        ptb_small.PTBSmall(),
        ptb_large.PTBLarge(),
        gnmt.GNMT(),
        resnet.ResNet(),
    ]


def _spread(values, digits=2):
    if not values:
        return ""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _times(value):
    return "" if value is None else f"{value:.2f}×"


def sweep_table(app, rows):
    """A Markdown table with a line per arm and batch: the means of the seeds ± their standard deviations."""
    record = Record(app, rows)
    header = (
        *("scaling", "batch", "peak LR", "warm-up epochs", "updates", f"{app.metric}, {app.unit}".strip(", ")),
        *("vs baseline", "lowest to highest", "run, s", "faster", "to target, s", "reached", "sooner"),
    )
    return markdown_table(header, [_line(record, group) for group in record.groups])


def _line(record, group):
    app, base = record.app, record.baseline
    s = group.schedule
    scaling = {"sqrt": math.sqrt, "linear": float, "none": lambda k: 1.0}[s["scaling"]]
    what = (
        *(group.arm, f"{group.batch} (×{group.scale:g})", f"{s['base_lr'] * scaling(group.scale):.4g}"),
        *(f"{s['base_warmup_epochs'] * group.scale:.4g}", f"{group.updates}"),
    )
    quality = _spread(group.qualities) + (f" ({group.diverged} diverged)" if group.diverged else "")
    against = span = faster = sooner = seconds = reached = ""
    if base:
        by_seed = {row["seed"]: row["quality"] for row in base.rows}
        pairs = [(row["quality"], by_seed.get(row["seed"])) for row in group.rows if not row["diverged"]]
        paired = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if group is not base and paired:
            against, span = f"{fmean(paired):+.2f}", f"{min(paired):+.2f} to {max(paired):+.2f}"
        if group is not base and not group.diverged:
            faster, sooner = _times(record.faster(group)), _times(record.sooner(group))
        found = group.to_target(app, record.target)
        seconds, reached = _spread(found, 1), f"{len(found)} of {len(group.rows)}"
    return (*what, quality, against, span, _spread(group.seconds, 1), faster, seconds, reached, sooner)


def tuning_table(rows):
    """A Markdown table with a line per LR and warm-up: the seeds' validation qualities."""
    tried = {}
    for row in rows:
        tried.setdefault((row["schedule"]["base_lr"], row["schedule"]["base_warmup_epochs"]), []).append(row)
    lines = []
    for (lr, warmup), runs in sorted(tried.items()):
        found = ["diverged" if row["diverged"] or row["quality"] is None else f"{row['quality']:.2f}" for row in runs]
        lines.append((f"{lr:g}", f"{warmup:g}", ", ".join(found)))
    return markdown_table(("peak LR", "warm-up epochs", "validation, by seed"), lines)


# The page


def page(records, tunings):
    rows = [row for record in records for row in record.rows]
    machines = sorted({row["device"] for row in rows})
    versions, commits = (sorted({row[key] or "none" for row in rows}) for key in ("torch", "commit"))
    seeds = min(len(record.baseline.rows) for record in records)
    lines = [
        "# The paper's applications: results",
        "",
        "Written by `python -m examples.report`. How the runs were made, and what they say: [README.md](README.md).",
        "",
        f"Machine: {'; '.join(machines)} ({len(rows)} runs, torch {', '.join(versions)}, commit {', '.join(commits)}). "
        f"At least {seeds} seeds; ± is their standard deviation. Seconds are processor time of training alone. The "
        "target is the baseline's mean quality less the tolerance; a batch *holds* where the mean of its seeds "
        "reaches that and no run diverged. *Faster*: the baseline's time over the run's. *Sooner*: the same up to the "
        "first epoch at the target, where every seed reaches it.",
        "",
        *_summary(records),
    ]
    for record in records:
        lines += ["", f"## {record.app.title}", "", *_application(record, tunings.get(record.app.name, []))]
    return "\n".join(lines) + "\n"


def _summary(records):
    header = "application", "baseline", "largest batch", "LEGW there", "updates left", "holds", "faster", "sooner"
    lines, speedups, held = [], [], []
    for record in records:
        app, last = record.app, record.arm("legw")[-1]
        holds, faster = last.holds(app, record.target), record.faster(last)
        if app.name in LSTMS:
            speedups.append(faster)
            held += [faster] if holds else []
        quality = _spread(last.qualities) + (f" ({last.diverged} diverged)" if last.diverged else "")
        what = app.title, f"{app.metric} {_spread(record.baseline.qualities)}", f"{last.batch} (×{last.scale:g})"
        yes = "yes" if holds else "no"
        lines.append((*what, quality, f"{last.updates}", yes, _times(faster), _times(record.sooner(last))))
    missing = sorted(set(LSTMS) - {record.app.name for record in records})
    average = f"No average over the LSTM applications yet: {', '.join(missing)} not recorded."
    if not missing:
        average = (
            f"Whole runs of the {len(speedups)} LSTM applications are {fmean(speedups):.2f}× faster on average "
            f"(geometric mean {geometric_mean(speedups):.2f}×) at their largest batch; the paper has "
            f"{PAPER_SPEEDUP}×, at equal quality. There quality held in {len(held)} of {len(speedups)}"
            + (f", which are {fmean(held):.2f}× faster." if held else ".")
        )
    limits = [
        (
            record.app.title,
            *(f"×{group.scale:g} ({group.updates})" for group in (record.limit(arm) for arm in TITLES)),
        )
        for record in records
    ]
    return [
        "## All together",
        "",
        markdown_table(header, lines),
        "",
        average,
        "",
        "The largest batch up to which every batch holds, and the updates left there:",
        "",
        markdown_table(("application", *TITLES.values()), limits),
        "",
        "![Quality lost against updates left](results/overview.png)",
    ]


def _application(record, tuning):
    app = record.app
    lost = f"{app.tolerance:g} points" if app.higher else f"{100 * app.tolerance:g} %"
    lines = [
        f"Target: {app.metric} {record.target:.2f} (tolerance {lost}).",
        "",
        sweep_table(app, record.rows),
        "",
        f"![{app.metric} and time against batch](results/{app.name}.png)",
    ]
    if tuning:
        lr, warmup = choose(app, tuning)
        lines += [
            "",
            f"Chosen at the baseline batch on validation data: peak LR {lr:g}, warm-up {warmup:g} epochs, from",
        ]
        lines += ["", tuning_table(tuning)]
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m examples.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: RESULTS.md beside DIR)")
    args = parser.parse_args(arguments)
    records = [Record(app, read(args.results / f"{app.name}.jsonl")) for app in applications()]
    records = [record for record in records if record.target is not None and len(record.groups) > 1]
    if not records:
        parser.error(f"--results: no runs of a baseline and a larger batch in {args.results}")
    tunings = {record.app.name: read(args.results / f"{record.app.name}-tuning.jsonl") for record in records}
    for record in records:
        plot(record.app, record.rows, args.results / f"{record.app.name}.png")
    overview(records, args.results / "overview.png")
    output = args.output or args.results.parent / "RESULTS.md"
    output.write_text(page(records, tunings))
    print(f"{output}: {sum(len(record.rows) for record in records)} runs")


if __name__ == "__main__":
    main()
