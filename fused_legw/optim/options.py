"""What may be written to a param group, and what a group shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.select import explain_backend
from ..buffers.complete import check_complete, check_unshared, check_values
from ..buffers.layout import Layout, named_params
from ..buffers.same import Same
from ..buffers.state import State
from ..schedules.autowu import AutoWU
from ..schedules.base import Schedule
from ..schedules.legw import LEGW
from ..spec import Group, OptimizerSpec, group_lr, python_numbers

_MISSING = object()  # stands for an option that someone deleted


def brief(schedule: Schedule) -> str:
    """A schedule's short name for errors; its repr takes several lines."""
    return f"{type(schedule).__name__}(peak_lr={schedule.peak_lr:g})"


def driven_twice(i: int, group: Group) -> RuntimeError:
    """The error where a torch LR scheduler was made for an optimizer whose group i follows a schedule."""
    return RuntimeError(
        f"use a schedule or a torch LR scheduler, not both: param_groups[{i}] follows {brief(group['schedule'])}, and "
        "a torch LR scheduler was made for this optimizer. Where code wants one, use FollowSchedule(optimizer). "
        "If the scheduler is gone, call `del optimizer.step`, which it had wrapped"
    )


def overwritten(i: int, group: Group) -> RuntimeError:
    """The error where other code wrote the "lr" of group i, which follows a schedule."""
    # Every torch LR scheduler but ReduceLROnPlateau leaves "initial_lr", also one made for a wrapper of the optimizer.
    writer = "a torch LR scheduler, which was made for it," if "initial_lr" in group else "ReduceLROnPlateau"
    return RuntimeError(
        f"to change the LR set param_groups[{i}]['schedule']: param_groups[{i}]['lr'] was set to {group['lr']!r}, but "
        f"the group follows {brief(group['schedule'])}. If {writer} did it, use FollowSchedule(optimizer) in its place"
    )


def check_written_lr(label: str, lr: Any) -> None:
    """Check an LR written to a group, or loaded. Negative ones pass, as in torch.optim: some LambdaLRs make them."""
    if isinstance(lr, Schedule):
        raise TypeError(f"set {label}['schedule'] instead: {label}['lr'] is {brief(lr)}")
    checks.check_scalar(f"{label}['lr']", lr, low=-math.inf)


def check_place(groups: Iterable[Group], steps_applied: int) -> None:
    """Reject a `steps_applied` earlier than the last batch change: the kernels only know the current batch."""
    for group in groups:
        since = group["schedule"].since if group["schedule"] is not None else 0
        if steps_applied < since:
            raise ValueError(
                f"steps_applied={steps_applied} lies before update {since}, where the batch size of "
                f"{brief(group['schedule'])} changed: first replace it by its with_batch_size(...)"
            )


class Admitted(NamedTuple):
    """What `check_params` found."""

    backends: dict[torch.device, str]  # the name of each device's backend
    let_be: list[Tensor]  # parameters that no update could write, but that need none as they are


def check_params(
    spec: OptimizerSpec,
    groups: list[Group],
    state: State,
    backend: str | None,
    layout: Layout | None = None,
) -> Admitted:
    """Raise for parameters, LRs or state that cannot be used.

    layout: the one so far. A master may misfit where its weight was replaced since, because the user never made it.
    """
    shapes = layout.views.shapes if layout is not None else {}
    admitted, let_be = list[tuple[str, Tensor]](), list[Tensor]()
    for name, p, group in named_params(groups):
        if checks.is_unmade(p):
            let_be.append(p)
            continue
        try:
            checks.check_parameter(name, p)
            if spec.projects:
                checks.check_rows(name, p)
        except (TypeError, ValueError, RuntimeError):
            if not checks.may_be_left(p):
                raise
            let_be.append(p)
            continue
        admitted.append((name, p))
        checks.check_lr(groups[group]["lr"], name, p)
        own = state.get(p, {})
        check_complete(f"the state of {name}", spec, groups[group], own, f"param_groups[{group}]")
        check_unshared(f"the state of {name}: ", spec, own)
        check_values(f"the state of {name}: ", spec, own, p.shape, master=shapes.get(p) == p.shape)
    let_be += checks.overlapping(admitted)
    left = set(map(id, let_be))
    devices = dict.fromkeys(p.device for _, p in admitted if id(p) not in left)
    return Admitted({device: explain_backend(device, backend)[0] for device in devices}, let_be)


class CheckedOptions:
    """Checks the options of param groups, which other code may write to, and brings NumPy's numbers to Python's own.

    Skipped while every option is the same object that passed last time. Mutable values are checked at every step; two
    exceptions: tensors in a tuple, and AutoWU, which validates itself.
    """

    _IMMUTABLE = frozenset({type(None), bool, int, float, str, tuple, LEGW, AutoWU})

    def __init__(self, spec: OptimizerSpec, defaults: Group) -> None:
        self._spec = spec
        self._names = tuple(defaults.keys() - {"lr"})
        # By group:
        self._passed: list[Same] = []  # the options that passed the last check
        self._lrs: list[object] = []  # the LR, or the schedule's constants, at that check
        self._in_place: list[bool] = []  # whether an option is a tuple with tensors, which can change in place
        self.generation = 0  # grows by one whenever an option's value may have changed, in any group

    def check(self, groups: Sequence[Group]) -> None:
        """Check the options of every group, except its LR, and update `generation`."""
        changed = len(self._passed) != len(groups)
        if changed:
            self._passed, self._in_place = [Same() for _ in groups], [False] * len(groups)
            self._lrs = [None] * len(groups)
        for i, group in enumerate(groups):
            options = [group.get("lr_scale", 1.0), *map(group.get, self._names, repeat(_MISSING))]
            if not self._passed[i].holds(options):
                changed = True
                self._passed[i].forget()
                python_numbers(group)  # what it replaced is another object at the next step, and passes then
                with checks.naming(f"param_groups[{i}]"):
                    self._spec.check(group)
                self._in_place[i] = any(type(x) is tuple and any(map(torch.is_tensor, x)) for x in options)
                if self._IMMUTABLE.issuperset(map(type, options)):
                    self._passed[i].keep(options)
            schedule = group["schedule"]
            lr = group["lr"] if schedule is None else schedule.constants
            if lr is not self._lrs[i] or isinstance(lr, Tensor) or self._in_place[i]:
                if schedule is None and type(lr) is not float:  # saves a call
                    lr = group["lr"] = checks.plain(lr)
                changed, self._lrs[i] = True, lr
        self.generation += changed


class ShownLR:
    """Shows the last update's LR and the update count in param groups, and tells when other code wrote an LR there."""

    def __init__(self) -> None:
        self._written: dict[int, float] = {}  # the "lr" that we wrote, by id of the group

    def show(self, groups: Iterable[Group], steps_applied: int) -> None:
        """Write "steps_applied" to every group, and "lr" to those with a schedule."""
        for group in groups:
            group["steps_applied"] = steps_applied
            shown = self._written.pop(id(group), group["lr"])
            if group["schedule"] is not None:
                if group["lr"] == shown:  # an LR that other code wrote stays: the next step raises for it
                    group["lr"] = shown = group_lr(group, max(steps_applied - 1, 0))
                self._written[id(group)] = shown

    def overwritten(self, group: Group) -> bool:
        """Whether other code wrote another LR to a group that follows a schedule."""
        shown = self._written.get(id(group))
        return group["schedule"] is not None and shown is not None and bool(group["lr"] != shown)
