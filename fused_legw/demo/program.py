"""The demo: an LSTM on handwritten digits, at its baseline batch and at larger ones with nothing retuned.

The recipe was chosen at the baseline batch alone, on the validation split; examples/README.md says how. Every run
starts from scratch and is judged on the test split.
"""

from __future__ import annotations

import argparse
import importlib
import math
from dataclasses import replace
from pathlib import Path

import torch

from ..backends.select import explain_backend
from . import digits, results
from .training import DIGITS, MNIST, SCALINGS, TITLES, Task, train

MULTIPLES = 1, 4, 16, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files, instead of scikit-learn's digits")
    batches = " ".join(f"{DIGITS.recipe.batch_size * multiple}" for multiple in MULTIPLES)
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="B", help=f"(default: {batches}; x8 with --data)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1; recorded: 5)")
    parser.add_argument("--epochs", type=int, metavar="N", help="at every batch (default: 60; 25 with --data)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    parser.add_argument("--backend", choices=["triton", "aten"], help="(default: aten on a CPU, automatic on a GPU)")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), metavar="DIR", help="(default: %(default)s)")
    parser.set_defaults(error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the demo. Arguments and data that make no sense end in one line and exit status 2, before any training."""
    try:
        device = _check(args)
        data = digits.load_sklearn() if args.data is None else digits.load_mnist(args.data)
        task = DIGITS if args.data is None else MNIST
        task = replace(task, recipe=replace(task.recipe, epochs=args.epochs or task.recipe.epochs))
        base = task.recipe.batch_size
        batches = args.batch_size or [base * multiple for multiple in MULTIPLES]
        for batch in (base, *batches):
            if not 1 <= batch <= len(data.train):
                raise ValueError(f"--batch-size must be 1 to {len(data.train)}, the training images, got {batch}")
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        args.error(f"demo: {error}")
    backend = args.backend
    if device.type == "cpu":
        backend = backend or "aten"
        # The matrices are too small to share: on two busy cores a second thread took 30 times longer.
        torch.set_num_threads(1)
    pairs = [("baseline", base), *((scaling, batch) for batch in sorted({*batches} - {base}) for scaling in SCALINGS)]
    plan = [(scaling, batch, seed) for scaling, batch in pairs for seed in range(args.seeds)]
    runs = _train(task, data.to(device), backend, plan)
    groups = results.grouped(runs)
    baseline = groups["baseline", base]
    results.write_runs(args.output / "runs.csv", runs)
    results.plot(args.output / "demo.png", groups, baseline, TITLES)
    print(results.summary(groups, baseline))
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
        device = torch.empty(0, dtype=torch.float32, device=args.device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without that device
        raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    explain_backend(device, args.backend)
    return device


def _train(
    task: Task, data: digits.Digits, backend: str | None, plan: list[tuple[str, int, int]]
) -> list[results.TrainingRun]:
    """The runs of a plan of (scaling, batch, seed), under one progress bar."""
    from tqdm import tqdm

    updates = sum(math.ceil(len(data.train) / batch) for _, batch, _ in plan) * int(task.recipe.epochs or 0)
    with tqdm(total=updates, unit=" updates", disable=None, leave=False) as bar:
        return [train(task, data, *planned, backend=backend, bar=bar) for planned in plan]
