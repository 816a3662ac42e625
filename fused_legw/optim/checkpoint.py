"""State dicts: torch.optim's, with the schedule and the count of applied updates in every param group.

A state dict holds tensors and primitives only. Its tensors have storages of their own: a view would drag its whole flat
buffer into the file. Loading keeps float32 state of low-precision parameters, which torch would round.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..buffers.bucket import MASTER, STEP
from ..checks import check_state, check_step, count, naming
from ..schedules.autowu import AutoWU
from ..schedules.base import Schedule
from ..schedules.legw import LEGW
from ..spec import packed, python_numbers
from .options import check_params, check_place, check_written_lr

StateDict = dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """Hides a tensor from torch's load_state_dict, which would cast it to its parameter's dtype."""

    tensor: Tensor


def own_storages(values: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state with its tensors copied out of the flat buffers, and "step" on the CPU, as in torch."""
    own = {
        name: value.detach().clone() if isinstance(value, Tensor) else packed(value) for name, value in values.items()
    }
    if isinstance(own.get(STEP), Tensor):
        own[STEP] = own[STEP].cpu()
    return own


def pack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """Turn torch's state dict of a fused optimizer into one to store. Runs before the user's hooks."""
    groups = [
        packed(python_numbers({**group, "schedule": group["schedule"] and group["schedule"].to_dict()}))
        for group in state_dict["param_groups"]
    ]
    # Leave out state that was allocated but never updated, because the first step was skipped on the device.
    fresh = optimizer._layout.views.fresh(include_requested=False) if optimizer._layout else set()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        key: own_storages(values)
        for key, values in state_dict["state"].items()
        if not isinstance(key, int) or params[key] not in fresh
    }
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """Turn a state dict, ours or torch.optim's, into one for torch's load_state_dict. Raises before any change."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    made = dict[str, Schedule]()  # so that groups that shared a schedule share one again
    for i, (group, live) in enumerate(zip(groups, optimizer.param_groups, strict=False)):
        label = f"the state dict's param_groups[{i}]"
        for name, default in optimizer.defaults.items():
            group.setdefault(name, live.get(name, default))
        python_numbers(group)
        with naming(label):
            if group["schedule"] is None:  # from torch.optim, or a run without a schedule
                group["schedule"] = live["schedule"]
            elif not isinstance(group["schedule"], Schedule):
                values = group["schedule"]
                group["schedule"] = made.get(repr(values)) or made.setdefault(repr(values), _schedule(values))
            optimizer._spec.check(group)
        check_written_lr(label, group["lr"])
        optimizer._spec.complete(group)
    _check_steps(optimizer, groups)
    as_loaded = [{**live, "lr": group["lr"]} for group, live in zip(groups, optimizer.param_groups, strict=False)]
    check_params(optimizer._spec, as_loaded, {}, optimizer._options["backend"])
    shapes = {
        i: p.shape
        for group, live in zip(groups, optimizer.param_groups, strict=False)
        for i, p in zip(group["params"], live["params"], strict=False)
    }
    state = {}
    for key, values in state_dict["state"].items():
        state[key] = {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if key in shapes:
            check_state(f"state[{key}]", values, (*optimizer._spec.states, MASTER), shapes[key])
            if optimizer._spec.counts_steps and STEP in values:
                check_step(f"state[{key}]", values[STEP])
    return {**state_dict, "state": state, "param_groups": groups}


def _schedule(values: Any) -> Schedule:
    """The inverse of `Schedule.to_dict`."""
    kind = AutoWU if isinstance(values, dict) and values.get("name") == "AutoWU" else LEGW
    return kind.from_dict(values)


def _check_steps(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    steps = [group.get("steps_applied") for group in groups]
    if any(other != steps[0] for other in steps):
        raise ValueError(f"steps_applied must be the same in every param group, got {steps}")
    given = steps[0] if steps else None
    if given is None:
        if any(group["schedule"] is not None for group in groups) and not optimizer._steps_given:
            raise ValueError(
                "the state dict has no 'steps_applied', so its place in the schedule is unknown: "
                "set optimizer.steps_applied to the number of updates made so far, then load it"
            )
    else:
        count("steps_applied", given, zero=True)
    known = groups[: len(optimizer.param_groups)]  # torch refuses more
    check_place(known, optimizer.steps_applied if given is None else given)


def unbox(state: dict[Any, Any]) -> defaultdict[Any, dict[str, Any]]:
    """Undo `unpack`: put the tensors back into the state that torch has loaded."""
    return defaultdict(
        dict,
        {
            key: {name: value.tensor if isinstance(value, _Kept) else value for name, value in values.items()}
            for key, values in state.items()
        },
    )


def pickled(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The attributes that copies and pickles of an optimizer keep. state: torch's."""
    fresh = optimizer._layout.views.fresh() if optimizer._layout else set()
    return {
        **state,
        "state": {p: own_storages(values) for p, values in optimizer.state.items() if p not in fresh},
        "_options": optimizer._options,
        "skip_nonfinite": optimizer.skip_nonfinite,
        "_steps_applied": optimizer.steps_applied,
    }


def steps_applied_of(state: dict[str, Any]) -> int | None:
    """Take steps_applied out of copied, unpickled or loaded state; None if it has none."""
    given = [group.get("steps_applied") for group in state["param_groups"]]
    steps_applied: int | None = state.pop("_steps_applied", given[0] if given else None)
    return steps_applied
