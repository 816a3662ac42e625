"""State dicts: torch.optim's, with the schedule and the count of applied updates in every param group.

A state dict holds tensors and primitives only. Its tensors have storages of their own: a view would drag its whole flat
buffer into the file. Loading keeps float32 state of low-precision parameters, which torch would round.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..buffers.bucket import STEP
from ..buffers.complete import check_complete, check_values, own_names
from ..buffers.layout import named_params
from ..checks import count, naming
from ..schedules.autowu import AutoWU
from ..schedules.base import Schedule
from ..schedules.legw import LEGW
from ..spec import Group, packed, python_numbers
from .foreign import translate
from .options import check_params, check_place, check_written_lr

StateDict = dict[Any, Any]
_LABEL = "the state dict's param_groups[{}]"


@dataclass(frozen=True)
class _Kept:
    """Hides a value from torch's load_state_dict, which would cast a tensor to its parameter's dtype."""

    value: Any


def _own_storages(optimizer: Any, state: dict[Any, Any], params: dict[Any, Tensor], fresh: set[Tensor]) -> StateDict:
    """The state with tensors of parameters copied out of the flat buffers, and "step" on the CPU, as in torch.

    Entries that are no parameter's stay as they are. Of a fresh parameter only entries of the user's own stay.

    params: the parameters, by their keys in `state`.
    """
    stored = dict[Any, Any]()
    for key, values in state.items():
        if key not in params or not isinstance(values, dict):
            stored[key] = values
            continue
        left_out = own_names(optimizer._spec) if params[key] in fresh else ()
        own = {name: x.detach().clone() if isinstance(x, Tensor) else packed(x) for name, x in values.items()}
        if isinstance(own.get(STEP), Tensor):
            own[STEP] = own[STEP].cpu()
        kept = {name: value for name, value in own.items() if name not in left_out}
        if kept or not left_out:
            stored[key] = kept
    return stored


def pack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """Turn torch's state dict of a fused optimizer into one to store. Runs before the user's hooks."""
    groups = [
        packed(python_numbers({**group, "schedule": group["schedule"] and group["schedule"].to_dict()}))
        for group in state_dict["param_groups"]
    ]
    # Leave out state that was allocated but never updated, because the first step was skipped on the device.
    fresh = optimizer._run.layout.views.fresh(include_requested=False) if optimizer._run.layout else set()
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    state = _own_storages(optimizer, state_dict["state"], params, fresh)
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(optimizer: Any, state_dict: StateDict) -> StateDict:
    """Turn a state dict, ours or another package's, into one for torch's load_state_dict. Raises before any change."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    sizes, live_sizes = ([len(group["params"]) for group in every] for every in (groups, optimizer.param_groups))
    if sizes != live_sizes:
        return state_dict  # torch refuses it
    made = dict[str, Schedule]()  # so that groups that shared a schedule share one again
    for i, (group, live) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        with naming(_LABEL.format(i)):
            translate(group, live, optimizer.defaults)
            for name, default in optimizer.defaults.items():
                group.setdefault(name, live.get(name, default))
            python_numbers(group)
            if group["schedule"] is None:  # from torch.optim, or a run without a schedule
                group["schedule"] = live["schedule"]
            elif not isinstance(group["schedule"], Schedule):
                values = group["schedule"]
                group["schedule"] = made.get(repr(values)) or made.setdefault(repr(values), _schedule(values))
            optimizer._spec.check(group)
        check_written_lr(_LABEL.format(i), group["lr"])
        optimizer._spec.complete(group)
    _check_steps(optimizer, groups)
    as_loaded = [{**live, "lr": group["lr"]} for group, live in zip(groups, optimizer.param_groups, strict=True)]
    check_params(optimizer._spec, as_loaded, {}, optimizer._run.options["backend"])
    return {**state_dict, "state": _unpacked_state(optimizer, groups, state_dict["state"]), "param_groups": groups}


def _unpacked_state(optimizer: Any, groups: list[Group], state: StateDict) -> StateDict:
    """The state with our own entries hidden from torch, which casts those under other names."""
    keys = [key for group in groups for key in group["params"]]
    places = dict(zip(keys, named_params(optimizer.param_groups), strict=True))
    own = frozenset(own_names(optimizer._spec))
    unpacked = dict[Any, Any]()
    for key, values in state.items():
        if key in places:
            name, p, i = places[key]
            label, spec = f"state[{key}]", optimizer._spec
            check_complete(f"{label}, the state of {name},", spec, groups[i], values, _LABEL.format(i))
            check_values(label, spec, values, p.shape)
            values = {entry: _Kept(value) if entry in own else value for entry, value in values.items()}
        unpacked[key] = values
    return unpacked


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
        if any(group["schedule"] is not None for group in groups) and not optimizer._run.steps_given:
            raise ValueError(
                "the state dict has no 'steps_applied', so its place in the schedule is unknown: "
                "set optimizer.steps_applied to the number of updates made so far, then load it"
            )
    else:
        count("steps_applied", given, zero=True)
    check_place(groups, optimizer.steps_applied if given is None else given)


def unbox(state: dict[Any, Any]) -> defaultdict[Any, dict[str, Any]]:
    """Undo `unpack`: put the tensors back into the state that torch has loaded."""
    unboxed = defaultdict[Any, dict[str, Any]](dict, state)
    for key, values in state.items():
        if isinstance(key, Tensor) and isinstance(values, dict):
            own = {name: x.value if isinstance(x, _Kept) else x for name, x in values.items()}
            # Copied now, because state in shared memory that is set by hand is refused.
            unboxed[key] = {name: x.clone() if _shared(x) else x for name, x in own.items()}
    return unboxed


def _shared(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.is_shared()


def pickled(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The attributes that copies and pickles of an optimizer keep. state: torch's."""
    fresh = optimizer._run.layout.views.fresh() if optimizer._run.layout else set()
    params = {p: p for group in optimizer.param_groups for p in group["params"]}
    return {
        **state,
        "state": _own_storages(optimizer, optimizer.state, params, fresh),
        "_made": dict(options=optimizer._run.options, skip_nonfinite=optimizer.skip_nonfinite),
        "_steps_applied": optimizer.steps_applied,
    }


def steps_applied_of(state: dict[str, Any]) -> int | None:
    """Take steps_applied out of copied, unpickled or loaded state; None if it has none."""
    given = [group.get("steps_applied") for group in state["param_groups"]]
    steps_applied: int | None = state.pop("_steps_applied", given[0] if given else None)
    return steps_applied
