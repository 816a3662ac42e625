"""AutoWU: automated learning-rate warm-up (Kim et al. 2021, arXiv 2107.05855), as a schedule of the optimizers.

`AutoWU` collects the losses and decides at the end of each epoch. The LR itself follows a frozen `ExponentialPath`,
which a decision replaces by another one.
"""

from __future__ import annotations

import math
import reprlib
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

_FIT, _CONDITION, _GRID = 100, 500, 500  # points that the process is fitted to, is conditioned on, and predicts
_LENGTH_SCALE, _NOISE, _JITTER = 0.2, 1e-3, 1e-4


class AutoWU(Schedule):
    """A schedule that finds its own peak: the LR grows exponentially until the loss has stopped falling, then decays.

    Call `observe(loss)` after every update and `end_epoch()` after every epoch. In the warm-up the LR of update t is
    min_lr * (max_lr / min_lr)^(t / Tw), where Tw = max_warmup_fraction * total_steps is the longest warm-up in updates.
    `end_epoch` fits a Gaussian process to `tests` random samples of the losses. A test is positive if, with the given
    confidence, the loss was lower at some earlier update than it is now. An epoch votes for the switch if most of its
    tests are positive. After `patience` such epochs in a row the LR falls back to its value where the loss was lowest,
    and decays from there to 0 at total_steps. Without a switch the decay begins at Tw.

    Kernels compute the LR, as for `LEGW`. Call `optimizer.upload_param_groups()` after a switch, so that captured CUDA
    graphs follow it.

    Args:
        total_steps: length of the run in updates.
        steps_per_epoch: updates per epoch.
        min_lr, max_lr: the LR at which the warm-up begins, and the LR at which the longest warm-up ends.
        max_warmup_fraction: the longest warm-up, as a fraction of the run.
        patience: positive epochs in a row before the switch.
        tests: tests per epoch.
        confidence: confidence level of a test.
        decay: "cosine", or "constant-then-cosine": constant until 0.8 of the run.
        seed: seed of the samples; the same losses and seed give the same decisions.

    Raises:
        ValueError: naming the argument and its value.

    Source: Kim et al. 2021, "Automated Learning Rate Scheduler for Large-batch Training", arXiv 2107.05855. The
    Gaussian process is scikit-learn's: install the extra `fused-legw[autowu]`.

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
        self._updates = 0  # warm-up updates whose loss was observed
        self._losses: list[float] = []  # losses of the epochs that ended; NaN where a loss was not finite
        self._pending: list[float | Tensor] = []  # losses of the current epoch; tensors stay on their device
        self._epochs = 0  # epochs that ended
        self._positive = 0  # the last epochs in a row that voted for the switch

    def __repr__(self) -> str:
        return f"AutoWU(total_steps={self._path.total_steps}, phase={self.phase!r})"

    # The interface that optimizers use

    @property
    def constants(self) -> formulas.ScheduleConstants:  # type: ignore[override]
        """The schedule's constants for the host formula and the kernels. They change at the switch."""
        return self._path.constants

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 where it never did."""
        return self._path.since

    @property
    def peak_lr(self) -> float:
        """The LR at which the decay starts. Before the switch: the highest LR that the warm-up can reach."""
        return self._path.peak_lr

    @property
    def phase(self) -> Literal["warmup", "decay"]:
        """The phase of the next update, by the number of losses observed."""
        over = self._path.switch is not None or self._updates >= self._path.end_of_warmup[0]
        return "decay" if over else "warmup"

    @property
    def switch(self) -> tuple[float, float] | None:
        """The update at which the warm-up ended, and the LR at which the decay began; None in the warm-up."""
        return self._path.switch

    def as_of(self, t: int) -> Schedule:
        """The schedule that update t followed, before later changes of the batch."""
        return self._path.as_of(t)

    def has_batch(self, batch_size: int, steps_per_epoch: float | None = None) -> bool:
        """Whether an epoch already has this many updates."""
        count("batch_size", batch_size)
        if steps_per_epoch is None:
            fail("steps_per_epoch", steps_per_epoch, "given for AutoWU, which knows no batch size,")
        return number("steps_per_epoch", steps_per_epoch) == self._path.steps_per_epoch

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> AutoWU:
        """The schedule that continues at another batch size after t updates. `optimizer.set_batch_size` applies it.

        The run keeps its length in epochs, so the remaining updates scale with steps_per_epoch. A decay continues from
        where it is. A warm-up keeps its growth per update. It ends at the same epoch as before, with the LR reached by
        then, or at max_lr if that comes first.

        Args:
            t: updates made so far, no fewer than at an earlier change.
            batch_size: the new global batch in samples; only checked.
            steps_per_epoch: updates per epoch at the new batch; required.

        Raises:
            ValueError: naming the argument and its value.
        """
        other = AutoWU.from_dict(self.to_dict())
        if not self.has_batch(batch_size, steps_per_epoch):
            other._path = self._path.change_steps_per_epoch(t, number("steps_per_epoch", steps_per_epoch))
        return other

    def become(self, other: Schedule) -> Schedule:
        """Take over another AutoWU's path, so that references to this object stay valid."""
        if not isinstance(other, AutoWU):
            return other
        self._path, self._updates = other._path, other._updates
        return self

    # The run

    def observe(self, loss: float | Tensor) -> None:
        """Record the loss of one update. A tensor is read at the end of the epoch: nothing waits for a device here.

        The tests leave out losses that are not finite. After the warm-up the call does nothing.

        Args:
            loss: a number or a 0-dim tensor.

        Raises:
            ValueError: the loss is neither.
            RuntimeError: the call is inside a graph capture.
        """
        if isinstance(loss, Tensor):
            if loss.ndim != 0 or loss.is_complex():
                fail("loss", loss, "a number or a 0-dim tensor")
            if capture.capturing(loss.device):
                raise RuntimeError("call observe(loss) outside of the graph capture: replays would not repeat it")
        elif not isinstance(loss, Real) or isinstance(loss, bool):
            fail("loss", loss, "a number or a 0-dim tensor")
        if self.phase == "decay":
            return
        # Copied, because a graph replay writes the next loss to the same memory.
        self._pending.append(loss.detach().to(torch.float32, copy=True) if isinstance(loss, Tensor) else float(loss))
        self._updates += 1

    def end_epoch(self, steps_applied: int | None = None) -> bool:
        """Tell the schedule that an epoch has ended. Reads the losses from the device.

        Args:
            steps_applied: `optimizer.steps_applied`, needed where steps can be skipped; by default the number of losses
                observed.

        Returns:
            Whether the warm-up ended with this epoch.

        Raises:
            RuntimeError: losses are missing: none in this epoch, fewer than updates, or those of a resumed run.
            ImportError: scikit-learn is not installed. Either error comes before anything changes.
        """
        if self._path.switch is not None:
            return False
        if not self._pending and self.phase == "warmup":
            raise RuntimeError("end_epoch() needs losses: call observe(loss) after every update of the epoch")
        if len(self._losses) + len(self._pending) != self._updates:
            raise RuntimeError(
                "when resuming, load auto.state_dict() besides the optimizer's: only "
                f"{len(self._losses) + len(self._pending)} of {self._updates} losses are here"
            )
        t = self._updates if steps_applied is None else count("steps_applied", steps_applied, zero=True)
        if t > self._updates:
            raise RuntimeError(
                f"call observe(loss) after every update: steps_applied={t}, but observe(loss) was called only "
                f"{self._updates} times"
            )
        _gaussian_process()  # fail early where scikit-learn is missing
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
        """The current epoch's losses, with NaN for those that are not finite."""
        on_device = [loss for loss in self._pending if isinstance(loss, Tensor)]
        read = iter(torch.stack([x.to(on_device[0].device) for x in on_device]).tolist() if on_device else ())
        losses = [next(read) if isinstance(loss, Tensor) else loss for loss in self._pending]
        return [loss if math.isfinite(loss) else math.nan for loss in losses]

    def _test(self, t: int) -> float | None:
        """The LR at which the loss was lowest, if the loss has stopped falling by most tests; else None."""
        losses = np.array(self._losses)
        found = np.flatnonzero(np.isfinite(losses))
        if len(found) < 2:
            return None
        x, y = found / len(losses), losses[found]
        # Standardized, so that the unit of the loss does not matter and the process's mean of 0 is the losses' mean.
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
        """The path as primitives, for an optimizer's state dict. The losses are in `state_dict`."""
        lists = {"earlier": [list(x) for x in self._path.earlier], "switch": self.switch and list(self.switch)}
        return {"name": "AutoWU", **asdict(self._path), **lists, "updates": self._updates}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoWU:
        """The inverse of `to_dict`. The result has no losses yet: see `load_state_dict`.

        Raises:
            ValueError: naming the entry that is missing or wrong.
        """
        try:
            own = dict(values)
            if own.pop("name") != "AutoWU":
                raise KeyError("name")
            updates = count("updates", own.pop("updates"), zero=True)
            path = ExponentialPath(**own)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"schedule must be what AutoWU.to_dict() gives, got {reprlib.repr(values)}: {error}"
            ) from error
        auto = cls(path.total_steps, path.steps_per_epoch)
        auto._path, auto._updates = path, updates
        return auto

    def state_dict(self) -> dict[str, Any]:
        """Everything: the path, the losses and the tests so far, as tensors and primitives. Reads the device."""
        losses = torch.tensor([*self._losses, *self._read()], dtype=torch.float64, device="cpu")
        return {
            "schedule": self.to_dict(),
            "losses": losses,
            "pending": len(self._pending),
            "epochs": self._epochs,
            "positive": self._positive,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue as the AutoWU that made this dict, with its settings. Load the optimizer's state dict too.

        The order of the two loads does not matter.

        Raises:
            ValueError: an entry is missing or wrong; nothing has changed.
        """
        try:
            values = {name: state_dict[name] for name in ("schedule", "losses", "pending", "epochs", "positive")}
            other = AutoWU.from_dict(values["schedule"])
            losses = torch.as_tensor(values["losses"], dtype=torch.float64).tolist()
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"state_dict must be what AutoWU.state_dict() gives: {error} is missing or wrong"
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
    """n times (grid over [0, 1), mean, covariance) of the curve under the noisy losses, each time from a new sample."""
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
        # One thread, because matrices this small are slower on more. The warning says that a fitted scale or noise is
        # at its bound: the curve is flat or has no noise, and the test works all the same.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = process.GaussianProcessRegressor(kernel).fit(*sample(_FIT)).kernel_
            # The noise goes into `alpha`, which keeps it out of the predicted covariance.
            curve = process.GaussianProcessRegressor(fitted.k1, alpha=fitted.k2.noise_level, optimizer=None)
            mean, covariance = curve.fit(*sample(_CONDITION)).predict(grid[:, None], return_cov=True)
        yield grid, mean, covariance
