"""The buckets of one optimizer. They are built from its parameters and state, and rebuilt when anything moved."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..checks import is_unmade
from ..spec import Group, OptimizerSpec
from . import memory
from .bucket import MASTER, Bucket, compute_dtype
from .gradients import GradientReader
from .same import Same
from .state import State, StateViews

_REQUIRES_GRAD, _GRADIENT = operator.attrgetter("requires_grad"), operator.attrgetter("grad")


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
        let_be: Sequence[Tensor],
        made: int,
        on_host: Collection[torch.device],
        flatten: bool,
        master_weights: bool,
        tile: int,
        previous: Layout | None,
    ) -> None:
        """Build the buckets.

        groups, state: the optimizer's param groups and state.
        let_be: parameters without a segment, because they can get no gradient as they are.
        made: when the optimizer was made, by `memory.now`.
        on_host: the devices whose tables and counts the host keeps, because ATen runs their steps.
        previous: the layout that this one replaces.
        """
        self._groups = groups
        self._note_groups()
        self._unmade = [p for p in let_be if is_unmade(p)]
        self._idle = [p for p in let_be if not is_unmade(p)]
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        passed_over = set(map(id, let_be))
        for _, p, group in named_params(groups):
            if id(p) in passed_over:
                continue
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        steps: dict[Tensor, int] = previous.views.steps(state) if previous else {}
        self.buckets: list[Bucket] = []
        for (device, dtype), params in keyed.items():
            bucket = Bucket(params, tile, torch.device("cpu") if device in on_host else device)
            stays = [not flatten or memory.taken_out_since(p, made) or not memory.may_move(p) for p in bucket.params]
            bucket.adopt([p for p, stay in zip(bucket.params, stays, strict=True) if not stay])
            if bucket.weights is None and previous:
                bucket.share_weights(previous.buckets)
            if master_weights and compute_dtype(dtype) != dtype:
                bucket.add_state(MASTER)
            if spec.counts_steps:
                bucket.show_steps()
            self.buckets.append(bucket)
        self.views: StateViews = StateViews(spec, groups, state, self.buckets, steps)
        self.gradients = GradientReader(spec, groups, self.buckets, self.views)

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
        if self._unmade and not all(map(is_unmade, self._unmade)):
            return True
        if self._idle and (
            any(map(_REQUIRES_GRAD, self._idle)) or any(map(operator.is_not, map(_GRADIENT, self._idle), repeat(None)))
        ):
            return True
        return thorough and any(segment.moved for bucket in self.buckets for segment in bucket.segments)

    def follow(self) -> None:
        """Accept the groups' new schedules without a rebuild, because they fit the tables."""
        self._note_groups()

    def unflatten(self) -> None:
        """Give every parameter that lives in a buffer, of this optimizer or another, an ordinary storage."""
        for bucket in self.buckets:
            memory.unflatten(bucket.params)
            bucket.weights = None
            bucket.note_places()
