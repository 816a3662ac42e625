"""What the LR does after the warm-up: the decays, and the checks of numbers they share with the run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, NamedTuple, NoReturn

from legw_kernels import scalars


def fail(name: str, value: object, rule: str) -> NoReturn:
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def number(name: str, value: object, *, zero: bool = False) -> float:
    """The value as a float, if it is a finite positive number (or zero, if `zero`)."""
    try:
        converted = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or converted < 0 or (converted == 0 and not zero):
        fail(name, value, "a finite number, zero or more" if zero else "a finite positive number")
    return converted


def count(name: str, value: object, *, zero: bool = False) -> int:
    """The value as an int, if it is a positive integer (or zero, if `zero`) that fits 63 bits."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < (0 if zero else 1):
        fail(name, value, "an integer, zero or more" if zero else "a positive integer")
    if int(value) >= 2**63:
        fail(name, value, "an integer below 2**63")
    return int(value)


def assign(frozen: object, **values: object) -> None:
    """Assign to a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def exact(value: float) -> Fraction:
    """The number a person wrote: 0.1 is 1/10, not the nearest double."""
    return Fraction(str(value))


class Clock:
    """Epochs by update, exactly, where the updates per epoch may change: they do with the batch."""

    def __init__(self, stretches: Sequence[tuple[int, Fraction]]) -> None:
        """stretches: the first update of each, and its updates per epoch; the first begins at 0."""
        self._begins, self._paces = [begin for begin, _ in stretches], [pace for _, pace in stretches]
        self._epochs = [Fraction(0)]
        for (begin, pace), end in zip(stretches, self._begins[1:], strict=False):
            self._epochs.append(self._epochs[-1] + (end - begin) / pace)

    @property
    def steps_per_epoch(self) -> Fraction:
        """Of the last stretch."""
        return self._paces[-1]

    def epoch(self, t: Fraction | int) -> Fraction:
        """The epochs done after t updates."""
        i = bisect_right(self._begins, t) - 1
        return self._epochs[i] + (t - self._begins[i]) / self._paces[i]

    def update(self, epoch: Fraction | int) -> Fraction:
        """The t at which so many epochs are done, by the last stretch's pace: it may lie before that, or before 0."""
        return self._begins[-1] + (epoch - self._epochs[-1]) * self.steps_per_epoch

    def whole_update(self, epoch: Fraction) -> int:
        """The first whole t then or later, where 3 epochs of 10/3 updates are 10 whatever the floats say."""
        t = self.update(epoch)
        nearest = round(t)
        return nearest if abs(t - nearest) <= Fraction(1, 10**12) * max(1, nearest) else math.ceil(t)


class Run(NamedTuple):
    """What a decay must know of the run it belongs to."""

    peak_lr: float
    warmup_steps: float
    warmup_end: Fraction  # in epochs
    epochs: float | None
    clock: Clock


@dataclass(frozen=True)
class Decay:
    """What the LR does after the warm-up: a multiplier of the peak LR, counted in epochs from the start of training."""

    def recipe(self, run: Run) -> dict[str, float]:
        """The fields of `scalars.Recipe` that this decay sets, in updates."""
        raise NotImplementedError

    def boundaries(self, run: Run) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Constant(Decay):
    """No decay: the peak LR from the end of the warm-up on."""

    def recipe(self, run: Run) -> dict[str, float]:
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
            fail("milestones", self.milestones, "a sequence of epochs")
        assign(self, milestones=tuple(number("milestones", epoch) for epoch in self.milestones))
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            fail("milestones", self.milestones, "increasing")
        assign(self, factor=number("factor", self.factor))

    def recipe(self, run: Run) -> dict[str, float]:
        return {"kind": scalars.MULTISTEP, "log_rate": math.log(self.factor)}

    def boundaries(self, run: Run) -> tuple[int, ...]:
        return tuple(run.clock.whole_update(exact(epoch)) for epoch in self.milestones)


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
        assign(
            self,
            rate=number("rate", self.rate),
            start_epoch=number("start_epoch", self.start_epoch, zero=True),
            every_epochs=number("every_epochs", self.every_epochs),
        )
        if not isinstance(self.staircase, bool):
            fail("staircase", self.staircase, "True or False")

    def recipe(self, run: Run) -> dict[str, float]:
        return {
            "kind": scalars.STAIRCASE if self.staircase else scalars.EXPONENTIAL,
            "start": float(run.clock.update(exact(self.start_epoch))),
            "pace": 1 / (self.every_epochs * float(run.clock.steps_per_epoch)),
            "log_rate": math.log(self.rate),
        }


def _ending(run: Run, decay: Decay, end_lr: float, start_epoch: Fraction) -> dict[str, float]:
    """The fields shared by the decays that end with the run's epochs."""
    name = type(decay).__name__
    if run.epochs is None:
        raise ValueError(f"epochs must be given for decay={name}, got None")
    start, end = float(run.clock.update(start_epoch)), float(run.clock.update(exact(run.epochs)))
    if end <= float(run.clock.update(run.warmup_end)):
        raise ValueError(
            f"epochs={run.epochs!r} ends the run after {end:g} updates, inside its warm-up of "
            f"warmup_steps={run.warmup_steps:g} ({float(run.warmup_end):g} epochs): decay={name} has nothing left to "
            "decay over"
        )
    if end_lr > run.peak_lr:
        raise ValueError(f"end_lr must be at most the peak LR {run.peak_lr!r}, got {end_lr!r}")
    return {"start": start, "end": end, "pace": 1 / (end - start), "floor": end_lr / run.peak_lr}


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
        assign(self, power=number("power", self.power), end_lr=number("end_lr", self.end_lr, zero=True))
        if self.span not in ("remaining", "whole"):
            fail("span", self.span, "'remaining' or 'whole'")

    def recipe(self, run: Run) -> dict[str, float]:
        start = run.warmup_end if self.span == "remaining" else Fraction(0)
        shared = _ending(run, self, self.end_lr, start)
        return {"kind": scalars.POLYNOMIAL, "power": self.power, **shared}


@dataclass(frozen=True)
class Cosine(Decay):
    """r + (1 - r) * (1 + cos(pi * s)) / 2 over what remains after the warm-up, r = end_lr / peak LR. Needs `epochs`.

    end_lr: this run's absolute LR at the end, not scaled with the batch.
    """

    end_lr: float = 0.0

    def __post_init__(self) -> None:
        assign(self, end_lr=number("end_lr", self.end_lr, zero=True))

    def recipe(self, run: Run) -> dict[str, float]:
        return {"kind": scalars.COSINE, **_ending(run, self, self.end_lr, run.warmup_end)}


DECAYS = {decay.__name__: decay for decay in (Constant, MultiStep, Exponential, Polynomial, Cosine)}
