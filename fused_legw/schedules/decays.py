"""The decays: the factor on the peak LR after the warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from legw_kernels import formulas

from ..checks import fail, number, plain
from .clock import Clock, assign, exact


class RunLength(NamedTuple):
    """How long a run and its warm-up are, and its peak LR: the input of a decay."""

    peak_lr: float
    warmup_steps: float  # in updates
    warmup_end: Fraction  # in epochs
    epochs: float | None
    clock: Clock  # converts between epochs and updates


class Decay:
    """A factor on the peak LR after the warm-up. Its epochs count from the start of training.

    No dataclass, though every decay is one: readers of YAML take a field that is a dataclass for that very class.
    """

    def constants(self, run: RunLength) -> dict[str, float]:
        """The fields of `formulas.ScheduleConstants` that this decay sets, in updates."""
        raise NotImplementedError

    def boundaries(self, run: RunLength) -> tuple[int, ...]:
        """The updates at which the factor drops, for `Schedule.milestones`."""
        return ()


@dataclass(frozen=True)
class Constant(Decay):
    """No decay: the LR stays at its peak after the warm-up."""

    def constants(self, run: RunLength) -> dict[str, float]:
        return {"kind": formulas.CONSTANT}


@dataclass(frozen=True)
class MultiStep(Decay):
    """The peak LR times `factor` for each milestone passed.

    A milestone at epoch e is passed from update ceil(e * steps_per_epoch) on. A milestone inside the warm-up takes
    effect when the warm-up ends.

    Args:
        milestones: epochs from the start of training, increasing; none for a constant LR.
        factor: what the LR is multiplied by at each milestone.

    Raises:
        ValueError: naming the argument and its value.
    """

    milestones: Sequence[float]
    factor: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.milestones, np.ndarray):
            assign(self, milestones=self.milestones.tolist())
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Sequence):
            fail("milestones", self.milestones, "a sequence of epochs")
        assign(self, milestones=tuple(number("milestones", epoch) for epoch in self.milestones))
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            fail("milestones", self.milestones, "increasing")
        assign(self, factor=number("factor", self.factor))

    def constants(self, run: RunLength) -> dict[str, float]:
        return {"kind": formulas.MULTISTEP, "log_rate": math.log(self.factor)}

    def boundaries(self, run: RunLength) -> tuple[int, ...]:
        return tuple(run.clock.whole_update(exact(epoch)) for epoch in self.milestones)


@dataclass(frozen=True)
class Exponential(Decay):
    """The peak LR times `rate` for each period after start_epoch.

    Args:
        rate: the factor per period.
        start_epoch: the epoch at which the decay starts.
        every_epochs: the length of a period, in epochs.
        staircase: True: the LR drops once per period, for the first time at start_epoch itself. With rate=0.5 and
            start_epoch=4 the fifth epoch runs at half the peak, as in TensorFlow's PTB tutorial. False: the LR falls
            continuously, from the peak at start_epoch.

    Raises:
        ValueError: naming the argument and its value.
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
            staircase=plain(self.staircase),
        )
        if not isinstance(self.staircase, bool):
            fail("staircase", self.staircase, "True or False")

    def constants(self, run: RunLength) -> dict[str, float]:
        return {
            "kind": formulas.STAIRCASE if self.staircase else formulas.EXPONENTIAL,
            "start": float(run.clock.update(exact(self.start_epoch))),
            "pace": 1 / (self.every_epochs * float(run.clock.steps_per_epoch)),
            "log_rate": math.log(self.rate),
        }


def _ending(run: RunLength, decay: Decay, end_lr: float, start_epoch: Fraction) -> dict[str, float]:
    """The fields of the decays that end with the run."""
    name = type(decay).__name__
    if run.epochs is None:
        raise ValueError(f"epochs must be given for decay={name}, got None")
    start, end = float(run.clock.update(start_epoch)), float(run.clock.update(exact(run.epochs)))
    if end <= float(run.clock.update(run.warmup_end)):
        raise ValueError(
            f"epochs={run.epochs!r} ends the run after {end:g} updates, inside its warm-up of "
            f"warmup_steps={run.warmup_steps:g} ({float(run.warmup_end):g} epochs): decay={name} needs more epochs "
            "or a shorter warm-up"
        )
    if end_lr > run.peak_lr:
        raise ValueError(f"end_lr must be at most the peak LR {run.peak_lr!r}, got {end_lr!r}")
    return {"start": start, "end": end, "pace": 1 / (end - start), "floor": end_lr / run.peak_lr}


@dataclass(frozen=True)
class Polynomial(Decay):
    """A polynomial decay to end_lr at the end of the run. Needs the schedule's `epochs`.

    The factor is r + (1 - r) * (1 - s)^power, where r = end_lr / peak LR and the progress s ends at 1.

    Args:
        power: 1 for a linear decay.
        end_lr: this run's LR at the end; it does not scale with the batch.
        span: "remaining": s is 0 at the end of the warm-up (LEGW's ResNet code). "whole": s is 0 at the start of
            training, so the LR jumps where the warm-up ends (LEGW's MNIST code).

    Raises:
        ValueError: naming the argument and its value.
    """

    power: float = 1.0
    end_lr: float = 0.0
    span: Literal["remaining", "whole"] = "remaining"

    def __post_init__(self) -> None:
        assign(
            self,
            power=number("power", self.power),
            end_lr=number("end_lr", self.end_lr, zero=True),
            span=plain(self.span),
        )
        if self.span not in ("remaining", "whole"):
            fail("span", self.span, "'remaining' or 'whole'")

    def constants(self, run: RunLength) -> dict[str, float]:
        start = run.warmup_end if self.span == "remaining" else Fraction(0)
        shared = _ending(run, self, self.end_lr, start)
        return {"kind": formulas.POLYNOMIAL, "power": self.power, **shared}


@dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine from the peak LR at the end of the warm-up to end_lr at the end. Needs the schedule's `epochs`.

    The factor is r + (1 - r) * (1 + cos(pi * s)) / 2, where r = end_lr / peak LR and the progress s runs from 0 to 1.

    Args:
        end_lr: this run's LR at the end; it does not scale with the batch.

    Raises:
        ValueError: naming the argument and its value.
    """

    end_lr: float = 0.0

    def __post_init__(self) -> None:
        assign(self, end_lr=number("end_lr", self.end_lr, zero=True))

    def constants(self, run: RunLength) -> dict[str, float]:
        return {"kind": formulas.COSINE, **_ending(run, self, self.end_lr, run.warmup_end)}


DECAYS = {decay.__name__: decay for decay in (Constant, MultiStep, Exponential, Polynomial, Cosine)}
