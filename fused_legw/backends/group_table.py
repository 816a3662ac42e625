"""The tables in which kernels read param groups and the milestones of their schedules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from legw_kernels import launch, tables
from legw_kernels.formulas import FIXED, TENSOR32, TENSOR64, ScheduleConstants

from ..spec import Group, OptimizerSpec
from .device_table import DeviceTable

_LR_KINDS = {torch.float32: TENSOR32, torch.float64: TENSOR64}


class GroupTable:
    """Both tables of one device. Their sizes are fixed: another schedule needs another object."""

    def __init__(self, spec: OptimizerSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._groups: DeviceTable | None = None
        self._milestones: DeviceTable | None = None
        self._written = list[float](), list[int]()  # the last values of both
        self._options: int | None = None  # the options' generation of these values

    @property
    def made(self) -> bool:
        return self._groups is not None

    def write(self, groups: Sequence[Group], options: int | None = None) -> tuple[Tensor, Tensor]:
        """Write the groups' current values. Returns both tables on the device.

        options: the options' generation, a number that grows whenever an option of any group changes. If it has not
        grown, the last values are used again.
        """
        if options is None or options != self._options:
            rows, on_device, milestones = self._rows(groups)
            self._written = rows, milestones or [0]
            self._options = None if on_device else options  # tensors on a GPU may change in place
        else:
            on_device = []
        if self._groups is None or self._milestones is None:
            rows, milestones = self._written
            self._groups = DeviceTable(len(rows), torch.float64, self._device, shared=True)
            self._milestones = DeviceTable(len(milestones), torch.int64, self._device, shared=True)
        table, milestone_table = self._groups.write(self._written[0]), self._milestones.write(self._written[1])
        for i, x in on_device:
            table[i].copy_(x.reshape(()))
        return table, milestone_table

    def _rows(self, groups: Sequence[Group]) -> tuple[list[float], list[tuple[int, Tensor]], list[int]]:
        """(the group table's values, (index, tensor) of values that are tensors on the device, the milestones)."""
        rows, on_device, milestones = list[float](), list[tuple[int, Tensor]](), list[int]()
        for group in groups:
            own = group["schedule"].milestones if group["schedule"] is not None else ()
            place = len(milestones), len(own)
            milestones += own
            constants, lr = self._constants(group)
            hyper = list[float]()
            x: Tensor | float
            for x in self._spec.hyper(group):
                if isinstance(x, Tensor):
                    on_device.append((len(rows) + tables.HYPER + len(hyper), x))
                hyper.append(0.0 if isinstance(x, Tensor) else x)
            states = sum(1 << self._spec.states.index(name) for name in self._spec.used_states(group))
            clip, vectors = self._spec.clip(group), self._spec.exempts_vectors(group)
            rows += launch.group_row(constants, lr, place, states, clip, vectors, hyper)
        return rows, on_device, milestones

    def _constants(self, group: Group) -> tuple[ScheduleConstants, Tensor | None]:
        """(constants, LR tensor on this device or None). A number and a tensor have kinds of their own."""
        lr, schedule = group["lr"], group["schedule"]
        if schedule is not None:
            constants: ScheduleConstants = schedule.constants
            if (scale := group.get("lr_scale", 1.0)) != 1:
                constants = constants._replace(peak_lr=scale * constants.peak_lr, slope=scale * constants.slope)
            return constants, None
        tensor = lr if isinstance(lr, Tensor) and lr.device == self._device else None
        if tensor is not None and tensor.dtype in _LR_KINDS:
            return ScheduleConstants(_LR_KINDS[tensor.dtype]), tensor
        return ScheduleConstants(FIXED, float(lr)), tensor
