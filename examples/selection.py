"""How a recipe is chosen at its baseline batch: the runs of `--tune`, and the rule that picks one of them."""

import math
from statistics import fmean, stdev


def grid(app):
    """(LR, warm-up epochs, seed) of every run of `--tune`."""
    return [(lr, warmup, seed) for seed in app.tuning_seeds for lr in app.lrs for warmup in app.warmups]


def select(scores):
    """(LR, warm-up epochs) from the validation scores of each such pair's seeds.

    The LR is the one with the highest mean over all its warm-ups and seeds; of equal ones the smaller. The warm-up is
    the longest whose mean is within one standard error of that LR's best. It costs nothing at the baseline, and larger
    batches need it.
    """
    by_lr = {}
    for (lr, _), found in sorted(scores.items()):
        by_lr.setdefault(lr, []).extend(found)
    lr = max(by_lr, key=lambda lr: fmean(by_lr[lr]))
    means = {warmup: fmean(found) for (other, warmup), found in scores.items() if other == lr}
    best = max(means, key=lambda warmup: means[warmup])
    lowest = means[best] - standard_error(scores[lr, best])
    return lr, max(warmup for warmup, mean in means.items() if mean >= lowest)


def standard_error(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def choose(app, rows):
    """(LR, warm-up epochs) by `select`, from the last validation qualities of the runs of `--tune`."""
    scores = {}
    for row in rows:
        pair = row["schedule"]["base_lr"], row["schedule"]["base_warmup_epochs"]
        # Perplexities compare by their logarithms. A run that diverged gets a figure that no other gets.
        value = row["quality"] if app.higher else -math.log(row["quality"] or 1e9)
        scores.setdefault(pair, []).append((-1e3 if not app.higher else 0.0) if row["diverged"] else value)
    return select(scores)
