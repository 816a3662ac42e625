"""Exact conversion between epochs and updates, across batch changes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction


def assign(frozen: object, **values: object) -> None:
    """Set attributes of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def exact(value: float) -> Fraction:
    """The number a person wrote: 0.1 is 1/10, not the nearest double."""
    return Fraction(str(value))


class Clock:
    """Converts updates to epochs and back, exactly. The updates per epoch may change during the run.

    A stretch is a part of the run with one number of updates per epoch, its pace.
    """

    def __init__(self, stretches: Sequence[tuple[int, Fraction]]) -> None:
        """stretches: (first update, updates per epoch) of each, in order; the first begins at update 0."""
        self._begins, self._paces = [begin for begin, _ in stretches], [pace for _, pace in stretches]
        self._epochs = [Fraction(0)]
        for (begin, pace), end in zip(stretches, self._begins[1:], strict=False):
            self._epochs.append(self._epochs[-1] + (end - begin) / pace)

    @property
    def steps_per_epoch(self) -> Fraction:
        """The updates per epoch of the last stretch."""
        return self._paces[-1]

    def epoch(self, t: Fraction | int) -> Fraction:
        """The epochs done after t updates."""
        i = bisect_right(self._begins, t) - 1
        return self._epochs[i] + (t - self._begins[i]) / self._paces[i]

    def update(self, epoch: Fraction | int) -> Fraction:
        """The update t at which this many epochs are done, at the last stretch's pace.

        The result may lie before the last stretch, and even below 0.
        """
        return self._begins[-1] + (epoch - self._epochs[-1]) * self.steps_per_epoch

    def whole_update(self, epoch: Fraction) -> int:
        """`update` rounded up to an integer. A tolerance absorbs rounding: 3 epochs of 10/3 updates are 10."""
        t = self.update(epoch)
        nearest = round(t)
        return nearest if abs(t - nearest) <= Fraction(1, 10**12) * max(1, nearest) else math.ceil(t)
