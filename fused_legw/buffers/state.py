"""Shows the flat buffers in optimizer.state, as live views of each segment's part."""

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
    """Whether other code replaced, added or removed a segment's state. names: the states of the spec."""
    own = state.get(segment.param, {})
    for name, view in segment.state.items():  # a loop, because a generator is slower
        if own.get(name) is not (view if name in segment.shown else None):
            return True
    if len(own) > len(segment.shown):  # other code may have added state without a buffer: momentum_buffer at momentum=0
        return any(own.get(name) is not None and name not in segment.state for name in names)
    return False


class StateViews:
    """Keeps views of the buckets in the optimizer's state, and notices changes by other code."""

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: list[Group],
        state: State,
        buckets: Sequence[Bucket],
        steps: Mapping[Tensor, int],
    ) -> None:
        """Copy `state` into the buckets, and put views of them in its place.

        groups, state: the optimizer's param groups and state.
        steps: known update counts of parameters. They take precedence over the float32 counts in `state`.
        """
        self._spec, self._groups, self._state, self._buckets = spec, groups, state, buckets
        # The content of `state` when `changed` last compared it entry by entry:
        self._dicts = Same()  # its keys and dicts
        self._values = Same()  # the values of these dicts
        self._value_views = list[ValuesView[object]]()  # live views of the dicts' values
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
                    state[name] = view.copy_(torch.as_tensor(state[name], dtype=view.dtype))
                    segment.shown.add(name)
            if MASTER not in segment.state:
                state.pop(MASTER, None)
        bucket.set_steps(counted)

    def _counted(self, state: dict[str, Any]) -> int:
        """The update count of a state from elsewhere. SGD's state only shows whether there was any update."""
        if self._spec.counts_steps:
            return int(state.get(STEP, 0))
        return int(any(state.get(name) is not None for name in self._spec.states))

    def show(self, bucket: Bucket, segment: Segment, names: tuple[str, ...]) -> None:
        """Put the views that an update of this segment needs into the optimizer's state."""
        for name in names:
            if name not in segment.state:
                capture.refuse([bucket.device], f"{name} does not exist yet")
                bucket.add_state(name)
        for name in (*names, MASTER):
            if name in segment.state and name not in segment.shown:
                segment.shown.add(name)
                self._state[segment.param][name] = segment.state[name]

    def changed(self, state: State) -> bool:
        """Whether other code changed the optimizer's state. Compares entries only if some object was replaced."""
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
        """The update counts of all parameters whose `state` is still our views. Reads the device."""
        return {
            segment.param: count
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if not _entries_changed(segment, state, self._spec.states)
        }

    def fresh(self, *, include_requested: bool = True) -> set[Tensor]:
        """Parameters whose state was allocated but never updated. Reads the device.

        include_requested: False leaves out state that a step at LR 0 created on purpose.
        """
        return {
            segment.param
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if count == 0
            and self._spec.used_states(self._groups[segment.group])
            and (include_requested or not segment.requested)
        }
