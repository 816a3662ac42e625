"""The path of AutoWU's LR: an exponential warm-up, then the decay. It is frozen, so kernels can follow it."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal

from legw_kernels import formulas

from ..checks import count, fail, number, plain
from .base import Schedule
from .clock import Clock, assign, exact

_CONSTANT_PART = Fraction(4, 5)  # fraction of the run before "constant-then-cosine" starts to decay


def _share(name: str, value: object) -> float:
    share = number(name, value)
    if share >= 1:
        fail(name, value, "below 1")
    return share


@dataclass(frozen=True)
class ExponentialPath(Schedule):
    """The settings of an `AutoWU`, its batch changes, and its switch to the decay. `AutoWU` explains the settings."""

    total_steps: int  # in updates of the first batch size
    steps_per_epoch: float  # at the current batch size
    min_lr: float
    max_lr: float
    max_warmup_fraction: float
    patience: int
    tests: int
    confidence: float
    decay: Literal["cosine", "constant-then-cosine"]
    seed: int
    earlier: tuple[tuple[int, float], ...] = ()  # (end, steps_per_epoch) of each earlier batch size; end: an update
    switch: tuple[float, float] | None = None  # the update at which the warm-up ended, and the LR there

    milestones = ()

    def __post_init__(self) -> None:
        assign(
            self,
            total_steps=count("total_steps", self.total_steps),
            steps_per_epoch=number("steps_per_epoch", self.steps_per_epoch),
            min_lr=number("min_lr", self.min_lr),
            max_lr=number("max_lr", self.max_lr),
            max_warmup_fraction=_share("max_warmup_fraction", self.max_warmup_fraction),
            patience=count("patience", self.patience),
            tests=count("tests", self.tests),
            confidence=_share("confidence", self.confidence),
            decay=plain(self.decay),
            seed=count("seed", self.seed, zero=True),
            earlier=tuple((count("end", t, zero=True), number("steps_per_epoch", steps)) for t, steps in self.earlier),
        )
        if self.min_lr >= self.max_lr:
            fail("min_lr", self.min_lr, f"below max_lr={self.max_lr!r}")
        if self.decay not in ("cosine", "constant-then-cosine"):
            fail("decay", self.decay, "'cosine' or 'constant-then-cosine'")
        if any(a[0] >= b[0] for a, b in pairwise(self.earlier)):
            fail("earlier", self.earlier, "in the order of its ends")
        if self.switch is not None:
            t, lr = self.switch
            assign(self, switch=(number("switch", t), number("switch", lr)))

    @cached_property
    def _clock(self) -> Clock:
        begins, paces = (0, *(t for t, _ in self.earlier)), (*(pace for _, pace in self.earlier), self.steps_per_epoch)
        return Clock([(t, exact(pace)) for t, pace in zip(begins, paces, strict=True)])

    @cached_property
    def _epochs(self) -> Fraction:
        return self.total_steps / exact((*(pace for _, pace in self.earlier), self.steps_per_epoch)[0])

    @cached_property
    def _longest(self) -> Fraction:
        """The updates that the warm-up needs to reach max_lr."""
        return exact(self.max_warmup_fraction) * self.total_steps

    @cached_property
    def _climb(self) -> formulas.ScheduleConstants:
        """The constants of a warm-up that never ends."""
        growth = math.log(self.max_lr / self.min_lr) / float(self._longest)
        kind, endless = formulas.EXPONENTIAL_THEN_COSINE, math.inf
        return formulas.ScheduleConstants(kind, warmup_steps=endless, slope=self.min_lr, log_rate=growth)

    def warmup_lr(self, t: float) -> float:
        return float(formulas.learning_rate(t, 0.0, self._climb))

    @cached_property
    def end_of_warmup(self) -> tuple[float, float]:
        """The update at which the warm-up ends, and the LR there: at the switch, else at the latest possible update."""
        if self.switch is not None:
            return self.switch
        latest = self._clock.update(exact(self.max_warmup_fraction) * self._epochs)
        if self._longest <= latest:
            return float(self._longest), self.max_lr
        return float(latest), self.warmup_lr(float(latest))

    @cached_property
    def constants(self) -> formulas.ScheduleConstants:  # type: ignore[override]
        t, lr = self.end_of_warmup
        start = self._clock.epoch(Fraction(t))
        if self.decay == "constant-then-cosine":
            start = max(start, _CONSTANT_PART * self._epochs)
        begin, end = float(self._clock.update(start)), float(self._clock.update(self._epochs))
        return self._climb._replace(peak_lr=lr, warmup_steps=t, start=begin, end=end, pace=1 / (end - begin))

    @property
    def since(self) -> int:
        return self.earlier[-1][0] if self.earlier else 0

    @property
    def peak_lr(self) -> float:
        return self.end_of_warmup[1]

    def as_of(self, t: int) -> ExponentialPath:
        if t >= self.since:
            return self
        i = bisect_right([end for end, _ in self.earlier], t)
        return replace(self, steps_per_epoch=self.earlier[i][1], earlier=self.earlier[:i])

    def ended(self) -> ExponentialPath:
        """This path, with its warm-up declared over at `end_of_warmup`."""
        return replace(self, switch=self.end_of_warmup)

    def change_steps_per_epoch(self, t: int, steps_per_epoch: float) -> ExponentialPath:
        t = count("t", t, zero=True)
        if t < self.since:
            fail("t", t, f"at least {self.since}, where the batch size last changed")
        path = self.ended() if t >= self.end_of_warmup[0] else self
        if t == 0:  # no update was made at the earlier pace, but total_steps counts in it
            first = path.earlier or ((0, path.steps_per_epoch),)
            return replace(path, steps_per_epoch=steps_per_epoch, earlier=first)
        stretch = ((t, path.steps_per_epoch),) if t > path.since else ()
        return replace(path, steps_per_epoch=steps_per_epoch, earlier=(*path.earlier, *stretch))
