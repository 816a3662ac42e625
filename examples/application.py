"""What an application is: its data, model, loss, quality and recipe, and the recipe at another batch."""

import importlib
from dataclasses import replace

import torch

from fused_legw import LEGW
from fused_legw.demo.training import SCALINGS


class Application:
    """One of the paper's applications: its data, model, loss, quality and tuned recipe. See `mnist_lstm.py`."""

    name: str  # of its files
    title: str  # for people
    recipe: LEGW  # the schedule at the batch it was tuned for
    multiples: tuple[int, ...]  # the batches of a sweep, as multiples of the recipe's
    packages: tuple[str, ...] = ()  # that it needs beside the others'

    # Its quality.
    metric: str
    unit: str
    higher = True  # whether more of it is better
    tolerance: float  # what may be lost to the baseline: so much where higher is better, else this fraction of it
    target: float  # what the baseline's default run reaches

    # What `--tune` tries, at the recipe's batch.
    lrs: tuple[float, ...]
    warmups: tuple[float, ...]
    tuning_seeds = 100, 101  # never those of recorded runs, which are 0, 1, 2, ...

    # `load` also sets train, validation and test: tensors, or tuples of tensors whose first dimension is the samples.

    def add_arguments(self, parser):
        """Options of this application alone."""

    def load(self, args):
        """Set train, validation and test, and the paper's recipe if data are given. ValueError for wrong data."""
        raise NotImplementedError

    def model(self):
        raise NotImplementedError

    def optimizer(self, model, schedule):
        raise NotImplementedError

    def loss(self, model, batch, state):
        """(loss of a batch, state for the next one)."""
        raise NotImplementedError

    def quality(self, model, split):
        """split: "validation", on which a recipe is chosen, or "test"."""
        raise NotImplementedError

    def samples(self):
        return len(self.train[0])

    def updates_per_epoch(self, batch_size):
        """Every batch is whole. Samples that do not fill one go unused in that epoch."""
        return self.samples() // batch_size

    def batches(self, batch_size):
        """An epoch's batches, in an order drawn from torch's generator."""
        order = torch.randperm(self.samples())[: self.updates_per_epoch(batch_size) * batch_size]
        for index in order.to(self.device).split(batch_size):
            yield tuple(tensor[index] for tensor in self.train)

    def start(self, batch_size, device):
        """The state that an epoch starts from: tensors. Empty unless a model carries something across batches."""
        return ()

    def schedule(self, batch_size, arm="baseline", **changes):
        """The recipe at a batch size.

        arm: one of the SCALINGS, or "baseline", which changes nothing.
        changes: fields of the recipe with other values, such as base_lr.
        """
        recipe = replace(self.recipe, dataset_size=self.samples(), steps_per_epoch=None, **changes)
        recipe = replace(recipe, **SCALINGS.get(arm, {}))
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


def need(*packages):
    """Raise a ValueError that says what to install, unless these packages import."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f'{package} is not installed: pip install "fused-legw[examples]"') from error
