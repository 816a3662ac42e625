"""Shows the flat buffers in optimizer.state, as live views of each segment's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, ValuesView
from itertools import chain
from typing import Any

from torch import Tensor

from .. import capture
from ..checks import step_count
from ..spec import Group, OptimizerSpec
from .bucket import MASTER, STEP, Bucket, Segment
from .complete import counts_in_group, missing
from .same import Same

State = dict[Tensor, dict[str, Any]]  # torch.optim's


def _misfits(master: Any, p: Tensor) -> bool:
    return master is not None and getattr(master, "shape", None) != p.shape


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
        self.shapes = {segment.param: segment.param.shape for bucket in buckets for segment in bucket.segments}
        # The content of `state` when `changed` last compared it entry by entry:
        self._dicts = Same()  # its keys and dicts
        self._values = Same()  # the values of these dicts
        self._value_views = list[ValuesView[object]]()  # live views of the dicts' values
        self._shown = list[Tensor]()  # the views that `state` holds
        self._places = list[int]()  # their addresses
        for group in groups:
            self._take_group_step(group)
        for bucket in buckets:
            self._take(bucket, steps)

    def _take_group_step(self, group: Group) -> None:
        """Give each state that has all moments and no `step` the one of its group, and remove that."""
        without = [
            self._state[p] for p in group["params"] if counts_in_group(self._spec, group, self._state.get(p, {}))
        ]
        for state in without:
            state[STEP] = group[STEP]
        if without:
            del group[STEP]

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
            if MASTER not in segment.state or _misfits(state.get(MASTER), segment.param):
                state.pop(MASTER, None)  # one that its weight has outgrown: it is made anew from the weight
            for name, view in segment.state.items():
                if state.get(name) is not None:
                    state[name] = view if name == STEP else view.copy_(state[name])
                    self._note(segment, name)
        bucket.set_steps(counted)

    def _note(self, segment: Segment, name: str) -> None:
        segment.shown.add(name)
        self._shown.append(segment.state[name])
        self._places.append(segment.state[name].data_ptr())

    def _counted(self, state: dict[str, Any]) -> int:
        """The update count of a state from elsewhere. SGD's state only shows whether there was any update."""
        if self._spec.counts_steps:
            return int(step_count(state.get(STEP)) or 0)
        return int(any(state.get(name) is not None for name in self._spec.states))

    def show(self, bucket: Bucket, segment: Segment, names: tuple[str, ...]) -> None:
        """Put the views that an update of this segment needs into the optimizer's state."""
        for name in names:
            if name not in segment.state:
                capture.refuse([bucket.device], f"{name} does not exist yet")
                bucket.add_state(name)
        for name in (*names, MASTER):
            if name in segment.state and name not in segment.shown:
                self._note(segment, name)
                self._state[segment.param][name] = segment.state[name]

    def changed(self, state: State) -> bool:
        """Whether other code changed the optimizer's state. Compares entries only if some object was replaced."""
        # Addresses, because other code may give a view other memory: `view.data = ...`, `view.share_memory_()`.
        if state is not self._state or list(map(Tensor.data_ptr, self._shown)) != self._places:
            return True
        dicts = [*state, *state.values()]
        if self._dicts.holds(dicts) and self._values.holds([*chain.from_iterable(self._value_views)]):
            return False
        for segment in chain.from_iterable(bucket.segments for bucket in self._buckets):
            if self._entries_changed(segment, state) or self._respelled(segment, state):
                return True
        self._dicts.keep(dicts)
        # Under other keys than parameters there may be anything, and it is the user's own.
        self._value_views = [
            dict.values(own) for p, own in state.items() if isinstance(p, Tensor) and isinstance(own, dict)
        ]
        self._values.keep([*chain.from_iterable(self._value_views)])
        return False

    def _entries_changed(self, segment: Segment, state: State) -> bool:
        """Whether other code replaced, added or removed a segment's state."""
        own = state.get(segment.param, {})
        if not isinstance(own, dict):
            return True
        for name, view in segment.state.items():  # a loop, because a generator is slower
            if own.get(name) is not (view if name in segment.shown else None):
                return True
        if len(own) > len(segment.shown):  # other code may have added state that has no buffer: momentum at momentum=0
            return any(own.get(name) is not None and name not in segment.state for name in self._spec.states)
        return False

    def _respelled(self, segment: Segment, state: State) -> bool:
        """Whether other code added state under names that are refused."""
        own = state.get(segment.param, {})
        return len(own) > len(segment.shown) and bool(missing(self._spec, self._groups[segment.group], own))

    def steps(self, state: State) -> dict[Tensor, int]:
        """The update counts of all parameters whose `state` is still our views. Reads the device."""
        moved = {id(x) for x, place in zip(self._shown, self._places, strict=True) if x.data_ptr() != place}
        return {
            segment.param: count
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if not self._entries_changed(segment, state) and moved.isdisjoint(map(id, segment.state.values()))
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
