"""The plots of the report: one for each application, and one of all together."""

from statistics import fmean

from fused_legw.demo.training import TITLES

from .record import Record

COLORS = {"legw": "tab:blue", "linear": "tab:red", "sqrt": "tab:green"}


def plot(app, rows, file):
    """Left: each arm's quality against the batch, from the worst seed to the best. Right: LEGW's time against it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    record = Record(app, rows)
    if record.target is None or len(record.groups) < 2:
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, title in TITLES.items():
        _draw_quality(left, record, arm, title)
    target = _error(app, record.target)
    left.axhline(target, color="black", ls=":", lw=1, label="the baseline's mean, less the tolerance")
    left.set(title=app.title, ylabel=f"test {f'100 − {app.metric}, %' if app.higher else app.metric}: less is better")
    # Some arms collapse and others differ by a point or less. A linear scale up to one point keeps those apart.
    if app.higher:
        left.set_yscale("symlog", linthresh=1.0)
        left.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100])
        left.set_ylim(bottom=0)
    else:
        left.set_yscale("log")
        left.yaxis.set_major_locator(MaxNLocator(6))
    left.yaxis.set_major_formatter("{x:g}")
    groups = record.arm("legw")
    batches = [group.batch for group in groups]
    right.plot(batches, [fmean(group.seconds) for group in groups], "o-", color="tab:blue", label="the whole run")
    reached = [(g.batch, g.to_target(app, record.target)) for g in groups]
    reached = [(batch, fmean(found)) for batch, found in reached if found]
    right.plot(*zip(*reached, strict=True), "s--", color="tab:orange", label="to the target (runs that reach it)")
    right.set(title="LEGW", ylabel="training, seconds of processor time", ylim=(0, None))
    for ax in (left, right):
        ax.set(xlabel="batch", xscale="log")
        ax.set_xticks(batches, [f"{batch}\n×{batch / batches[0]:g}" for batch in batches])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=130)


def _error(app, quality):
    return 100 - quality if app.higher else quality


def _draw_quality(ax, record, arm, title):
    groups = [group for group in record.arm(arm) if group.qualities]
    x = [group.batch for group in groups]
    ax.plot(x, [_error(record.app, group.mean) for group in groups], "o-", color=COLORS[arm], label=title, ms=4)
    lowest, highest = ([_error(record.app, f(group.qualities)) for group in groups] for f in (min, max))
    ax.fill_between(x, lowest, highest, color=COLORS[arm], alpha=0.15)


def overview(records, file):
    """How much LEGW loses against the updates that are left, all applications together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for record in records:
        groups = [group for group in record.arm("legw") if group.qualities and not group.diverged]
        ax.plot([g.updates for g in groups], [record.lost(g) for g in groups], "o-", ms=4, label=record.app.title)
    ax.axhline(1, color="black", ls=":", lw=1)
    ax.set(xscale="log", yscale="symlog", xlabel="updates of the run", ylabel="quality lost, in tolerances")
    ax.set_yticks([-2, -1, 0, 1, 2, 5, 10, 20])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=130)
