"""The place of an optimizer in its schedule: its count of updates, its batch size, its learning rate."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from ..checks import count
from ..schedules.base import Schedule
from ..spec import Group, group_lr
from .options import check_place
from .run import Run


class PlaceInSchedule:
    """The part of `FusedOptimizer` that tells and changes where the run is in its schedule."""

    _run: Run
    param_groups: list[Group]
    state: defaultdict[Tensor, Any]

    @property
    def steps_applied(self) -> int:
        """Updates applied so far: the schedule's t for the next update. Reads the device; can be set.

        Raises:
            ValueError: set to no integer, zero or more, or to an update before the last batch change.
        """
        devices = self._run.engine.devices if self._run.engine else []
        return int(devices[0].step_counts[0]) if devices else self._run.host_steps

    @steps_applied.setter
    def steps_applied(self, value: int) -> None:
        value = count("steps_applied", value, zero=True)
        check_place(self.param_groups, value)
        run = self._run
        for device in run.engine.devices if run.engine else ():
            device.step_counts[0] = value
        run.host_steps, run.steps_given = value, True
        run.shown.show(self.param_groups, value)

    def set_batch_size(self, batch_size: int, *, steps_per_epoch: float | None = None) -> None:
        """Continue at another batch size, in every group with a schedule: see `LEGW.change_batch_size`.

        The warm-up continues by updates and never restarts. The decay continues by epochs. The peak LR becomes that of
        the new batch. Nothing is compiled or captured again, but captured CUDA graphs need `upload_param_groups()`.
        Reads the device, unless this is the current batch.

        Args:
            batch_size: the global batch of the updates that follow, in samples.
            steps_per_epoch: updates per epoch at that batch, as in `LEGW`.

        Raises:
            ValueError: the schedule refuses the batch size, or no group has a schedule; nothing has changed.
            RuntimeError: the call is inside a graph capture.

        >>> import torch
        >>> from fused_legw import LEGW, SGD
        >>> schedule = LEGW(0.1, 16, 0.5, batch_size=64, dataset_size=1280)
        >>> optimizer = SGD(torch.nn.Linear(4, 2).parameters(), lr=schedule)
        >>> optimizer.set_batch_size(256)
        >>> optimizer.param_groups[0]["schedule"].peak_lr / schedule.peak_lr
        2.0
        """
        batch_size = count("batch_size", batch_size)
        scheduled = [group for group in self.param_groups if group["schedule"] is not None]
        if not scheduled:
            raise ValueError(
                f"batch_size={batch_size}: no param group follows a schedule, set param_groups[i]['schedule']"
            )
        layout, engine = self._run.layout, self._run.engine
        if engine is not None and engine.capturing:
            raise RuntimeError(f"set_batch_size({batch_size}) was called in a graph capture: call it outside")
        # Keyed by identity, so that groups that share a schedule share the new one.
        schedules: dict[int, Schedule] = {id(group["schedule"]): group["schedule"] for group in scheduled}
        changing = {key: s for key, s in schedules.items() if not s.has_batch(batch_size, steps_per_epoch)}
        if not changing:
            return
        t = self.steps_applied
        changed = {
            key: schedule.change_batch_size(t, batch_size, steps_per_epoch=steps_per_epoch)
            for key, schedule in changing.items()
        }
        fits = layout is not None and not layout.stale(self.param_groups, self.state)
        for group in scheduled:
            if (key := id(group["schedule"])) in changed:
                group["schedule"] = changing[key].become(changed[key])
        if layout is not None and fits:
            layout.follow()

    def get_last_lr(self) -> list[float]:
        """Each group's exact LR at the last applied update; before any, at the first. Reads the device."""
        t = max(self.steps_applied - 1, 0)
        return [group_lr(group, t) for group in self.param_groups]
