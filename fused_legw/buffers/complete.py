"""Whether a parameter's state that others made, by hand or in a file, can be gone on with.

A count of updates is trusted only with all the states that it counts for. State of none of our names is a fresh start,
unless it has names that other packages give to momentum and moments: then their values would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import check_state, check_step
from ..spec import Group, OptimizerSpec
from .bucket import MASTER, STEP

# How torch.optim and other packages name momentum and moments. Other names are the user's own.
_TORCH = "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"
_BITSANDBYTES = "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "m1_m2"
_PAPERS = "mu", "nu", "m", "v", "m_t", "v_t", "moment1", "moment2", "first_moment", "second_moment"
_FACTORED = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_r", "exp_avg_sq_c"
_VARIED = "exp_avg_var", "max_exp_avg_var", "exp_avg_diff", "exp_avg_slow", "exp_avg2", "exp_avg_lr_1", "exp_avg_lr_2"
_MOMENTUM = "momentum", "velocity", "mom", "momentum_buf", "m_avg", "v_avg"
_SPELLINGS = frozenset({*_TORCH, *_BITSANDBYTES, *_PAPERS, *_FACTORED, *_VARIED, *_MOMENTUM})


def _counted(spec: OptimizerSpec) -> tuple[str, ...]:
    return (STEP,) if spec.counts_steps else ()


def own_names(spec: OptimizerSpec) -> tuple[str, ...]:
    """The names in a parameter's state that are not the user's."""
    return (*spec.states, *_counted(spec), MASTER)


def counts_in_group(spec: OptimizerSpec, group: Group, values: Mapping[str, Any]) -> bool:
    """Whether this state has all moments and no `step`, and its group has one, as apex, timm and others keep it."""
    return (
        spec.counts_steps
        and values.get(STEP) is None
        and group.get(STEP) is not None
        and all(values.get(name) is not None for name in spec.needed_states(group))
    )


def missing(spec: OptimizerSpec, group: Group, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that an update needs and this state lacks. None if it has all of them, or begins afresh."""
    absent = tuple(name for name in (*spec.needed_states(group), *_counted(spec)) if values.get(name) is None)
    if not absent or counts_in_group(spec, group, values):
        return ()
    found = {name for name, value in values.items() if value is not None}
    own = {*spec.states, *_counted(spec)}
    begun = spec.counts_steps and not own.isdisjoint(found)
    return absent if begun or (found - own) & _SPELLINGS else ()


def check_complete(label: str, spec: OptimizerSpec, group: Group, values: object, group_label: str) -> None:
    """Refuse a count without all the states that it counts for, states without a count, and other spellings of them.

    label, group_label: the parameter's state and its group, in words.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{label} must be a dict, got {values!r}")
    if absent := missing(spec, group, values):
        wanted = ", ".join(map(repr, (*spec.needed_states(group), *_counted(spec))))
        found = ", ".join(repr(name) for name, value in values.items() if value is not None and name != MASTER)
        raise ValueError(
            f"{label} lacks {', '.join(map(repr, absent))}: looked for {wanted}, found {found}; rename or complete "
            "its entries, or clear it to begin afresh"
        )
    if counts_in_group(spec, group, values):
        check_step(group_label, group[STEP])


def check_unshared(label: str, spec: OptimizerSpec, values: Mapping[str, Any]) -> None:
    """Refuse CPU state in memory that other processes share: buffers hold a copy, which they would not see.

    On a GPU every tensor says that it is shared.
    """
    for name in own_names(spec):
        value = values.get(name)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_shared():
            raise ValueError(
                f"{label}[{name!r}] is in shared memory: the optimizer keeps its state in buffers of its own, so other "
                "processes would not see its updates; put a clone there"
            )


def check_values(
    label: str, spec: OptimizerSpec, values: Mapping[str, Any], shape: torch.Size, *, master: bool = True
) -> None:
    """Refuse state of another shape than its parameter's, and a `step` that is no number of updates.

    master: False: a master of another shape passes.
    """
    outgrown = not master and getattr(values.get(MASTER), "shape", None) != shape
    check_state(label, values, (*spec.states, *([] if outgrown else [MASTER])), shape)
    if spec.counts_steps and values.get(STEP) is not None:
        check_step(label, values[STEP])
