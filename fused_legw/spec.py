"""What tells one fused optimizer from another; everything else they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import checks
from .schedules.base import Schedule

Group = dict[str, Any]  # one of torch.optim's param_groups
Gradients = Sequence[Tensor | None]  # one per segment of a bucket, in the parameter's layout


class OptimizerSpec:
    """An optimizer's state, and what its hyper-parameters mean to the kernels and to ATen."""

    name: str  # of the kernels' rule, in `legw_kernels.rules.registry.RULES`
    states: tuple[str, ...]  # torch's names, in that rule's order
    counts_steps = False  # whether optimizer.state holds each parameter's "step"
    adapts = False  # whether updates have a trust ratio
    two_stage = False  # whether the states advance in the norm pass, which a global norm must come before
    carries = False  # whether the norms of the weights may be carried over from the last step
    projects = False  # whether updates are projected by rows, which must then be contiguous in memory

    def __init__(self, aten: Callable[[Any, Any, float], None]) -> None:
        """aten: one update of an `AtenBatch` by ATen, with hyper-parameters as `hyper` gives them, read, and the LR."""
        self.aten = aten

    def check(self, group: Group) -> None:
        """Raise for options of the wrong kind or out of range, however they came into the group; LRs are checked apart.

        Reads no tensor that is not on the CPU.
        """
        schedule = group["schedule"]
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a LEGW, an AutoWU or None, got {schedule!r}")
        checks.check_number("lr_scale", group.get("lr_scale", 1.0))
        checks.check_scalar("weight_decay", group["weight_decay"], "weight_decay value")
        checks.check_flag("maximize", group["maximize"])
        checks.check_limit("max_grad_norm", group["max_grad_norm"])
        if group.get("differentiable"):
            if group.get("fused"):
                raise RuntimeError("`fused` does not support `differentiable`")
            raise ValueError("differentiable=True is not supported: the fused step is not recorded by autograd")

    def check_made(self, group: Group) -> None:
        """Raise for what torch.optim refuses only where a group is made: its schedulers may well write it later."""
        checks.check_scalar("lr", group["lr"], "learning rate")
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def complete(self, group: Group) -> None:
        """Fill in the defaults that depend on other options, and bring values to one form."""

    def used_states(self, group: Group) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Any:
        """The group's hyper-parameters as one of `formulas`' tuples; what is a tensor on a GPU stays one."""
        raise NotImplementedError

    def clip(self, group: Group) -> tuple[float, bool]:
        """The global norm to clip gradients at (infinite: none), and whether by LAMB's formula or torch's."""
        limit = group["max_grad_norm"]
        return (math.inf if limit is None else float(limit)), False

    def clips(self, groups: Sequence[Group]) -> bool:
        """Whether any group clips."""
        return any(self.clip(group)[0] < math.inf for group in groups)

    def exempts_vectors(self, group: Group) -> bool:
        """Whether tensors of one dimension or none are neither adapted nor decayed."""
        return False

    def needs_clipped(self, group: Group) -> bool:
        """Whether the trust ratio needs gradients that are already clipped, and so the global norm before it."""
        return self.two_stage


def hyper_value(x: Any) -> Any:
    """A hyper-parameter as a float; one that is a tensor on a GPU as it is, for the step must not wait for it."""
    return x if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)


def hyper_log(x: Any) -> Any:
    x = hyper_value(x)
    if isinstance(x, Tensor):
        return x.double().log()
    return math.log(x) if x > 0 else -math.inf


def hyper_floats(hyper: Any) -> Any:
    """Hyper-parameters with those that are tensors read."""
    return type(hyper)(*map(float, hyper))


def group_lr(group: Group, t: int) -> float:
    """A group's LR at update t."""
    if group["schedule"] is None:
        return float(group["lr"])
    return float(group["schedule"](t) * group.get("lr_scale", 1.0))
