"""What the applications share: a training loop, checkpoints, a sweep over batches, and the command line."""

import argparse
import hashlib
import importlib
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.provenance import commit, device_name
from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, AdamW, GradScaler
from fused_legw.backends import explain_backend
from fused_legw.demo import select

# How a recipe goes to another batch, by LEGW and by the two naive rules beside it; "baseline" is the recipe itself.
ARMS = {
    "legw": {},
    "linear": {"scaling": "linear"},  # the peak times k, with LEGW's warm-up: only the peak differs
    "sqrt": {"base_warmup_epochs": 0.0},  # LEGW's peak, no warm-up
}
OPTIMIZERS = {
    "sgd": partial(SGD, momentum=0.9),
    "lars": partial(LARS, momentum=0.9),
    "adam": Adam,
    "adamw": AdamW,
    "adamp": AdamP,
    "lamb": LAMB,
}
TUNING_SEEDS = 100, 101  # never those of recorded runs, which are 0, 1, 2, ...
RESULTS = Path(__file__).parent / "results"


class Application:
    """One of the paper's applications: its data, model, loss, quality and tuned recipe. See `mnist_lstm.py`.

    name, title: for files; for people.
    metric, unit, higher: the quality, and whether more of it is better.
    tolerance: what may be lost to the baseline: so much where higher is better, else this fraction of it.
    target: the quality that the baseline's default run reaches.
    multiples: the batches of a sweep, times the recipe's.
    lrs, warmups: what `--tune` tries, at the recipe's batch.
    recipe: the LEGW schedule at the batch it was tuned for.
    train, validation, test: tensors, or tuples of tensors (samples first); set by `load`.
    """

    higher = True
    packages: tuple[str, ...] = ()
    backend: str | None = None

    def add_arguments(self, parser):
        """Options of this application alone."""

    def load(self, args):
        """Set train, validation and test, and the paper's recipe for given data; ValueError for data that is wrong."""
        raise NotImplementedError

    def model(self):
        raise NotImplementedError

    def optimizer(self, model, schedule):
        raise NotImplementedError

    def loss(self, model, batch, state):
        """(loss of a batch, state for the next one)."""
        raise NotImplementedError

    def quality(self, model, split):
        """On "validation", for choosing a recipe, or "test"."""
        raise NotImplementedError

    def samples(self):
        return len(self.train[0])

    def updates_per_epoch(self, batch_size):
        """Every batch is whole: what is left of an epoch's samples goes unused."""
        return self.samples() // batch_size

    def batches(self, batch_size):
        """An epoch's batches, in an order drawn from torch's generator."""
        order = torch.randperm(self.samples())[: self.updates_per_epoch(batch_size) * batch_size]
        for index in order.to(self.device).split(batch_size):
            yield tuple(tensor[index] for tensor in self.train)

    def start(self, batch_size, device):
        """The state an epoch starts from: tensors, none unless a model carries something across batches."""
        return ()

    def schedule(self, batch_size, arm="baseline", **changes):
        """The recipe at a batch size, under one of the ARMS. changes: of the recipe itself, as base_lr."""
        recipe = replace(self.recipe, dataset_size=self.samples(), steps_per_epoch=None, **changes)
        recipe = replace(recipe, **ARMS.get(arm, {}))
        return recipe.with_batch_size(batch_size, steps_per_epoch=self.updates_per_epoch(batch_size))

    def to(self, device):
        self.device = device
        for split in "train", "validation", "test":
            if hasattr(self, split):
                setattr(self, split, _moved(getattr(self, split), device))
        return self


def _moved(value, device):
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


# Training


@dataclass(frozen=True)
class Settings:
    """How to run, which does not change what is learned but for rounding."""

    device: torch.device
    amp: torch.dtype | None = None
    cuda_graph: bool = False
    optimizer: str | None = None  # instead of the application's


@dataclass
class Progress:
    """What a run has come to: one number per epoch. seconds: of training alone, summed up; cpu_seconds: likewise."""

    losses: list[float] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def diverged(self):
        return bool(self.losses) and not math.isfinite(self.losses[-1])


def train(app, schedule, seed, settings, *, split="test", checkpoint=None, told=lambda updates, loss: None):
    """Train from scratch, or on from a checkpoint file; returns (model, Progress).

    The seed sets the weights, the order of samples and dropout. A run ends early once its loss is not finite. told:
    called after every epoch. The checkpoint is written after every epoch; on one machine a resumed run equals the
    uninterrupted one bit for bit.
    """
    torch.manual_seed(seed)
    model = app.model().to(settings.device)
    make = OPTIMIZERS[settings.optimizer] if settings.optimizer else None
    optimizer = make(model.parameters(), lr=schedule) if make else app.optimizer(model, schedule)
    scaler = GradScaler(settings.device.type, enabled=settings.amp == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    progress = Progress()
    if checkpoint and checkpoint.exists():
        _restore(checkpoint, parts, progress)
    update = Update(app, model, optimizer, scaler, settings)
    while len(progress.losses) < schedule.epochs and not progress.diverged:
        loss, seconds, cpu_seconds = _epoch(app, model, update, schedule.batch_size)
        progress.losses.append(loss)
        progress.seconds.append(seconds + (progress.seconds[-1] if progress.seconds else 0))
        progress.cpu_seconds.append(cpu_seconds + (progress.cpu_seconds[-1] if progress.cpu_seconds else 0))
        model.eval()
        with torch.no_grad():
            progress.qualities.append(app.quality(model, split))
        if checkpoint:
            _save(checkpoint, parts, progress)
        told(app.updates_per_epoch(schedule.batch_size), loss)
    return model, progress


def _epoch(app, model, update, batch_size):
    """(mean loss, seconds, seconds of processor time) of one epoch."""
    model.train()
    state, count = app.start(batch_size, app.device), 0
    total = torch.zeros((), device=app.device)  # on the device: reading every update's loss would wait for it
    start, cpu_start = time.perf_counter(), time.process_time()
    for batch in app.batches(batch_size):
        loss, state = update(batch, state)
        total += loss
        count += 1
    mean = float(total) / count
    return mean, time.perf_counter() - start, time.process_time() - cpu_start


class Update:
    """One update of the weights from one batch: eager, or replayed from a CUDA graph after three eager ones."""

    def __init__(self, app, model, optimizer, scaler, settings):
        self.app, self.model, self.optimizer, self.scaler, self.settings = app, model, optimizer, scaler, settings
        self.graph, self.eager = None, 3 if settings.cuda_graph else math.inf
        self.stream = torch.cuda.Stream() if settings.cuda_graph else None

    def __call__(self, batch, state):
        if self.graph is not None:
            return self._replay(batch, state)
        if self.eager == 0:
            return self._capture(batch, state)
        self.eager -= 1
        if self.stream is None:
            return self._eager(batch, state)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self._eager(batch, state)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _eager(self, batch, state):
        self.optimizer.zero_grad()
        with torch.autocast(self.settings.device.type, self.settings.amp, enabled=self.settings.amp is not None):
            loss, state = self.app.loss(self.model, batch, state)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), state

    def _capture(self, batch, state):
        self.batch, self.state = (tuple(tensor.clone() for tensor in tensors) for tensors in (batch, state))
        self.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.following = self._eager(self.batch, self.state)
        return self._replay(batch, state)

    def _replay(self, batch, state):
        for ours, given in zip((*self.batch, *self.state), (*batch, *state), strict=True):
            ours.copy_(given)
        self.graph.replay()
        return self.loss.clone(), tuple(tensor.clone() for tensor in self.following)


def _save(file, parts, progress):
    """Written beside the file and put in its place, so that a stop on the way leaves the last one."""
    states = {name: part.state_dict() for name, part in parts.items()}
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    torch.save({**states, "generators": generators, "progress": asdict(progress)}, written)
    written.replace(file)


def _restore(file, parts, progress):
    saved = torch.load(file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    for name, values in saved["progress"].items():
        getattr(progress, name).extend(values)
    torch.set_rng_state(saved["generators"]["cpu"])
    if "cuda" in saved["generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["generators"]["cuda"])


# A sweep: runs, one JSON line each


@dataclass(frozen=True)
class Planned:
    arm: str
    schedule: LEGW
    seed: int
    split: str = "test"

    def key(self, app, settings):
        """What makes a run the one it is, as its JSON line has it."""
        what = {"application": app.name, "arm": self.arm, "batch_size": self.schedule.batch_size, "seed": self.seed}
        how = {"split": self.split, "schedule": self.schedule.to_dict(), "optimizer": settings.optimizer or "own"}
        return {**what, **how, "amp": str(settings.amp or "none"), "device": device_name(settings.device)}


def sweep(app, batches, arms, seeds):
    """The baseline, then the other batches under every arm; seed by seed, so that all share what the machine does."""
    base = app.recipe.batch_size
    others = [(arm, batch) for batch in sorted(set(batches) - {base}) for arm in arms]
    pairs = [("baseline", base), *others] if base in batches else others
    return [Planned(arm, app.schedule(batch, arm), seed) for seed in range(seeds) for arm, batch in pairs]


def tuning(app):
    base = app.recipe.batch_size
    grid = [(lr, warmup, seed) for seed in TUNING_SEEDS for lr in app.lrs for warmup in app.warmups]
    return [
        Planned("baseline", app.schedule(base, base_lr=lr, base_warmup_epochs=warmup), seed, "validation")
        for lr, warmup, seed in grid
    ]


def run(app, plan, settings, file):
    """Do the planned runs that the file does not have yet, one line each; returns all the planned ones' rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
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
    # A name of its own for everything that makes a run another one.
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
    """Six digits; JSON has no infinity and no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def choose(app, rows):
    """(LR, warm-up epochs) by the rule of `fused_legw.demo.select`, from the tuning's last validation qualities."""
    scores: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        pair = row["schedule"]["base_lr"], row["schedule"]["base_warmup_epochs"]
        # Perplexities compare by their logarithms. A run that diverged gets a figure that no other gets.
        value = row["quality"] if app.higher else -math.log(row["quality"] or 1e9)
        scores.setdefault(pair, []).append((-1e3 if not app.higher else 0.0) if row["diverged"] else value)
    return select(scores)


# The command line


def need(*packages):
    """ValueError with what to install, unless these packages import."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f'{package} is not installed: pip install "fused-legw[examples]"') from error


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
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="scaling rules of the larger batches")
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
    """Run an application's command; what makes no sense ends in one line and exit status 2, before any training."""
    from . import report

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
    print(report.table(app, rows))
    report.plot(app, rows, args.output / f"{app.name}.png")
    print(f"written to {args.output}")
    if args.quick:
        reached = next(row["quality"] for row in rows if row["arm"] == "baseline")
        if not report.reaches(app, reached, app.target):
            raise SystemExit(f"{app.title}: {app.metric} {reached} misses the target of {app.target}")
