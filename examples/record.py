"""The runs of one application, by arm and batch: whether a batch holds, how much faster and sooner it is."""

import json
from statistics import fmean

from fused_legw.demo.training import TITLES


def read(file):
    """The runs in a file of JSON lines. A missing file has none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def reaches(app, quality, target):
    return quality is not None and (quality >= target if app.higher else quality <= target)


class BatchRuns:
    """The runs of one arm at one batch, a row per seed."""

    def __init__(self, rows):
        self.rows = sorted(rows, key=lambda row: row["seed"])
        self.arm, self.batch, self.updates = rows[0]["arm"], rows[0]["batch_size"], rows[0]["updates"]
        self.schedule = rows[0]["schedule"]
        self.scale = self.batch / self.schedule["base_batch_size"]
        # A run that diverged has no quality. An infinite perplexity says no more than that.
        self.qualities = [row["quality"] for row in self.rows if row["quality"] is not None and not row["diverged"]]
        self.diverged = len(self.rows) - len(self.qualities)
        self.seconds = [row["cpu_seconds"][-1] for row in self.rows]

    @property
    def mean(self):
        return fmean(self.qualities)

    def holds(self, app, target):
        """Whether no run diverged and the mean is within the tolerance."""
        return not self.diverged and reaches(app, self.mean, target)

    def to_target(self, app, target):
        """Seconds of training up to the first epoch at the target, of each run that reached it."""
        firsts = [
            next(
                (s for q, s in zip(row["qualities"], row["cpu_seconds"], strict=True) if reaches(app, q, target)), None
            )
            for row in self.rows
        ]
        return [seconds for seconds in firsts if seconds is not None]


class Record:
    """All runs of one application. Its target is the baseline's mean quality less the tolerance."""

    def __init__(self, app, rows):
        self.app, self.rows = app, rows
        grouped = {}
        for row in rows:
            grouped.setdefault((row["arm"], row["batch_size"]), []).append(row)
        self.groups = [BatchRuns(rows) for rows in grouped.values()]
        self.groups.sort(key=lambda g: (g.batch, ["baseline", *TITLES].index(g.arm)))
        self.baseline = next((group for group in self.groups if group.arm == "baseline"), None)
        self.target = None
        if self.baseline and self.baseline.qualities:
            mean = self.baseline.mean
            self.target = mean - app.tolerance if app.higher else mean * (1 + app.tolerance)

    def arm(self, name):
        """The baseline's runs and the arm's, by batch."""
        return [group for group in self.groups if group.arm in ("baseline", name)]

    def limit(self, name):
        """The largest batch up to which every batch of the arm holds."""
        held = self.baseline
        for group in self.arm(name):
            if not group.holds(self.app, self.target):
                break
            held = group
        return held

    def faster(self, group):
        return fmean(self.baseline.seconds) / fmean(group.seconds)

    def sooner(self, group):
        """How many times sooner than the baseline's runs these reach the target. None unless every run of both does."""
        ours, base = (g.to_target(self.app, self.target) for g in (group, self.baseline))
        complete = len(ours) == len(group.rows) and len(base) == len(self.baseline.rows)
        return fmean(base) / fmean(ours) if complete else None

    def lost(self, group):
        """Quality lost to the baseline, in tolerances."""
        app, base = self.app, self.baseline.mean
        return ((base - group.mean) if app.higher else (group.mean / base - 1)) / app.tolerance
