"""State dicts: torch.optim's, with the schedule and the count of applied updates in every param group.

A state dict holds tensors and primitives only, its tensors have storages of their own (a view would drag its whole flat
buffer into the file), and loading keeps float32 state beside low-precision parameters, which torch would round.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import check_state
from .flat import MASTER
from .schedule import LEGW

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

StateDict = dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """A tensor that torch's load_state_dict is not to cast to its parameter's dtype."""

    tensor: Tensor


def own_storages(values: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state, its tensors copied out of the flat buffers."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def pack(optimizer: FusedOptimizer, state_dict: StateDict) -> StateDict:
    """torch's state dict of a fused optimizer, made fit to be stored. Runs before the user's hooks."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = dict(zip(ids, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    assert optimizer._layout is not None
    counts, steps_applied = optimizer._layout.counts(), optimizer.steps_applied
    state = {}
    for key, values in state_dict["state"].items():
        p = params.get(key)
        # A tensor that has not been updated has no state in torch's eyes; its buffer is all zeros.
        unused = optimizer._rule.states if p is not None and p.numel() and counts.get(p) == 0 else ()
        state[key] = own_storages({name: value for name, value in values.items() if name not in unused})
    groups = [
        {**group, "schedule": group["schedule"] and group["schedule"].to_dict(), "steps_applied": steps_applied}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": {key: values for key, values in state.items() if values}, "param_groups": groups}


def unpack(optimizer: FusedOptimizer, state_dict: StateDict) -> StateDict:
    """A state dict, ours or torch.optim's, made fit for torch's load_state_dict; raises before anything changes."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group, live in zip(groups, optimizer.param_groups, strict=False):
        if "schedule" not in group:  # torch.optim's: the optimizer keeps its own schedules
            group["schedule"] = live["schedule"]
        elif isinstance(group["schedule"], dict):
            group["schedule"] = LEGW.from_dict(group["schedule"])
        for name, default in optimizer.defaults.items():
            group.setdefault(name, live.get(name, default))
        optimizer._rule.check(group)
    _check_steps(optimizer, groups)
    shapes = {
        i: p.shape
        for group, live in zip(groups, optimizer.param_groups, strict=False)
        for i, p in zip(group["params"], live["params"], strict=False)
    }
    state = {}
    for key, values in state_dict["state"].items():
        state[key] = {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if key in shapes:
            check_state(f"state[{key}]", values, (*optimizer._rule.states, MASTER), shapes[key])
    return {**state_dict, "state": state, "param_groups": groups}


def _check_steps(optimizer: FusedOptimizer, groups: list[dict[str, Any]]) -> None:
    steps = {group.get("steps_applied") for group in groups}
    if len(steps) > 1:
        raise ValueError(f"steps_applied must be the same in every param group, got {sorted(map(str, steps))}")
    (given,) = steps
    if given is None:
        if any(group["schedule"] is not None for group in groups) and not optimizer._steps_given:
            raise ValueError(
                "the state dict has no 'steps_applied', so its place in the LEGW schedule is unknown: "
                "set optimizer.steps_applied to the number of updates made so far, then load it"
            )
    elif not isinstance(given, int) or given < 0:
        raise ValueError(f"steps_applied must be an integer, zero or more, got {given!r}")


def unbox(state: dict[Any, Any]) -> defaultdict[Any, dict[str, Any]]:
    """Optimizer state as `unpack` and torch left it, with its tensors."""
    return defaultdict(
        dict,
        {
            key: {name: value.tensor if isinstance(value, _Kept) else value for name, value in values.items()}
            for key, values in state.items()
        },
    )
