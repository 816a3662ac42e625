"""A scheduler object for frameworks that require one."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..optim.base import FusedOptimizer


class FollowSchedule(LRScheduler):
    """A torch LRScheduler that changes nothing and reports the LR of the optimizer's schedule.

    Lightning, Accelerate, the Trainer of Transformers and others want a scheduler besides the optimizer. The schedule
    itself counts applied updates, so it does not matter how often, when, or whether `step()` is called.

    It stands in the place of any of torch's schedulers: a group that follows a schedule refuses them. It refuses
    ReduceLROnPlateau not before its first reduction, because that writes nothing until then. What a torch scheduler
    that is gone has wrapped is undone by `del optimizer.step`.

    `last_epoch` and `_step_count` count the calls of `step()`, as in every torch scheduler. The state dict holds only
    these two: the optimizer's state dict holds the schedule and the place in it.

    Args:
        optimizer: an optimizer of fused_legw.

    Raises:
        TypeError: the optimizer is another one, whose LR this class cannot know.

    >>> import torch
    >>> from fused_legw import LEGW, SGD, FollowSchedule
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = SGD(model.parameters(), lr=LEGW(0.1, 16, 0.5, batch_size=512, dataset_size=1280))
    >>> scheduler = FollowSchedule(optimizer)
    >>> model(torch.ones(512, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> scheduler.get_last_lr() == optimizer.get_last_lr()
    True
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        # LRScheduler.__init__ is not called: it writes initial_lr and lr into the groups and wraps optimizer.step.
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"FollowSchedule follows an optimizer of fused_legw, got {type(optimizer).__module__}."
                f"{type(optimizer).__qualname__}"
            )
        self.optimizer: FusedOptimizer = optimizer
        self.last_epoch, self._step_count = 0, 1  # the values of a new torch scheduler

    def step(self, epoch: int | float | torch.Tensor | None = None) -> None:
        """Count the call. The LR does not change, nor does it for a metric, which ReduceLROnPlateau takes here."""
        self.last_epoch = epoch if isinstance(epoch, int) else self.last_epoch + 1
        self._step_count += 1

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Each group's LR at the last applied update, from the optimizer. Reads the device."""
        return [*self.optimizer.get_last_lr()]

    get_lr = get_last_lr

    @property
    def _last_lr(self) -> list[float | torch.Tensor]:  # type: ignore[override]  # some code reads it directly
        return self.get_last_lr()

    @property
    def base_lrs(self) -> list[float | torch.Tensor]:  # type: ignore[override]
        """Each group's peak LR, or its LR if the group has no schedule."""
        groups = self.optimizer.param_groups
        return [group["schedule"].peak_lr if group["schedule"] else float(group["lr"]) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """The two counts, by torch's names."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the two counts from the state dict of any torch scheduler."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
