"""State dicts: torch.optim's, with the schedule and the count of applied updates in every param group.

A state dict holds tensors and primitives only, its tensors have storages of their own (a view would drag its whole flat
buffer into the file), and loading keeps float32 state beside low-precision parameters, which torch would round.
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
from .options import check_params, check_place, check_written_lr

StateDict = dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """A tensor that torch's load_state_dict is not to cast to its parameter's dtype."""

    tensor: Tensor


def own_storages(values: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state, its tensors copied out of the flat buffers; "step" on the CPU, where torch keeps it."""
    own = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    if isinstance(own.get(STEP), Tensor):
        own[STEP] = own[STEP].cpu()
    return own


def pack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """torch's state dict of a fused optimizer, made fit to be stored. Runs before the user's hooks."""
    groups = [
        {**group, "schedule": group["schedule"] and group["schedule"].to_dict()} for group in state_dict["param_groups"]
    ]
    # State of a tensor that no step has updated yet, because its first was skipped on the device, is none.
    fresh = optimizer._layout.views.fresh(include_requested=False) if optimizer._layout else set()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        key: own_storages(values)
        for key, values in state_dict["state"].items()
        if not isinstance(key, int) or params[key] not in fresh
    }
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """A state dict, ours or torch.optim's, made fit for torch's load_state_dict; raises before anything changes."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    made = dict[str, Schedule]()  # groups that shared a schedule go on sharing one
    for i, (group, live) in enumerate(zip(groups, optimizer.param_groups, strict=False)):
        label = f"the state dict's param_groups[{i}]"
        for name, default in optimizer.defaults.items():
            group.setdefault(name, live.get(name, default))
        with naming(label):
            if group["schedule"] is None:  # torch.optim's, or of a run without: the optimizer keeps its own
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
    """What `to_dict` gave."""
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
                "the state dict has no 'steps_applied', so its place in the LEGW schedule is unknown: "
                "set optimizer.steps_applied to the number of updates made so far, then load it"
            )
    else:
        count("steps_applied", given, zero=True)
    known = groups[: len(optimizer.param_groups)]  # more are for torch to refuse
    check_place(known, optimizer.steps_applied if given is None else given)


def unbox(state: dict[Any, Any]) -> defaultdict[Any, dict[str, Any]]:
    """Optimizer state as `unpack` and torch left it, with its tensors."""
    return defaultdict(
        dict,
        {
            key: {name: value.tensor if isinstance(value, _Kept) else value for name, value in values.items()}
            for key, values in state.items()
        },
    )


def pickled(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What copying and pickling keep of an optimizer. state: what torch's does."""
    fresh = optimizer._layout.views.fresh() if optimizer._layout else set()
    return {
        **state,
        "state": {p: own_storages(values) for p, values in optimizer.state.items() if p not in fresh},
        "_options": optimizer._options,
        "skip_nonfinite": optimizer.skip_nonfinite,
        "_steps_applied": optimizer.steps_applied,
    }


def steps_applied_of(state: dict[str, Any]) -> int | None:
    """The place in the schedule that copied, unpickled or loaded state comes with, taken out of it."""
    given = [group.get("steps_applied") for group in state["param_groups"]]
    place: int | None = state.pop("_steps_applied", given[0] if given else None)
    return place
