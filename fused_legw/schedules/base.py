"""The interface of schedules, as the optimizers use it."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from legw_kernels import formulas

from ..checks import count


class Schedule:
    """An LR for every update, described by constants that kernels can read. Optimizers take it as `lr=`."""

    constants: formulas.ScheduleConstants  # valid for every update from `since` on
    milestones: tuple[int, ...]  # the updates at which a MultiStep decay drops; a batch change keeps their number

    @property
    def recipe(self) -> formulas.ScheduleConstants:
        """`constants`, under the name it had before 0.1.0."""
        return self.constants

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 if it never did."""
        raise NotImplementedError

    @property
    def peak_lr(self) -> float:
        """The LR at the end of the warm-up."""
        raise NotImplementedError

    def __call__(self, t: int) -> float:
        """The float64 LR of update t, the one made after t completed updates (t = 0, 1, 2, ...).

        Raises:
            ValueError: t is not an integer, zero or more.
        """
        t = count("t", t, zero=True)
        then = self.as_of(t)
        passed = bisect_right(then.milestones, t)
        return float(formulas.learning_rate(float(t), float(passed), then.constants))

    def as_of(self, t: int) -> Schedule:
        """The schedule that update t followed, before later changes of the batch."""
        raise NotImplementedError

    def has_batch(self, batch_size: int, steps_per_epoch: float | None) -> bool:
        """Whether this is the current batch. Raises for the same arguments as `change_batch_size`."""
        raise NotImplementedError

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> Schedule:
        """The schedule that continues at another batch size after t updates. This one does not change."""
        raise NotImplementedError

    def become(self, other: Schedule) -> Schedule:
        """The object that an optimizer with this schedule follows once it moves to `other`."""
        return other

    def to_dict(self) -> dict[str, Any]:
        """The schedule as primitives, for checkpoints and JSON."""
        raise NotImplementedError
