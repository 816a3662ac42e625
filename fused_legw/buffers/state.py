"""What optimizer.state shows of the flat buffers: a live view of each segment's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, ValuesView
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import capture
from ..spec import Group, OptimizerSpec
from .bucket import MASTER, STEP, Bucket, Segment
from .same import Same

State = dict[Tensor, dict[str, Any]]  # torch.optim's


def _entries_changed(segment: Segment, state: State, names: tuple[str, ...]) -> bool:
    """Whether someone else replaced, added or removed entries of the optimizer's state. names: those of its spec."""
    own = state.get(segment.param, {})
    for name, view in segment.state.items():  # a generator would cost each step more
        if own.get(name) is not (view if name in segment.shown else None):
            return True
    if len(own) > len(segment.shown):  # given where this layout made no room: momentum while that is 0, say
        return any(own.get(name) is not None and name not in segment.state for name in names)
    return False


class StateViews:
    """The optimizer's state as views of its buckets, and whether someone else has changed it since."""

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: list[Group],
        state: State,
        buckets: Sequence[Bucket],
        steps: Mapping[Tensor, int],
    ) -> None:
        """Copy into the buckets what `state` holds, and let it hold the views.

        groups, state: the optimizer's own. steps: counted updates that are known better than `state` shows them.
        """
        self._spec, self._groups, self._state, self._buckets = spec, groups, state, buckets
        # What `state` held when it was last looked at: its keys and dicts; the dicts' values, and live views of them.
        self._dicts, self._values = Same(), Same()
        self._value_views = list[ValuesView[object]]()
        for bucket in buckets:
            self._take(bucket, steps)

    def _take(self, bucket: Bucket, steps: Mapping[Tensor, int]) -> None:
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            for name in self._spec.states:
                if state.get(name) is not None or name in self._spec.used_states(self._groups[segment.group]):
                    bucket.add_state(name)
        counted = []
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            counted.append(steps.get(segment.param, self._counted(state)))
            for name, view in segment.state.items():
                if state.get(name) is not None:
                    state[name] = view.copy_(torch.as_tensor(state[name]))
                    segment.shown.add(name)
            if MASTER not in segment.state:
                state.pop(MASTER, None)
        bucket.set_steps(counted)

    def _counted(self, state: dict[str, Any]) -> int:
        """The counted updates of a state from outside. SGD's tells only whether there were any."""
        if self._spec.counts_steps:
            return int(state.get(STEP, 0))
        return int(any(state.get(name) is not None for name in self._spec.states))

    def show(self, bucket: Bucket, segment: Segment, names: tuple[str, ...]) -> None:
        """Let the optimizer's state hold what an update of this segment needs."""
        for name in names:
            if name not in segment.state:
                capture.refuse([bucket.device], f"{name} does not exist yet")
                bucket.add_state(name)
        for name in (*names, MASTER):
            if name in segment.state and name not in segment.shown:
                segment.shown.add(name)
                self._state[segment.param][name] = segment.state[name]

    def changed(self, state: State) -> bool:
        """Whether someone else changed the optimizer's state. Entry by entry only where it holds other objects."""
        if state is not self._state:
            return True
        dicts = [*state, *state.values()]
        if self._dicts.holds(dicts) and self._values.holds([*chain.from_iterable(self._value_views)]):
            return False
        if any(_entries_changed(s, state, self._spec.states) for bucket in self._buckets for s in bucket.segments):
            return True
        self._dicts.keep(dicts)
        self._value_views = list(map(dict.values, state.values()))
        self._values.keep([*chain.from_iterable(self._value_views)])
        return False

    def steps(self, state: State) -> dict[Tensor, int]:
        """Counted updates by parameter, of those whose `state` is still our views. Reads the device."""
        return {
            segment.param: count
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if not _entries_changed(segment, state, self._spec.states)
        }

    def fresh(self, *, include_requested: bool = True) -> set[Tensor]:
        """Parameters whose state was allocated but never updated. Reads the device.

        include_requested: also those whose state a step at LR 0 created on purpose.
        """
        return {
            segment.param
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if count == 0
            and self._spec.used_states(self._groups[segment.group])
            and (include_requested or not segment.requested)
        }
