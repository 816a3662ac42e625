"""LEGW: linear-epoch gradual warm-up (You et al. 2019, arXiv 1901.08256), and the decays that follow it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal, NoReturn

from legw_kernels import scalars


def _fail(name: str, value: object, rule: str) -> NoReturn:
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def _number(name: str, value: object, *, zero: bool = False) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and (number > 0 or (zero and number == 0)):
            return number
    _fail(name, value, "a finite number, zero or more" if zero else "a finite positive number")


def _count(name: str, value: object, *, zero: bool = False) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < (0 if zero else 1):
        _fail(name, value, "an integer, zero or more" if zero else "a positive integer")
    return int(value)


def _set(frozen: object, **values: object) -> None:
    """Assign to a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _exact(value: float) -> Fraction:
    """The number a person wrote: 0.1 is 1/10, not the nearest double."""
    return Fraction(str(value))


def _whole_updates(epochs: float, steps_per_epoch: Fraction) -> int:
    """ceil(epochs * steps_per_epoch), where 3 epochs of 10/3 updates are 10 whatever the floats say."""
    updates = _exact(epochs) * steps_per_epoch
    nearest = round(updates)
    return nearest if abs(updates - nearest) <= Fraction(1, 10**12) * max(1, nearest) else math.ceil(updates)


@dataclass(frozen=True)
class Decay:
    """What the LR does after the warm-up: a multiplier of the peak LR, counted in epochs from the start of training."""

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        """The fields of `scalars.Recipe` that this decay sets, in updates."""
        raise NotImplementedError

    def _milestones(self, schedule: LEGW) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Constant(Decay):
    """No decay: the peak LR from the end of the warm-up on."""

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        return {"kind": scalars.CONSTANT}


@dataclass(frozen=True)
class MultiStep(Decay):
    """factor^(milestones passed). A milestone e (epochs) is passed from update ceil(e * steps_per_epoch) on.

    milestones: epochs from the start of training, increasing, any number of them (none: constant). One that falls
    inside the warm-up counts from the warm-up's end on.
    """

    milestones: Sequence[float]
    factor: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Sequence):
            _fail("milestones", self.milestones, "a sequence of epochs")
        _set(self, milestones=tuple(_number("milestones", epoch) for epoch in self.milestones))
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            _fail("milestones", self.milestones, "increasing")
        _set(self, factor=_number("factor", self.factor))

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        return {"kind": scalars.MULTISTEP, "log_rate": math.log(self.factor)}

    def _milestones(self, schedule: LEGW) -> tuple[int, ...]:
        return tuple(_whole_updates(epoch, schedule._exact_steps_per_epoch) for epoch in self.milestones)


@dataclass(frozen=True)
class Exponential(Decay):
    """rate^max(0, periods) from start_epoch on, a period being every_epochs.

    staircase=True counts whole periods, one of them at the start itself: with rate=0.5, start_epoch=4 the fifth epoch
    (index 4) runs at half the peak, as in the TensorFlow PTB tutorial. staircase=False is continuous and starts at 1.
    """

    rate: float
    start_epoch: float
    every_epochs: float = 1
    staircase: bool = True

    def __post_init__(self) -> None:
        _set(
            self,
            rate=_number("rate", self.rate),
            start_epoch=_number("start_epoch", self.start_epoch, zero=True),
            every_epochs=_number("every_epochs", self.every_epochs),
        )
        if not isinstance(self.staircase, bool):
            _fail("staircase", self.staircase, "True or False")

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        return {
            "kind": scalars.STAIRCASE if self.staircase else scalars.EXPONENTIAL,
            "start": self.start_epoch * schedule.steps_per_epoch,
            "pace": 1 / (self.every_epochs * schedule.steps_per_epoch),
            "log_rate": math.log(self.rate),
        }


def _ending(schedule: LEGW, decay: Decay, end_lr: float, start: float) -> dict[str, float]:
    """The fields shared by the decays that end at T = epochs * steps_per_epoch."""
    name = type(decay).__name__
    if schedule.total_steps is None:
        raise ValueError(f"epochs must be given for decay={name}, got None")
    end, warmup = schedule.total_steps, schedule.warmup_steps
    if end <= warmup:
        raise ValueError(
            f"epochs={schedule.epochs!r} ends the run after {end:g} updates, inside its warm-up of "
            f"warmup_steps={warmup:g} ({schedule.warmup_epochs:g} epochs): decay={name} has nothing left to decay over"
        )
    if end_lr > schedule.peak_lr:
        raise ValueError(f"end_lr must be at most the peak LR {schedule.peak_lr!r}, got {end_lr!r}")
    return {"start": start, "end": end, "pace": 1 / (end - start), "floor": end_lr / schedule.peak_lr}


@dataclass(frozen=True)
class Polynomial(Decay):
    """r + (1 - r) * (1 - s)^power, r = end_lr / peak LR. Needs the schedule's `epochs`.

    span="remaining": s runs from 0 at the end of the warm-up to 1 at the end of training (LEGW's ResNet code).
    span="whole": s runs from 0 at the start of training, so the LR jumps where the warm-up ends (LEGW's MNIST code).
    end_lr: this run's absolute LR at the end, not scaled with the batch.
    """

    power: float = 1.0
    end_lr: float = 0.0
    span: Literal["remaining", "whole"] = "remaining"

    def __post_init__(self) -> None:
        _set(self, power=_number("power", self.power), end_lr=_number("end_lr", self.end_lr, zero=True))
        if self.span not in ("remaining", "whole"):
            _fail("span", self.span, "'remaining' or 'whole'")

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        start = schedule.warmup_steps if self.span == "remaining" else 0.0
        shared = _ending(schedule, self, self.end_lr, start)
        return {"kind": scalars.POLYNOMIAL, "power": self.power, **shared}


@dataclass(frozen=True)
class Cosine(Decay):
    """r + (1 - r) * (1 + cos(pi * s)) / 2 over what remains after the warm-up, r = end_lr / peak LR. Needs `epochs`.

    end_lr: this run's absolute LR at the end, not scaled with the batch.
    """

    end_lr: float = 0.0

    def __post_init__(self) -> None:
        _set(self, end_lr=_number("end_lr", self.end_lr, zero=True))

    def _recipe(self, schedule: LEGW) -> dict[str, float]:
        return {"kind": scalars.COSINE, **_ending(schedule, self, self.end_lr, schedule.warmup_steps)}


_DECAYS = {decay.__name__: decay for decay in (Constant, MultiStep, Exponential, Polynomial, Cosine)}
_SCALINGS = {"sqrt": math.sqrt, "linear": lambda k: k, "none": lambda k: 1.0}


@dataclass(frozen=True)
class LEGW:
    """The learning rate of a recipe tuned at one batch size, at another batch size, with nothing retuned.

    With k = batch_size / base_batch_size: the peak LR is sqrt(k) * base_lr, the warm-up lasts k * base_warmup_epochs
    epochs, and the recipe's own decay keeps its epochs. `schedule(t)` is the LR of the update made after t completed
    ones: peak * min(1, (t + 1) / warmup_steps), times the decay once t >= warmup_steps.

    Args:
        base_lr: peak LR of the tuned recipe.
        base_batch_size: its global batch, in samples.
        base_warmup_epochs: its warm-up, in epochs; 0 for none.
        batch_size: this run's global, effective batch: all workers, all accumulated micro-batches.
        dataset_size: samples per epoch.
        epochs: length of the run; needed by decays that end (Polynomial, Cosine).
        decay: Constant(), MultiStep(...), Exponential(...), Polynomial(...) or Cosine(...).
        scaling: "sqrt" (LEGW), "linear" (Goyal et al. 2017) or "none".
        steps_per_epoch: updates per epoch; dataset_size / batch_size unless given. With a real loader pass
            `len(loader)`, else the last updates of a run fall past its end.

    Raises:
        ValueError: naming the argument and its value.

    >>> schedule = LEGW(0.1, 16, 0.5, batch_size=512, dataset_size=1280, epochs=60)
    >>> round(schedule.peak_lr, 4), schedule.warmup_epochs, schedule.warmup_steps
    (0.5657, 16.0, 40.0)
    >>> schedule(0) == schedule.peak_lr / 40
    True
    """

    base_lr: float
    base_batch_size: int
    base_warmup_epochs: float
    _: KW_ONLY
    batch_size: int
    dataset_size: int
    epochs: float | None = None
    decay: Decay = Constant()
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    steps_per_epoch: float = None  # type: ignore[assignment]  # a number once made

    def __post_init__(self) -> None:
        _set(
            self,
            base_lr=_number("base_lr", self.base_lr),
            base_batch_size=_count("base_batch_size", self.base_batch_size),
            base_warmup_epochs=_number("base_warmup_epochs", self.base_warmup_epochs, zero=True),
            batch_size=_count("batch_size", self.batch_size),
            dataset_size=_count("dataset_size", self.dataset_size),
            epochs=None if self.epochs is None else _number("epochs", self.epochs),
        )
        if not isinstance(self.decay, tuple(_DECAYS.values())):
            _fail("decay", self.decay, f"an object of one of {', '.join(_DECAYS)}")
        if self.scaling not in _SCALINGS:
            _fail("scaling", self.scaling, f"one of {', '.join(map(repr, _SCALINGS))}")
        if self.steps_per_epoch is None:
            _set(self, steps_per_epoch=self.dataset_size / self.batch_size)
        else:
            _set(self, steps_per_epoch=_number("steps_per_epoch", self.steps_per_epoch))
        _ = self.recipe  # made now, so that a decay's objections come now

    @cached_property
    def _exact_steps_per_epoch(self) -> Fraction:
        ratio = Fraction(self.dataset_size, self.batch_size)
        return ratio if self.steps_per_epoch == float(ratio) else _exact(self.steps_per_epoch)

    @cached_property
    def recipe(self) -> scalars.Recipe:
        """The schedule's constants in updates, as the host formula and the kernels take them."""
        peak, steps = self.peak_lr, self.warmup_steps
        warmup = scalars.Recipe(peak_lr=peak, warmup_steps=steps, slope=peak / steps if steps else 0.0)
        return warmup._replace(**self.decay._recipe(self))

    @cached_property
    def milestones(self) -> tuple[int, ...]:
        """The updates at which a MultiStep decay passes its milestones."""
        return self.decay._milestones(self)

    @property
    def scale(self) -> float:
        """k, this batch over the recipe's."""
        return self.batch_size / self.base_batch_size

    @property
    def peak_lr(self) -> float:
        """The LR at the end of the warm-up."""
        return float(_SCALINGS[self.scaling](self.scale)) * self.base_lr

    @property
    def warmup_epochs(self) -> float:
        """The warm-up in epochs: k times the recipe's."""
        return self.scale * self.base_warmup_epochs

    @property
    def warmup_steps(self) -> float:
        """W, the warm-up in updates: may be fractional, and is the same at every batch size."""
        scale = Fraction(self.batch_size, self.base_batch_size)
        return float(_exact(self.base_warmup_epochs) * scale * self._exact_steps_per_epoch)

    @property
    def total_steps(self) -> float | None:
        """T, the run in updates, may be fractional; None without `epochs`."""
        return None if self.epochs is None else float(_exact(self.epochs) * self._exact_steps_per_epoch)

    def __call__(self, t: int) -> float:
        """The float64 LR of the update made after t completed ones (t = 0, 1, 2, ...)."""
        t = _count("t", t, zero=True)
        passed = bisect_right(self.milestones, t)
        return float(scalars.learning_rate(float(t), float(passed), self.recipe))

    def with_batch_size(self, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """The same recipe at another batch size. steps_per_epoch belongs to a batch, so it is not carried over."""
        return replace(self, batch_size=batch_size, steps_per_epoch=steps_per_epoch)  # type: ignore[arg-type]

    def plot(self, ax: Any = None, **line: Any) -> Any:
        """Draw LR against epochs with matplotlib (the extra `fused-legw[plot]`); returns the Axes.

        ax: matplotlib Axes to draw on, else a new figure's. line: passed to `ax.plot`, for instance label or color.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.figure(layout="constrained").gca()
        last = math.ceil(
            self.total_steps or max(3 * self.warmup_steps, self.steps_per_epoch, *self.milestones, 1) * 1.2
        )
        joints = {math.floor(self.warmup_steps), math.ceil(self.warmup_steps), *self.milestones}
        updates = sorted({round(last * i / 1000) for i in range(1000)} | {t + d for t in joints for d in (-1, 0)})
        updates = [t for t in updates if 0 <= t < last]
        line.setdefault("label", f"batch {self.batch_size}")
        ax.plot([t / self.steps_per_epoch for t in updates], [self(t) for t in updates], **line)
        ax.set(xlabel="epoch", ylabel="learning rate")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """The schedule as primitives, for checkpoints and JSON."""
        return {**asdict(self), "decay": {"name": type(self.decay).__name__, **asdict(self.decay)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LEGW:
        """The inverse of `to_dict`; a ValueError names what is not a schedule's."""
        try:
            decay = dict(values["decay"])
            name = decay.pop("name")
            if name not in _DECAYS:
                _fail("decay", name, f"one of {', '.join(_DECAYS)}")
            return cls(**{**values, "decay": _DECAYS[name](**decay)})
        except (TypeError, KeyError) as error:
            raise ValueError(f"schedule must be what LEGW.to_dict() gives, got {values!r}: {error}") from error
