"""The training loop that the applications share, and its checkpoints."""

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, GradScaler

OPTIMIZERS = {
    "sgd": partial(SGD, momentum=0.9),
    "lars": partial(LARS, momentum=0.9),
    "adam": Adam,
    "adamw": AdamW,
    "adamp": AdamP,
    "lamb": LAMB,
}


@dataclass(frozen=True)
class Settings:
    """How to run."""

    device: torch.device
    amp: torch.dtype | None = None
    cuda_graph: bool = False
    optimizer: str | None = None  # instead of the application's


@dataclass
class Progress:
    """How far a run has come: one number per epoch."""

    losses: list[float] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training alone, since the start
    cpu_seconds: list[float] = field(default_factory=list)  # the same in processor time

    @property
    def diverged(self):
        return bool(self.losses) and not math.isfinite(self.losses[-1])


def train(app, schedule, seed, settings, *, split="test", checkpoint=None, told=lambda updates, loss: None):
    """Train from scratch, or on from a checkpoint file: (model, Progress).

    A run ends early once its loss is not finite. On one machine a resumed run equals the uninterrupted one bit for bit.

    seed: sets the weights, the order of samples and dropout.
    checkpoint: a file that is written after every epoch.
    told: called after every epoch with its updates and its loss.
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
    total = torch.zeros((), device=app.device)  # on the device, so that the host waits once an epoch
    start, cpu_start = time.perf_counter(), time.process_time()
    for batch in app.batches(batch_size):
        loss, state = update(batch, state)
        total += loss
        count += 1
    mean = float(total) / count
    return mean, time.perf_counter() - start, time.process_time() - cpu_start


class Update:
    """One update of the weights from one batch. With cuda_graph only the first three are eager."""

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
    """Write beside the file, then put the new one in its place: an interruption leaves the old one whole."""
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
