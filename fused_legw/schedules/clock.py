"""Epochs and updates, exactly, across changes of the batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction


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
