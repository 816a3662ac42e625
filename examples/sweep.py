"""The applications' command line: a sweep over batches, or the search for a recipe. A run leaves one JSON line."""

import argparse
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.provenance import commit, device_name
from fused_legw import LEGW
from fused_legw.backends.select import explain_backend
from fused_legw.demo.training import SCALINGS

from .application import need
from .plots import plot
from .record import reaches, read
from .selection import choose, grid
from .trainer import OPTIMIZERS, Settings, train


@dataclass(frozen=True)
class Planned:
    """A run to be made."""

    arm: str
    schedule: LEGW
    seed: int
    split: str = "test"  # that its quality is measured on

    def key(self, app, settings):
        """All that tells this run from others, as its JSON line has it."""
        what = {"application": app.name, "arm": self.arm, "batch_size": self.schedule.batch_size, "seed": self.seed}
        how = {"split": self.split, "schedule": self.schedule.to_dict(), "optimizer": settings.optimizer or "own"}
        return {**what, **how, "amp": str(settings.amp or "none"), "device": device_name(settings.device)}


def sweep(app, batches, arms, seeds):
    """The baseline, then the other batches under every arm. Seed by seed: a busy machine slows all of them."""
    base = app.recipe.batch_size
    others = [(arm, batch) for batch in sorted(set(batches) - {base}) for arm in arms]
    pairs = [("baseline", base), *others] if base in batches else others
    return [Planned(arm, app.schedule(batch, arm), seed) for seed in range(seeds) for arm, batch in pairs]


def tuning(app):
    base = app.recipe.batch_size
    return [
        Planned("baseline", app.schedule(base, base_lr=lr, base_warmup_epochs=warmup), seed, "validation")
        for lr, warmup, seed in grid(app)
    ]


def run(app, plan, settings, file):
    """The rows of all planned runs. Those that the file lacks are made now, and it gets a line for each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = read(file)
    rows, waiting = [], []
    for planned in plan:
        key = json.loads(json.dumps(planned.key(app, settings)))
        row = next((row for row in done if key.items() <= row.items()), None)
        rows.append(row) if row else waiting.append((planned, key))
    updates = [planned.schedule.total_steps for planned, _ in waiting]
    with tqdm(total=round(sum(updates)), unit=" updates", disable=None, leave=False) as bar:
        for planned, key in waiting:
            rows.append(_run_one(app, planned, key, settings, file, bar))
    return rows


def _run_one(app, planned, key, settings, file, bar):
    # Runs with different keys get different names.
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    checkpoint = file.parent / "checkpoints" / f"{app.name}-{name}.pt"

    def told(updates, loss):
        bar.set_postfix_str(f"{app.name} {planned.arm} {planned.schedule.batch_size}, seed {planned.seed}: {loss:.4f}")
        bar.update(updates)

    _, progress = train(
        app, planned.schedule, planned.seed, settings, split=planned.split, checkpoint=checkpoint, told=told
    )
    rounded = {name: [_rounded(value) for value in values] for name, values in asdict(progress).items()}
    updates = round(planned.schedule.total_steps)
    facts = {"updates": updates, "torch": torch.__version__, "commit": commit()}
    row = {**key, **facts, "quality": rounded["qualities"][-1], "diverged": progress.diverged, **rounded}
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")
    checkpoint.unlink()
    return row


def _rounded(value):
    """Six digits, or None where JSON has no number: it knows no infinity and no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# The command line


def _parser(app):
    parser = argparse.ArgumentParser(prog=f"python -m examples.{app.name}", description=f"{app.title}.")
    add = parser.add_argument
    base = app.recipe.batch_size
    batches = " ".join(str(base * k) for k in app.multiples)
    add("--data", metavar="PATH", help="the paper's data, with the paper's settings (default: data from a package)")
    add(
        "--batch-size", type=int, nargs="+", metavar="B", help=f"(default: {batches}; with --data the recipe's times k)"
    )
    add("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1; recorded: 3)")
    add("--arms", nargs="+", choices=list(SCALINGS), default=list(SCALINGS), help="scaling rules of the larger batches")
    add("--lr", type=float, help="peak LR at the recipe's batch, instead of the recipe's")
    add("--warmup-epochs", type=float, help="warm-up at the recipe's batch, instead of the recipe's")
    add("--epochs", type=float, help="length of every run, instead of the recipe's")
    add("--optimizer", choices=list(OPTIMIZERS), help="instead of the application's own; give --lr with it")
    add("--amp", choices=["float16", "bfloat16"], help="automatic mixed precision")
    add("--cuda-graph", action="store_true", help="replay each update from a CUDA graph")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--tune", action="store_true", help="choose LR and warm-up at the recipe's batch, on validation data, and stop")
    add("--quick", action="store_true", help="only the baseline and the largest batch by LEGW; fails below the target")
    add("--output", type=Path, default=Path("out/examples"), metavar="DIR", help="(default: %(default)s)")
    app.add_arguments(parser)
    return parser


def _checked(app, args):
    for option in "seeds", "epochs", "lr":
        value = getattr(args, option)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{option} must be positive, got {value}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without that device
        raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    explain_backend(device, None)
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA device, got --device {args.device}")
    if args.cuda_graph and app.name == "gnmt":
        raise ValueError("--cuda-graph: batches of sentences differ in length")
    need("matplotlib", *app.packages)
    app.load(args)
    given = {"base_lr": args.lr, "base_warmup_epochs": args.warmup_epochs, "epochs": args.epochs}
    app.recipe = replace(app.recipe, **{name: value for name, value in given.items() if value is not None})
    app.to(device)
    base = app.recipe.batch_size
    batches = args.batch_size or [base * k for k in app.multiples]
    if args.quick:
        batches, args.arms = [base, max(batches)], ["legw"]
    for batch in batches:
        if batch < 1 or app.updates_per_epoch(batch) < 1:
            raise ValueError(f"--batch-size must be 1 to {app.samples()}, the samples of an epoch, got {batch}")
    plan = tuning(app) if args.tune else sweep(app, batches, args.arms, args.seeds)
    amp = getattr(torch, args.amp) if args.amp else None
    args.output.mkdir(parents=True, exist_ok=True)
    return Settings(device, amp, args.cuda_graph, args.optimizer), plan


def main(app, arguments=None):
    """Run an application's command. Arguments that make no sense end in one line and exit status 2, before training."""
    from . import report  # not above: report imports the applications, which import this module

    parser = _parser(app)
    args = parser.parse_args(arguments)
    try:
        settings, plan = _checked(app, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if settings.device.type == "cpu":
        torch.set_num_threads(1)  # the matrices are too small to share
    if args.tune:
        rows = run(app, plan, settings, args.output / f"{app.name}-tuning.jsonl")
        print(report.tuning_table(rows))
        print("chosen: LR {:g}, warm-up {:g} epochs".format(*choose(app, rows)))
        return
    rows = run(app, plan, settings, args.output / f"{app.name}.jsonl")
    print(app.title, report.sweep_table(app, rows), sep="\n")
    plot(app, rows, args.output / f"{app.name}.png")
    print(f"written to {args.output}")
    if args.quick:
        reached = next(row["quality"] for row in rows if row["arm"] == "baseline")
        if not reaches(app, reached, app.target):
            raise SystemExit(f"{app.title}: {app.metric} {reached} misses the target of {app.target}")
