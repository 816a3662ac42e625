"""What differs between the fused optimizers: state, options, hyper-parameters. They share everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import checks
from .schedules.base import Schedule

Group = dict[str, Any]  # one of torch.optim's param_groups
Gradients = Sequence[Tensor | None]  # one per segment of a bucket, in the parameter's layout
PAIRS = ("betas", "trust_clamp", "weight_norm_clamp")  # options of two numbers, which may come as an array


class OptimizerSpec:
    """An optimizer's state and options, and its hyper-parameters in the form that kernels and ATen take."""

    name: str  # key of the kernels' update rule in `legw_kernels.rules.registry.RULES`
    states: tuple[str, ...]  # torch's names, in the order of that rule
    counts_steps = False  # optimizer.state holds each parameter's "step"
    adapts = False  # updates have a trust ratio
    two_stage = False  # the norm pass advances the states, so a global norm needs a pass before it
    carries = False  # the norms of the weights may be carried over from the last step
    projects = False  # updates are projected by rows, which must be contiguous in memory

    def __init__(self, aten: Callable[[Any, Any, float], None]) -> None:
        """aten: makes one update by ATen, given an `AtenBatch`, hyper-parameters as plain floats, and the LR."""
        self.aten = aten

    def check(self, group: Group) -> None:
        """Raise for options of the wrong type or out of range, except the LR. Reads no tensor on a GPU."""
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
        """Raise for options that torch.optim refuses in new groups only: its schedulers may write them later."""
        checks.check_scalar("lr", group["lr"], "learning rate")
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def complete(self, group: Group) -> None:
        """Fill in defaults that depend on other options, and convert values to one type."""

    def used_states(self, group: Group) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    def needed_states(self, group: Group) -> tuple[str, ...]:
        """The states without which a count of updates, or the other states, cannot be gone on with."""
        return self.used_states(group)

    def hyper(self, group: Group) -> Any:
        """The group's hyper-parameters as one of `formulas`' tuples. Tensors on a GPU stay tensors."""
        raise NotImplementedError

    def clip(self, group: Group) -> tuple[float, bool]:
        """(global norm to clip gradients at, whether by LAMB's formula instead of torch's). Infinite: no clipping."""
        limit = group["max_grad_norm"]
        return (math.inf if limit is None else float(limit)), False

    def clips(self, groups: Sequence[Group]) -> bool:
        """Whether any group clips."""
        return any(self.clip(group)[0] < math.inf for group in groups)

    def exempts_vectors(self, group: Group) -> bool:
        """Whether tensors of one dimension or none have neither a trust ratio nor weight decay."""
        return False

    def needs_clipped(self, group: Group) -> bool:
        """Whether norms or projections need clipped gradients, and so the global norm before them."""
        return self.two_stage


def python_numbers(group: Group) -> Group:
    """Bring NumPy's numbers in a group to Python's own, in place, with the same values. Returns the group."""
    for name, value in group.items():
        if name in PAIRS and isinstance(value, np.ndarray) and value.ndim > 0:
            value = tuple(value)
        group[name] = checks.plain(value)
    return group


def packed(value: Any) -> Any:
    """A value for a state dict: `checks.plain`, also inside of lists and dicts, which are copied."""
    if type(value) in (list, tuple):
        return type(value)(map(packed, value))
    if type(value) is dict:
        return {checks.plain(key): packed(x) for key, x in value.items()}
    return checks.plain(value)


def hyper_value(x: Any) -> Any:
    """A hyper-parameter as a float. A tensor on a GPU stays a tensor, because a step must not wait for it."""
    return x if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)


def hyper_log(x: Any) -> Any:
    x = hyper_value(x)
    if isinstance(x, Tensor):
        return x.double().log()
    return math.log(x) if x > 0 else -math.inf


def hyper_floats(hyper: Any) -> Any:
    """Hyper-parameters as floats. Reads those that are tensors."""
    return type(hyper)(*map(float, hyper))


def group_lr(group: Group, t: int) -> float:
    """A group's LR at update t."""
    if group["schedule"] is None:
        return float(group["lr"])
    return float(group["schedule"](t) * group.get("lr_scale", 1.0))
