"""What the LR does after the warm-up: the decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from legw_kernels import formulas

from ..checks import fail, number
from .clock import Clock, assign, exact


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

    def constants(self, run: Run) -> dict[str, float]:
        """The fields of `formulas.ScheduleConstants` that this decay sets, in updates."""
        raise NotImplementedError

    def boundaries(self, run: Run) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Constant(Decay):
    """No decay: the peak LR from the end of the warm-up on."""

    def constants(self, run: Run) -> dict[str, float]:
        return {"kind": formulas.CONSTANT}


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

    def constants(self, run: Run) -> dict[str, float]:
        return {"kind": formulas.MULTISTEP, "log_rate": math.log(self.factor)}

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

    def constants(self, run: Run) -> dict[str, float]:
        return {
            "kind": formulas.STAIRCASE if self.staircase else formulas.EXPONENTIAL,
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

    def constants(self, run: Run) -> dict[str, float]:
        start = run.warmup_end if self.span == "remaining" else Fraction(0)
        shared = _ending(run, self, self.end_lr, start)
        return {"kind": formulas.POLYNOMIAL, "power": self.power, **shared}


@dataclass(frozen=True)
class Cosine(Decay):
    """r + (1 - r) * (1 + cos(pi * s)) / 2 over what remains after the warm-up, r = end_lr / peak LR. Needs `epochs`.

    end_lr: this run's absolute LR at the end, not scaled with the batch.
    """

    end_lr: float = 0.0

    def __post_init__(self) -> None:
        assign(self, end_lr=number("end_lr", self.end_lr, zero=True))

    def constants(self, run: Run) -> dict[str, float]:
        return {"kind": formulas.COSINE, **_ending(run, self, self.end_lr, run.warmup_end)}


DECAYS = {decay.__name__: decay for decay in (Constant, MultiStep, Exponential, Polynomial, Cosine)}
