"""The demo's training: two tasks, three rules that carry their recipes to another batch, and one run of a task."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optim.sgd import SGD
from ..schedules.legw import LEGW
from .digits import CLASSES, TRAIN, Digits, Part
from .results import TrainingRun

# What each scaling rule changes in the recipe. Linear scaling gets LEGW's warm-up, so that only the peak LR differs.
SCALINGS: dict[str, dict[str, Any]] = {
    "legw": {},
    "linear": {"scaling": "linear"},
    "sqrt": {"base_warmup_epochs": 0.0},
}
TITLES = {"legw": "LEGW", "linear": "linear scaling, LEGW's warm-up", "sqrt": "sqrt scaling, no warm-up"}


@dataclass(frozen=True)
class Task:
    """What is trained at the baseline batch. At another batch a rule changes the schedule, and nothing else changes."""

    recipe: LEGW
    hidden: int  # units of the LSTM layer

    def schedule(self, scaling: str, batch_size: int, samples: int) -> LEGW:
        """The recipe at a batch size. An epoch's last batch may be smaller, and counts as an update."""
        recipe = replace(self.recipe, dataset_size=samples, **SCALINGS.get(scaling, {}))
        return recipe.with_batch_size(batch_size, steps_per_epoch=math.ceil(samples / batch_size))


# Chosen before any larger batch was run (examples/results/selection.csv).
DIGITS = Task(LEGW(0.2, 16, 0.25, batch_size=16, dataset_size=TRAIN, epochs=60), hidden=64)

# The paper's MNIST-LSTM has this size and this length. Its LR and its warm-up are not tuned here.
MNIST = Task(LEGW(0.1, 128, 0.25, batch_size=128, dataset_size=55_000, epochs=25), hidden=128)


class Classifier(nn.Module):
    """One LSTM layer over the rows of an image, and a linear layer on its output after the last row."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(columns, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        outputs, _ = self.lstm(images)
        scores: Tensor = self.linear(outputs[:, -1])
        return scores


def train(
    task: Task, data: Digits, scaling: str, batch_size: int, seed: int, *, backend: str | None, bar: Any
) -> TrainingRun:
    """Train from scratch.

    seed: sets the initial weights and the order of the images.
    backend: of the optimizer.
    bar: a progress bar of tqdm, which counts updates.
    """
    part = data.train
    torch.manual_seed(seed)
    model = Classifier(part.images.shape[2], task.hidden).to(part.images.device)
    schedule = task.schedule(scaling, batch_size, len(part))
    optimizer = SGD(model.parameters(), lr=schedule, momentum=0.9, backend=backend)
    losses, start = list[float](), time.perf_counter()
    while len(losses) < (schedule.epochs or 0):
        batches = torch.randperm(len(part)).to(part.images.device).split(batch_size)
        losses.append(_epoch(model, optimizer, part, batches))
        bar.set_postfix_str(f"{scaling} {batch_size}, seed {seed}, loss {losses[-1]:.4f}", refresh=False)
        bar.update(len(batches))
    seconds = time.perf_counter() - start
    return TrainingRun(scaling, schedule, seed, _accuracy(model, data.test), losses, seconds)


def _epoch(model: nn.Module, optimizer: SGD, part: Part, batches: Iterable[Tensor]) -> float:
    # The device adds up the losses: to read each of them, the host would wait for every update.
    total = torch.zeros((), dtype=part.images.dtype, device=part.images.device)
    for index in batches:
        batch = part[index]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / len(part)


@torch.no_grad()
def _accuracy(model: nn.Module, part: Part) -> float:
    """Percent of the images classified correctly. An image whose scores are not all finite counts as wrong."""
    scores = model(part.images)
    return 100 * float(((scores.argmax(1) == part.labels) & scores.isfinite().all(1)).sum()) / len(part)
