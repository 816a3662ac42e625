"""AutoWU: automated learning-rate warm-up (Kim et al. 2021, arXiv 2107.05855), as a schedule of the optimizers.

The path of the LR is a frozen `ExponentialPath`. `AutoWU` keeps the losses, decides at the ends of epochs, and then
moves to another path.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from numbers import Real
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from legw_kernels import formulas

from .. import capture
from ..checks import count, fail, number
from .autowu_path import ExponentialPath
from .base import Schedule

_FIT, _CONDITION, _GRID = 100, 500, 500  # points that a process is fitted to, conditioned on, and predicts
_LENGTH_SCALE, _NOISE, _JITTER = 0.2, 1e-3, 1e-4


class AutoWU(Schedule):
    """A schedule that finds its own peak: the LR grows exponentially until the loss has stopped falling, then decays.

    In the warm-up lr(t) = min_lr * (max_lr / min_lr)^(t / Tw), with Tw = max_warmup_fraction * total_steps. Tell it
    every update's loss, and every epoch's end. There a Gaussian process is fitted to the losses, `tests` times to
    random samples; a test is positive if the loss was, with the given confidence, lower anywhere than it is now. After
    `patience` epochs in a row with mostly positive tests the LR falls back to where the loss was lowest, and decays
    from there, to 0 at total_steps. Without that the decay begins at Tw. The kernel works out the LR, as it does
    LEGW's; after a switch captured CUDA graphs follow once `optimizer.upload_param_groups()` is called.

    Args:
        total_steps: updates of the run.
        steps_per_epoch: updates of an epoch.
        min_lr, max_lr: where the warm-up begins, and where it would end.
        max_warmup_fraction: of the run, the longest warm-up.
        patience: epochs in a row.
        tests: an epoch.
        confidence: of a test.
        decay: "cosine", or "constant-then-cosine": constant until 0.8 of the run.
        seed: of the samples; the same losses and seed give the same decisions.

    Raises:
        ValueError: naming the argument and its value.

    Source: Kim et al. 2021, "Automated Learning Rate Scheduler for Large-batch Training", arXiv 2107.05855. The process
    is scikit-learn's (the extra `fused-legw[autowu]`): well kept, widely installed, exact, on NumPy alone, and it has
    the kernel, the fitting and the posterior covariance that the method asks for.

    >>> import torch
    >>> from fused_legw import SGD, AutoWU
    >>> auto = AutoWU(1000, 100)
    >>> optimizer = SGD(torch.nn.Linear(4, 2).parameters(), lr=auto)
    >>> auto.phase, auto(0), round(auto(250), 6), auto(500)
    ('warmup', 1e-05, 0.003162, 1.0)
    """

    milestones = ()

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: float,
        *,
        min_lr: float = 1e-5,
        max_lr: float = 1.0,
        max_warmup_fraction: float = 0.5,
        patience: int = 3,
        tests: int = 5,
        confidence: float = 0.95,
        decay: Literal["cosine", "constant-then-cosine"] = "cosine",
        seed: int = 0,
    ) -> None:
        self._path = ExponentialPath(
            total_steps,
            steps_per_epoch,
            min_lr,
            max_lr,
            max_warmup_fraction,
            patience,
            tests,
            confidence,
            decay,
            seed,
        )
        self._updates = 0  # whose losses were observed in the warm-up
        self._losses: list[float] = []  # of the epochs that ended; NaN where a loss is of no use
        self._pending: list[float | Tensor] = []  # of this epoch, on the device as long as it lasts
        self._epochs = self._positive = 0  # ended, and with a positive test, in a row

    def __repr__(self) -> str:
        return f"AutoWU(total_steps={self._path.total_steps}, phase={self.phase!r})"

    # As the optimizers see it

    @property
    def constants(self) -> formulas.ScheduleConstants:  # type: ignore[override]
        """The schedule's constants, as the host formula and the kernels take them; others after a switch."""
        return self._path.constants

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 where it never did."""
        return self._path.since

    @property
    def peak_lr(self) -> float:
        """The LR that the decay starts from: before the switch, the highest there can be."""
        return self._path.peak_lr

    @property
    def phase(self) -> Literal["warmup", "decay"]:
        """What the next update is in, by the losses observed."""
        over = self._path.switch is not None or self._updates >= self._path.end_of_warmup[0]
        return "decay" if over else "warmup"

    @property
    def switch(self) -> tuple[float, float] | None:
        """The update at which the warm-up ended, and the LR from then on; None before."""
        return self._path.switch

    def as_of(self, t: int) -> Schedule:
        """The schedule that update t followed, before later changes of the batch."""
        return self._path.as_of(t)

    def has_batch(self, batch_size: int, steps_per_epoch: float | None = None) -> bool:
        """Whether an epoch has so many updates now."""
        count("batch_size", batch_size)
        if steps_per_epoch is None:
            fail("steps_per_epoch", steps_per_epoch, "given for AutoWU, which knows no batch size,")
        return number("steps_per_epoch", steps_per_epoch) == self._path.steps_per_epoch

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> AutoWU:
        """The schedule that goes on at another batch size after t updates: `optimizer.set_batch_size` moves this one.

        The run keeps its epochs: what is left of total_steps scales with steps_per_epoch, which must be given, and the
        decay goes on from where it is. The warm-up keeps its growth per update; it ends by the same epoch as before, at
        the LR reached by then, or at max_lr if that comes first.
        """
        other = AutoWU.from_dict(self.to_dict())
        if not self.has_batch(batch_size, steps_per_epoch):
            other._path = self._path.change_steps_per_epoch(t, number("steps_per_epoch", steps_per_epoch))
        return other

    def become(self, other: Schedule) -> Schedule:
        """Take over another AutoWU's path: whoever holds this one goes on holding what the optimizer follows."""
        if not isinstance(other, AutoWU):
            return other
        self._path, self._updates = other._path, other._updates
        return self

    # The run

    def observe(self, loss: float | Tensor) -> None:
        """Tell the loss of one update. A tensor stays where it is until the epoch's end: nothing waits for a device.

        Losses that are not finite are left out of the tests. After the warm-up it does nothing.

        Raises ValueError for what is neither a number nor a 0-dim tensor, RuntimeError in a graph capture.
        """
        if isinstance(loss, Tensor):
            if loss.ndim != 0 or loss.is_complex():
                fail("loss", loss, "a number or a 0-dim tensor")
            if capture.capturing(loss.device):
                raise RuntimeError(
                    "observe(loss) was called in a graph capture, which would not repeat it: call it outside"
                )
        elif not isinstance(loss, Real) or isinstance(loss, bool):
            fail("loss", loss, "a number or a 0-dim tensor")
        if self.phase == "decay":
            return
        # A copy: a replay writes the next loss to the same memory.
        self._pending.append(loss.detach().to(torch.float32, copy=True) if isinstance(loss, Tensor) else float(loss))
        self._updates += 1

    def end_epoch(self, steps_applied: int | None = None) -> bool:
        """Say that an epoch has ended; True if the warm-up has ended with it. Reads the losses from the device.

        steps_applied: the optimizer's. By default each loss was of an applied update: give it where steps are skipped.

        Raises, before anything changes: RuntimeError where no loss was observed in this epoch, or fewer than there were
        updates, or where those of a resumed run are missing; ImportError without scikit-learn.
        """
        if self._path.switch is not None:
            return False
        if not self._pending and self.phase == "warmup":
            raise RuntimeError("end_epoch() needs losses, but observe(loss) was not called in this epoch")
        if len(self._losses) + len(self._pending) != self._updates:
            raise RuntimeError(
                f"of {self._updates} losses {len(self._losses) + len(self._pending)} are here: when resuming, load "
                "auto.state_dict() too, beside the optimizer's"
            )
        t = self._updates if steps_applied is None else count("steps_applied", steps_applied, zero=True)
        if t > self._updates:
            raise RuntimeError(f"steps_applied={t}, but observe(loss) was called only {self._updates} times")
        _gaussian_process()  # its absence is said now
        self._losses += self._read()
        self._pending = []
        self._epochs += 1
        if t >= self._path.end_of_warmup[0]:
            self._path = self._path.ended()
        else:
            fallback = self._test(t)
            self._positive = 0 if fallback is None else self._positive + 1
            if fallback is not None and self._positive >= self._path.patience:
                self._path = replace(self._path, switch=(float(t), fallback))
        if self._path.switch is not None:
            self._losses = []
        return self._path.switch is not None

    def _read(self) -> list[float]:
        """This epoch's losses, NaN where not finite."""
        on_device = [loss for loss in self._pending if isinstance(loss, Tensor)]
        read = iter(torch.stack([x.to(on_device[0].device) for x in on_device]).tolist() if on_device else ())
        losses = [next(read) if isinstance(loss, Tensor) else loss for loss in self._pending]
        return [loss if math.isfinite(loss) else math.nan for loss in losses]

    def _test(self, t: int) -> float | None:
        """Where the loss has stopped falling, the LR at which it was lowest; else None."""
        losses = np.array(self._losses)
        found = np.flatnonzero(np.isfinite(losses))
        if len(found) < 2:
            return None
        x, y = found / len(losses), losses[found]
        # The process is then the same in any unit of the loss, and its constant mean that of the losses.
        y = (y - y.mean()) / (y.std() or 1.0)
        random = np.random.default_rng([self._path.seed, self._epochs])
        votes, lrs = 0, list[float]()
        threshold = NormalDist().inv_cdf(self._path.confidence)
        for grid, mean, covariance in _posteriors(x, y, self._path.tests, random):
            rise = mean[-1] - mean
            variance = covariance.diagonal() + covariance[-1, -1] - 2 * covariance[:, -1] + _JITTER
            votes += bool((rise / np.sqrt(variance)).max() > threshold)
            lrs.append(self._path.warmup_lr(t * float(grid[mean.argmin()])))
        return sum(lrs) / len(lrs) if 2 * votes > self._path.tests else None

    # Checkpoints

    def to_dict(self) -> dict[str, Any]:
        """The path as primitives: what an optimizer's state dict holds. The losses are in `state_dict`."""
        lists = {"earlier": [list(x) for x in self._path.earlier], "switch": self.switch and list(self.switch)}
        return {"name": "AutoWU", **asdict(self._path), **lists, "updates": self._updates}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoWU:
        """An AutoWU on the path that `to_dict` gave, without its losses; a ValueError names what is not one's."""
        try:
            own = dict(values)
            if own.pop("name") != "AutoWU":
                raise KeyError("name")
            updates = count("updates", own.pop("updates"), zero=True)
            path = ExponentialPath(**own)
        except (TypeError, KeyError) as error:
            raise ValueError(f"schedule must be what AutoWU.to_dict() gives, got {values!r}: {error}") from error
        auto = cls(path.total_steps, path.steps_per_epoch)
        auto._path, auto._updates = path, updates
        return auto

    def state_dict(self) -> dict[str, Any]:
        """All there is: path, losses, tests so far; tensors and primitives. Waits for losses on a device."""
        losses = torch.tensor([*self._losses, *self._read()], dtype=torch.float64, device="cpu")
        return {
            "schedule": self.to_dict(),
            "losses": losses,
            "pending": len(self._pending),
            "epochs": self._epochs,
            "positive": self._positive,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as the AutoWU that gave this, settings included. Load the optimizer's state dict too, in either order.

        Raises ValueError, before anything changes, for what `state_dict` does not give.
        """
        try:
            values = {name: state_dict[name] for name in ("schedule", "losses", "pending", "epochs", "positive")}
            other = AutoWU.from_dict(values["schedule"])
            losses = torch.as_tensor(values["losses"], dtype=torch.float64).tolist()
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"state_dict must be what AutoWU.state_dict() gives, {error} is missing or wrong"
            ) from error
        pending, epochs, positive = (count(name, values[name], zero=True) for name in ("pending", "epochs", "positive"))
        if pending > len(losses):
            fail("pending", pending, f"at most the {len(losses)} losses")
        self.become(other)
        done = len(losses) - pending
        self._losses, self._pending = losses[:done], losses[done:]
        self._epochs, self._positive = epochs, positive


def _gaussian_process() -> Any:
    try:
        from sklearn import gaussian_process
    except ImportError as error:
        raise ImportError("AutoWU.end_epoch() needs scikit-learn: pip install 'fused-legw[autowu]'") from error
    return gaussian_process


def _posteriors(x: Any, y: Any, n: int, random: np.random.Generator) -> Iterator[tuple[Any, Any, Any]]:
    """n times (grid over [0, 1), mean, covariance) of the losses without noise, by a process fitted to a sample."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

    process = _gaussian_process()
    scaled_rbf = process.kernels.ConstantKernel(1.0) * process.kernels.RBF(_LENGTH_SCALE, "fixed")
    kernel = scaled_rbf + process.kernels.WhiteKernel(_NOISE)
    grid = np.linspace(0, 1, _GRID, endpoint=False)

    def sample(most: int) -> tuple[Any, Any]:
        chosen = random.choice(len(x), min(most, len(x)), replace=False)
        return x[chosen, None], y[chosen]

    for _ in range(n):
        # Matrices this small are slower on more threads. A scale or noise at its bound, which is warned of, is a flat
        # or noiseless curve, and no obstacle to the test.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = process.GaussianProcessRegressor(kernel).fit(*sample(_FIT)).kernel_
            # The noise as `alpha`, so that the covariance is of the curve alone.
            curve = process.GaussianProcessRegressor(fitted.k1, alpha=fitted.k2.noise_level, optimizer=None)
            mean, covariance = curve.fit(*sample(_CONDITION)).predict(grid[:, None], return_cov=True)
        yield grid, mean, covariance
