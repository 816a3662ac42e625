"""What an application is: its data, model, loss, quality and recipe, and how the recipe goes to another batch."""

import importlib
from dataclasses import replace

import torch

# How a recipe goes to another batch, by LEGW and by the two naive rules beside it; "baseline" is the recipe itself.
ARMS = {
    "legw": {},
    "linear": {"scaling": "linear"},  # the peak times k, with LEGW's warm-up: only the peak differs
    "sqrt": {"base_warmup_epochs": 0.0},  # LEGW's peak, no warm-up
}


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


def need(*packages):
    """ValueError with what to install, unless these packages import."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f'{package} is not installed: pip install "fused-legw[examples]"') from error
