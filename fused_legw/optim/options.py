"""What may be written to a param group."""

from __future__ import annotations

import math
import operator
from typing import Any

from .. import checks
from ..backends.layout import State, named_params
from ..backends.select import explain_backend
from ..buffers.bucket import MASTER
from ..schedules.autowu import AutoWU
from ..schedules.base import Schedule
from ..schedules.legw import LEGW
from ..spec import Group, Rule


def check_written_lr(label: str, lr: Any) -> None:
    """Refuse an LR written to a group, or loaded. Negative ones torch.optim follows: a LambdaLR past its end, say."""
    if isinstance(lr, Schedule):
        raise TypeError(f"{label}['lr'] is {lr}: set {label}['schedule'] instead")
    checks.check_scalar(f"{label}['lr']", lr, low=-math.inf)


def check_place(groups: list[Group], steps_applied: int) -> None:
    """Refuse a place in a schedule from before its batch last changed: kernels are not told what it was then."""
    for group in groups:
        since = group["schedule"].since if group["schedule"] is not None else 0
        if steps_applied < since:
            raise ValueError(
                f"steps_applied={steps_applied} lies before update {since}, where the batch size of "
                f"{group['schedule']} changed: set a schedule of one batch size first, its with_batch_size"
            )


class Written:
    """A rule's check of groups that anyone may have written to, made only where something was.

    It is left out where the options of a group are the very objects that passed it last. Of types that can change in
    place none pass for good, but for tensors in a tuple, and AutoWU, which checks itself.
    """

    _IMMUTABLE = frozenset({type(None), bool, int, float, str, tuple, LEGW, AutoWU})

    def __init__(self, rule: Rule, defaults: Group) -> None:
        self._rule = rule
        self._options = tuple(defaults.keys() - {"lr"})
        self._passed: dict[int, tuple[object, ...]] = {}

    def check(self, i: int, group: Group) -> None:
        """Refuse the options of group i, but its LR."""
        options = (group.get("lr_scale", 1.0), *map(group.get, self._options))
        passed = self._passed.get(i)
        if passed is not None and all(map(operator.is_, options, passed)):
            return
        with checks.naming(f"param_groups[{i}]"):
            self._rule.check(group)
        if self._IMMUTABLE.issuperset(map(type, options)):
            self._passed[i] = options
        else:
            self._passed.pop(i, None)


def check_params(rule: Rule, groups: list[Group], state: State, backend: str | None) -> None:
    """Refuse what cannot be optimized, before anything has changed."""
    named = named_params(groups)
    for name, p, group in named:
        checks.check_parameter(name, p)
        if rule.projects:
            checks.check_rows(name, p)
        checks.check_lr(groups[group]["lr"], name, p)
        checks.check_state(f"the state of {name}: ", state.get(p, {}), (*rule.states, MASTER), p.shape)
    for device in {p.device for _, p, _ in named}:
        explain_backend(device, backend)
    checks.check_overlaps([(name, p) for name, p, _ in named])
