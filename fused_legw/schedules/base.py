"""What a schedule is to the optimizers."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from legw_kernels import formulas

from ..checks import count


class Schedule:
    """What the optimizers take as `lr=` besides numbers: an LR for each update, by constants that kernels can read."""

    constants: formulas.ScheduleConstants  # they hold for every update from `since` on
    milestones: tuple[int, ...]  # the updates that a MultiStep decay counts; a change of the batch keeps their number

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 where it never did."""
        raise NotImplementedError

    @property
    def peak_lr(self) -> float:
        """The LR at the end of the warm-up."""
        raise NotImplementedError

    def __call__(self, t: int) -> float:
        """The float64 LR of the update made after t completed ones (t = 0, 1, 2, ...)."""
        t = count("t", t, zero=True)
        then = self.as_of(t)
        passed = bisect_right(then.milestones, t)
        return float(formulas.learning_rate(float(t), float(passed), then.constants))

    def as_of(self, t: int) -> Schedule:
        """The schedule that update t followed, before later changes of the batch."""
        raise NotImplementedError

    def has_batch(self, batch_size: int, steps_per_epoch: float | None) -> bool:
        """Whether that is the batch now; raises as `change_batch_size` does for arguments that are none."""
        raise NotImplementedError

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> Schedule:
        """The schedule that goes on at another batch size after t updates. This one stays as it is."""
        raise NotImplementedError

    def become(self, other: Schedule) -> Schedule:
        """What an optimizer that follows this one is to follow when it moves to the other."""
        return other

    def to_dict(self) -> dict[str, Any]:
        """The schedule as primitives, for checkpoints and JSON."""
        raise NotImplementedError
