"""The buckets of one optimizer. They are built from its parameters and state, and rebuilt when anything moved."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..spec import Group, OptimizerSpec
from .bucket import MASTER, Bucket, compute_dtype
from .gradients import GradientReader
from .same import Same
from .state import State, StateViews


def named_params(groups: list[Group]) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, index of its group) of all parameters."""
    named = []
    for i, group in enumerate(groups):
        names = group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]
        named += [(name, p, i) for name, p in zip(names, group["params"], strict=True)]
    return named


class Layout:
    """An optimizer's buckets, the views of them in its state, and the reader of its gradients."""

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: list[Group],
        state: State,
        *,
        on_host: Collection[torch.device],
        flatten: bool,
        master_weights: bool,
        tile: int,
        previous: Layout | None,
    ) -> None:
        """Build the buckets.

        groups, state: the optimizer's param groups and state.
        on_host: the devices whose tables and counts the host keeps, because ATen runs their steps.
        previous: the layout that this one replaces.
        """
        self._groups = groups
        self._note_groups()
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for _, p, group in named_params(groups):
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        steps: dict[Tensor, int] = previous.views.steps(state) if previous else {}
        self.buckets: list[Bucket] = []
        for (device, dtype), params in keyed.items():
            bucket = Bucket(params, tile, torch.device("cpu") if device in on_host else device)
            bucket.adopt(flatten=flatten)
            if master_weights and compute_dtype(dtype) != dtype:
                bucket.add_state(MASTER)
            if spec.counts_steps:
                bucket.show_steps()
            self.buckets.append(bucket)
        self.views: StateViews = StateViews(spec, groups, state, self.buckets, steps)
        self.gradients = GradientReader(spec, groups, self.buckets, self.views)
        # The weight buffers, of this and earlier layouts, in which a parameter still lives.
        made = [bucket.weights for bucket in self.buckets if bucket.weights is not None]
        made += previous._weights if previous else []
        in_use = {p.untyped_storage().data_ptr() for _, p, _ in named_params(groups)}
        self._weights: list[Tensor] = [weights for weights in made if weights.data_ptr() in in_use]

    @property
    def devices(self) -> set[torch.device]:
        return {bucket.device for bucket in self.buckets}

    def _note_groups(self) -> None:
        self._built_for = [(group["schedule"], Same(list(group["params"]))) for group in self._groups]

    def stale(self, groups: list[Group], state: State, *, thorough: bool = False) -> bool:
        """Whether groups, schedules, parameters or state were replaced or moved. Every step calls this.

        thorough: compare dtypes, shapes and strides of parameters too, not only their addresses.
        """
        if groups is not self._groups or len(groups) != len(self._built_for):
            return True
        for group, (schedule, params) in zip(groups, self._built_for, strict=True):
            if group["schedule"] is not schedule or not params.holds(group["params"]):
                return True
        if any(bucket.moved for bucket in self.buckets) or self.views.changed(state):
            return True
        return thorough and any(segment.moved for bucket in self.buckets for segment in bucket.segments)

    def follow(self) -> None:
        """Accept the groups' new schedules without a rebuild, because they fit the tables."""
        self._note_groups()

    def unflatten(self) -> None:
        """Give every parameter in a weight buffer, of this or an earlier layout, a storage of its own."""
        made = {weights.data_ptr() for weights in self._weights}
        for bucket in self.buckets:
            for p in bucket.params:
                if p.untyped_storage().data_ptr() in made:
                    p.data = p.data.clone(memory_format=torch.preserve_format)
            bucket.note_places()
        self._weights = []
