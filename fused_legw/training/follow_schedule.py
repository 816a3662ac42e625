"""A scheduler object for frameworks that insist on one."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..optim.base import FusedOptimizer


class FollowSchedule(LRScheduler):
    """A torch LRScheduler that changes nothing and reports the LR that the optimizer's LEGW gives.

    For Lightning, Accelerate, the Trainer of Transformers and others that want a scheduler beside the optimizer. The
    schedule counts applied updates, so it does not matter how often, when, or whether `step()` is called.

    `last_epoch` and `_step_count` count the calls of `step()` as in every torch scheduler, and are all that its state
    dict holds: the schedule and its place in it are in the optimizer's.

    Raises TypeError for an optimizer that is not fused_legw's, whose LR it could not know.

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
        # Not LRScheduler.__init__: it writes initial_lr and lr into the groups, and wraps optimizer.step.
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"FollowSchedule follows an optimizer of fused_legw, got {type(optimizer).__module__}."
                f"{type(optimizer).__qualname__}"
            )
        self.optimizer: FusedOptimizer = optimizer
        self.last_epoch, self._step_count = 0, 1  # what torch's are once made

    def step(self, epoch: int | None = None) -> None:
        """Count the call; nothing else."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The optimizer's: each group's LR at the last applied update. Reads the device."""
        return [*self.optimizer.get_last_lr()]

    get_lr = get_last_lr

    @property
    def _last_lr(self) -> list[float | torch.Tensor]:  # type: ignore[override]  # some read it past the method
        return self.get_last_lr()

    @property
    def base_lrs(self) -> list[float | torch.Tensor]:  # type: ignore[override]
        """Each group's peak LR; the LR itself where the group follows no schedule."""
        groups = self.optimizer.param_groups
        return [group["schedule"].peak_lr if group["schedule"] else float(group["lr"]) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Two integers, as torch names them."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of what any torch scheduler stored, the two counts."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
