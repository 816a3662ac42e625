"""The demo: an LSTM on handwritten digits, at its baseline batch and at larger ones by LEGW with nothing retuned.

Protocol. The recipe (LR and warm-up) is chosen at the baseline batch only, on the validation split, by `select`. The
larger batches reuse it as it is; they, and the baseline again, are judged on the test split with seeds 0, 1, 2, ...
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.select import explain_backend
from ..optim.sgd import SGD
from ..schedules.legw import LEGW
from . import digits, results
from .results import Run

MOMENTUM = 0.9
MULTIPLES = 1, 4, 16, 32

# name: (scaling of the peak LR, whether with LEGW's warm-up). Linear scaling gets LEGW's, so only the peak differs.
SCALINGS = {"baseline": ("none", True), "legw": ("sqrt", True), "linear": ("linear", True), "sqrt": ("sqrt", False)}
TITLES = {"legw": "LEGW", "linear": "linear scaling, LEGW's warm-up", "sqrt": "sqrt scaling, no warm-up"}

# What the selection tries. At x32 the longest warm-up is 16 of 60 epochs: a longer one would leave little to train.
LRS = 0.025, 0.05, 0.1, 0.2, 0.4
WARMUPS = 0.125, 0.25, 0.5

# Not the seeds of the recorded runs, 0 to 4.
SELECTION_SEEDS = range(100, 105)


@dataclass(frozen=True)
class Recipe:
    """A run at the baseline batch. Every other batch changes the LR and the warm-up by rule, and nothing else."""

    batch_size: int
    lr: float
    warmup_epochs: float
    epochs: int
    hidden: int

    def schedule(self, batch_size: int, dataset_size: int, scaling: str) -> LEGW:
        rule, warm = SCALINGS[scaling]
        return LEGW(
            self.lr,
            self.batch_size,
            self.warmup_epochs if warm else 0,
            batch_size=batch_size,
            dataset_size=dataset_size,
            epochs=self.epochs,
            scaling=rule,  # type: ignore[arg-type]
            steps_per_epoch=math.ceil(dataset_size / batch_size),
        )


# What `--tune` selected (examples/results/selection.csv), before any larger batch was run.
DIGITS = Recipe(batch_size=16, lr=0.2, warmup_epochs=0.25, epochs=60, hidden=64)

# The size and length of the paper's MNIST-LSTM; its LR and warm-up are not tuned (`--tune --data DIR` does).
MNIST = Recipe(batch_size=128, lr=0.1, warmup_epochs=0.25, epochs=25, hidden=128)


# Training


class Classifier(nn.Module):
    """One LSTM layer over the rows of an image, and a linear layer on what it says after the last."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(columns, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, digits.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        outputs, _ = self.lstm(images)
        scores: Tensor = self.linear(outputs[:, -1])
        return scores


@dataclass(frozen=True)
class Trainer:
    """What the runs share. progress: told the updates an epoch made, and what they were for."""

    data: digits.Digits
    backend: str | None
    progress: Callable[[int, str], None]

    def run(self, recipe: Recipe, scaling: str, batch_size: int, seed: int, *, validate: bool = False) -> Run:
        """Train from scratch. The seed sets the initial weights and the order of the images."""
        train = self.data.train
        device = train.images.device
        torch.manual_seed(seed)
        model = Classifier(train.images.shape[2], recipe.hidden).to(device)
        schedule = recipe.schedule(batch_size, len(train), scaling)
        optimizer = SGD(model.parameters(), lr=schedule, momentum=MOMENTUM, backend=self.backend)
        losses, start = list[float](), time.perf_counter()
        for _ in range(recipe.epochs):
            batches = torch.randperm(len(train)).to(device).split(batch_size)
            losses.append(_epoch(model, optimizer, train, batches))
            self.progress(len(batches), f"{scaling} {batch_size}, seed {seed}, loss {losses[-1]:.4f}")
        seconds = time.perf_counter() - start
        accuracy = _accuracy(model, self.data.validation if validate else self.data.test)
        return Run(scaling, schedule, seed, accuracy, losses, seconds)


def _epoch(model: nn.Module, optimizer: SGD, part: digits.Part, batches: Iterable[Tensor]) -> float:
    # Summed on the device: reading the loss of every update would wait for it.
    total = torch.zeros((), device=part.images.device)
    for index in batches:
        batch = part[index]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / len(part)


@torch.no_grad()
def _accuracy(model: nn.Module, part: digits.Part) -> float:
    """Percent correct; scores that are not finite are wrong."""
    scores = model(part.images)
    return 100 * float(((scores.argmax(1) == part.labels) & scores.isfinite().all(1)).sum()) / len(part)


# Choosing the recipe, at the baseline batch


def select(scores: Mapping[tuple[float, float], Sequence[float]]) -> tuple[float, float]:
    """(LR, warm-up epochs) from the validation accuracies of each such pair's seeds.

    The LR with the highest mean over all its warm-ups and seeds, the smaller of equals. Then the longest warm-up whose
    mean is within one standard error of that LR's best: it costs nothing at the baseline, and larger batches need it.
    """
    by_lr = dict[float, list[float]]()
    for (lr, _), accuracies in sorted(scores.items()):
        by_lr.setdefault(lr, []).extend(accuracies)
    lr = max(by_lr, key=lambda lr: fmean(by_lr[lr]))
    means = {warmup: fmean(accuracies) for (other, warmup), accuracies in scores.items() if other == lr}
    best = max(means, key=lambda warmup: means[warmup])
    floor = means[best] - _standard_error(scores[lr, best])
    return lr, max(warmup for warmup, mean in means.items() if mean >= floor)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _tune(recipe: Recipe, trainer: Trainer, output: Path) -> str:
    scores = dict[tuple[float, float], list[float]]()
    for lr, warmup, seed in _grid():
        tried = replace(recipe, lr=lr, warmup_epochs=warmup)
        run = trainer.run(tried, "baseline", recipe.batch_size, seed, validate=True)
        scores.setdefault((lr, warmup), []).append(run.accuracy)
    chosen = select(scores)
    header = "lr", "warmup_epochs", "validation_accuracy", "standard_error", "selected"
    rows = []
    for (lr, warmup), found in scores.items():
        selected = "yes" if (lr, warmup) == chosen else ""
        rows.append((f"{lr:g}", f"{warmup:g}", f"{fmean(found):.3f}", f"{_standard_error(found):.3f}", selected))
    results.write_csv(output / "selection.csv", header, rows)
    return results.table(header, rows)


def _grid() -> list[tuple[float, float, int]]:
    return [(lr, warmup, seed) for lr in LRS for warmup in WARMUPS for seed in SELECTION_SEEDS]


# Comparing the batches


def _plan(recipe: Recipe, batches: Iterable[int], seeds: int) -> list[tuple[str, int, int]]:
    """(scaling, batch, seed) of every run: the baseline, then the other batches under each scaling."""
    others = sorted(set(batches) - {recipe.batch_size})
    pairs = [("baseline", recipe.batch_size), *((scaling, batch) for batch in others for scaling in TITLES)]
    return [(scaling, batch, seed) for scaling, batch in pairs for seed in range(seeds)]


def _compare(recipe: Recipe, trainer: Trainer, plan: Iterable[tuple[str, int, int]], output: Path) -> str:
    runs = [trainer.run(recipe, *planned) for planned in plan]
    groups = results.grouped(runs)
    baseline = groups["baseline", recipe.batch_size]
    results.write_csv(output / "runs.csv", results.RUN_COLUMNS, map(results.run_row, runs))
    results.plot(output / "demo.png", groups, baseline, TITLES)
    return results.summary(groups, baseline)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files, instead of scikit-learn's digits")
    batches = " ".join(f"{DIGITS.batch_size * multiple}" for multiple in MULTIPLES)
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="B", help=f"(default: {batches}; x8 with --data)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1; recorded: 5)")
    parser.add_argument("--epochs", type=int, metavar="N", help="at every batch (default: 60; 25 with --data)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    parser.add_argument("--backend", choices=["triton", "aten"], help="(default: aten on a CPU, automatic on a GPU)")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--tune", action="store_true", help="only choose the baseline's recipe, on the validation split"
    )
    parser.set_defaults(error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the demo; arguments and data that make no sense end in one line and exit status 2, before any training."""
    try:
        device = _check(args)
        data = digits.load_sklearn() if args.data is None else digits.load_mnist(args.data)
        recipe = DIGITS if args.data is None else MNIST
        recipe = replace(recipe, epochs=args.epochs or recipe.epochs)
        batches = args.batch_size or [recipe.batch_size * multiple for multiple in MULTIPLES]
        for batch in (recipe.batch_size, *batches):
            if not 1 <= batch <= len(data.train):
                raise ValueError(f"--batch-size must be 1 to {len(data.train)}, the training images, got {batch}")
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        args.error(f"demo: {error}")
    print(_train(args, recipe, _plan(recipe, batches, args.seeds), data.to(device)))
    print(f"\nwritten to {args.output}")
    return 0


def _check(args: argparse.Namespace) -> torch.device:
    for name in (["sklearn"] if args.data is None else []) + ["matplotlib", "tqdm"]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f'{name} is not installed: pip install "fused-legw[demo]"') from error
    for option in "seeds", "epochs":
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be a positive integer, got {value}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without that device
        raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    explain_backend(device, args.backend)
    return device


def _train(args: argparse.Namespace, recipe: Recipe, plan: Sequence[tuple[str, int, int]], data: digits.Digits) -> str:
    """All the runs under one progress bar; returns the table."""
    from tqdm import tqdm

    on_cpu = data.train.images.device.type == "cpu"
    if on_cpu:
        # The matrices are too small to share: on two busy cores a second thread took 30 times longer.
        torch.set_num_threads(1)
    batches = [recipe.batch_size for _ in _grid()] if args.tune else [batch for _, batch, _ in plan]
    total = recipe.epochs * sum(math.ceil(len(data.train) / batch) for batch in batches)
    with tqdm(total=total, unit=" updates", disable=None, leave=False) as bar:

        def progress(updates: int, doing: str) -> None:
            bar.set_postfix_str(doing, refresh=False)
            bar.update(updates)

        trainer = Trainer(data, args.backend or ("aten" if on_cpu else None), progress)
        return _tune(recipe, trainer, args.output) if args.tune else _compare(recipe, trainer, plan, args.output)
