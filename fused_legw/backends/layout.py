"""All the flat buffers of one optimizer: built from its parameters and state, and rebuilt whole when anything moved."""

from __future__ import annotations

import operator
from collections.abc import Mapping, ValuesView
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import capture
from ..buffers.bucket import MASTER, STEP, Bucket, Segment, compute_dtype
from ..buffers.gradients import Look, in_layout_of
from ..spec import Group, Rule
from .aten import AtenBackend
from .base import Control
from .select import explain_backend
from .triton import TritonBackend

State = dict[Tensor, dict[str, Any]]  # torch.optim's


def named_params(groups: list[Group]) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, group) of all parameters."""
    named = []
    for i, group in enumerate(groups):
        names = group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]
        named += [(name, p, i) for name, p in zip(names, group["params"], strict=True)]
    return named


def _entries_changed(segment: Segment, state: State, names: tuple[str, ...]) -> bool:
    """Whether someone else replaced, added or removed entries of the optimizer's state. names: those of its rule."""
    own = state.get(segment.param, {})
    for name, view in segment.state.items():  # a generator would cost each step more
        if own.get(name) is not (view if name in segment.shown else None):
            return True
    if len(own) > len(segment.shown):  # given where this layout made no room: momentum while that is 0, say
        return any(own.get(name) is not None and name not in segment.state for name in names)
    return False


class Layout:
    """Buckets of an optimizer's parameters, the backend of each device, and the groups they were built for."""

    def __init__(
        self,
        rule: Rule,
        groups: list[Group],
        state: State,
        *,
        backend: str | None,
        flatten: bool,
        master_weights: bool,
        carry_norms: bool,
        tile: int,
        steps_applied: int,
        previous: Layout | None,
    ) -> None:
        """rule, groups, state: the optimizer's. previous: the layout this one replaces."""
        self._rule, self._groups, self._state = rule, groups, state
        # What `state` held when it was last looked at: keys and dicts; live views of the dicts' values, and these.
        self._held: tuple[list[object], list[ValuesView[object]], list[object]] = ([], [], [])
        self._used = list[tuple[str, ...]]()  # the state that each group used in the last step
        # Of the last step's gradients, by bucket, if all were used as they came. The same list as long as they look
        # alike, else another: whoever keeps what was made of gradients keeps their list beside it.
        self._looks = list[Look]()
        self.moving = list[Tensor]()  # the parameters that have those gradients
        self._built_for = [(group["schedule"], list(group["params"])) for group in groups]
        self.buckets: list[Bucket] = []
        self.devices: list[TritonBackend | AtenBackend] = []
        counts = previous.counts(state) if previous else {}
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for _, p, group in named_params(groups):
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        chosen = {device: explain_backend(device, backend)[0] for device, _ in keyed}
        for (device, dtype), params in keyed.items():
            bucket = Bucket(params, tile, device if chosen[device] == "triton" else torch.device("cpu"))
            bucket.adopt(flatten=flatten)
            if master_weights and compute_dtype(dtype) != dtype:
                bucket.add_state(MASTER)
            if rule.counts_steps:
                bucket.show_steps()
            self._take_state(bucket, counts)
            self.buckets.append(bucket)
        skipped = {device.device: int(device.step_counts[1]) for device in previous.devices} if previous else {}
        for device, name in chosen.items():
            own = [bucket for bucket in self.buckets if bucket.device == device]
            self.devices.append(BACKENDS[name](rule, own, groups, steps_applied, carry_norms=carry_norms))
            self.devices[-1].step_counts[1] = skipped.get(device, 0)
        self._carries = carry_norms and not self.counts_on_host
        self._versions = list[int]()  # of the parameters after the last step, where norms are carried over from it
        made = [bucket.weights for bucket in self.buckets if bucket.weights is not None]
        in_use = {p.untyped_storage().data_ptr() for _, p, _ in named_params(groups)}
        made += previous._weights if previous else []
        self._weights: list[Tensor] = [weights for weights in made if weights.data_ptr() in in_use]
        self._replayed: list[set[object]] = []  # what each captured step has; see _needs
        # A captured graph goes on addressing the layout it was captured with.
        self._kept: list[Layout] = []
        if previous is not None:
            self._kept = [*previous._kept, *([previous] if previous.captured else [])]

    def _take_state(self, bucket: Bucket, counts: Mapping[Tensor, int]) -> None:
        """Copy what the optimizer's state holds into the bucket, and let it hold the views."""
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            for name in self._rule.states:
                if state.get(name) is not None or name in self._rule.used_states(self._groups[segment.group]):
                    bucket.add_state(name)
        steps = []
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            steps.append(counts.get(segment.param, self._count_of(state)))
            for name, view in segment.state.items():
                if state.get(name) is not None:
                    state[name] = view.copy_(torch.as_tensor(state[name]))
                    segment.shown.add(name)
            if MASTER not in segment.state:
                state.pop(MASTER, None)
        bucket.set_steps(steps)

    def _count_of(self, state: dict[str, Any]) -> int:
        """The counted updates of a state from outside; of SGD's all there is to know is whether there were any."""
        if self._rule.counts_steps:
            return int(state.get(STEP, 0))
        return int(any(state.get(name) is not None for name in self._rule.states))

    def counts(self, state: State) -> dict[Tensor, int]:
        """Counted updates by parameter, of those whose `state` is still our views. Reads the device."""
        return {
            segment.param: count
            for bucket in self.buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if not _entries_changed(segment, state, self._rule.states)
        }

    def fresh(self, *, asked: bool = True) -> set[Tensor]:
        """Parameters with state that no step has updated yet; without those whose state was asked for, if not asked."""
        return {
            segment.param
            for bucket in self.buckets
            for segment, count in zip(bucket.segments, bucket.exact_steps(), strict=True)
            if count == 0 and self._rule.used_states(self._groups[segment.group]) and (asked or not segment.asked)
        }

    def stale(self, groups: list[Group], state: State, *, thorough: bool = False) -> bool:
        """Whether anything is not what or where it was. Every step asks. thorough: look at more than addresses."""
        if groups is not self._groups or state is not self._state or len(groups) != len(self._built_for):
            return True
        for group, (schedule, params) in zip(groups, self._built_for, strict=True):
            if group["schedule"] is not schedule or len(group["params"]) != len(params):
                return True
            if any(map(operator.is_not, group["params"], params)):
                return True
        if any(bucket.moved for bucket in self.buckets) or self._state_changed(state):
            return True
        return thorough and any(segment.moved for bucket in self.buckets for segment in bucket.segments)

    def follow(self) -> None:
        """Take the groups' schedules as they are now for those this was built for: they fit its tables."""
        self._built_for = [
            (group["schedule"], params) for group, (_, params) in zip(self._groups, self._built_for, strict=True)
        ]

    def _state_changed(self, state: State) -> bool:
        """Whether someone else changed the optimizer's state; entry by entry only where it holds other objects."""
        held, views, values = self._held
        if 2 * len(state) == len(held) and all(map(operator.is_, chain(state, state.values()), held)):
            now = list(chain.from_iterable(views))
            if len(now) == len(values) and all(map(operator.is_, now, values)):
                return False
        if any(_entries_changed(s, state, self._rule.states) for bucket in self.buckets for s in bucket.segments):
            return True
        views = list(map(dict.values, state.values()))
        self._held = [*state, *state.values()], views, list(chain.from_iterable(views))
        return False

    def see_versions(self) -> None:
        """If parameters have changed since the last step, their norms that it left are of no use."""
        if self._carries and self._versions != self._versions_now():
            # A graph would forget the norms at every replay, and an eager step before the first would not.
            self.refuse_under_capture("weights changed since the last step")
            for device in self.devices:
                device.weights_changed()

    def note_versions(self) -> None:
        if self._carries:
            self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [p._version for bucket in self.buckets for p in bucket.params]

    def raw_gradients(self) -> list[list[Tensor | None]]:
        """What `grad` each parameter has, by bucket."""
        return [[p.grad for p in bucket.params] for bucket in self.buckets]

    def alike(self, raw: list[list[Tensor | None]]) -> bool:
        """Whether gradients look like the last step's, all of which were used as they came."""
        return bool(self._looks) and all(map(Look.fits, self._looks, raw))

    def gradients(
        self, raw: list[list[Tensor | None]], frozen: set[int], *, usual: bool, alike: bool
    ) -> list[list[Tensor | None]]:
        """The gradient of each segment that is to move, in its parameter's layout, by bucket; its state is shown.

        usual: whether `raw` are all in that layout. alike: whether they look like the last step's. frozen: groups whose
        state is made, but which do not move.
        """
        step = (STEP,) if self._rule.counts_steps else ()
        used = [(*self._rule.used_states(group), *step) for group in self._groups]
        if used != self._used:
            self._used = used
            for bucket in self.buckets:
                bucket.waiting.update(range(len(bucket.segments)))
        for bucket, gradients in zip(self.buckets, raw, strict=True):
            for i in [i for i in bucket.waiting if gradients[i] is not None]:
                self._show(bucket, bucket.segments[i], used[bucket.segments[i].group])
                bucket.waiting.remove(i)
        if alike:
            return raw
        found = raw
        if not usual or frozen:
            found = [
                self._of_moving(bucket, gradients, frozen) for bucket, gradients in zip(self.buckets, raw, strict=True)
            ]
        every = zip(chain(*(bucket.params for bucket in self.buckets)), chain(*found), strict=True)
        moving = [p for p, g in every if g is not None]
        self._looks, self.moving = list(map(Look, raw)) if found is raw else [], moving
        return found

    def _of_moving(self, bucket: Bucket, raw: list[Tensor | None], frozen: set[int]) -> list[Tensor | None]:
        gradients = list[Tensor | None]()
        for segment, g in zip(bucket.segments, raw, strict=True):
            segment.asked |= g is not None and segment.group in frozen
            moves = g is not None and segment.group not in frozen
            gradients.append(in_layout_of(segment.param, g) if moves and g is not None else None)
        return gradients

    def _show(self, bucket: Bucket, segment: Segment, names: tuple[str, ...]) -> None:
        """Let the optimizer's state hold what an update of this segment needs."""
        for name in names:
            if name not in segment.state:
                self.refuse_under_capture(f"{name} does not exist yet")
                bucket.add_state(name)
        for name in (*names, MASTER):
            if name in segment.state and name not in segment.shown:
                segment.shown.add(name)
                self._state[segment.param][name] = segment.state[name]

    def step(
        self,
        groups: list[Group],
        gradients: list[list[Tensor | None]],
        control: Control,
        *,
        advance: bool,
    ) -> None:
        """One step on every device. gradients: by bucket and segment. advance: whether it counts as applied."""
        for device in self.devices:
            own = [g for bucket, g in zip(self.buckets, gradients, strict=True) if bucket in device.buckets]
            device.begin(groups, own, control, len(self.devices) - 1, self._looks)
        if self.capturing:
            self._replayed.append(self._needs(groups))
        clipped_first = control.clips and any(map(self._rule.measures_clipped, groups))
        apart = clipped_first or (control.global_norm and self._rule.two_stage)
        if apart or (control.global_norm and not self._rule.adapts):
            self._measure(control, updates=False, gradients=True, clips=False)
        if self._rule.adapts:
            self._measure(control, updates=True, gradients=not apart, clips=apart)
        for device in self.devices:
            device.update(groups, control, clipped=apart, advance=advance)
        # Autograd must see the change, which ATen's fused kernels do not tell: it refuses a backward pass through what
        # was saved before.
        torch.autograd.graph.increment_version(self.moving)

    def _needs(self, groups: list[Group]) -> set[object]:
        """What the groups' options need beyond values in the group table: kernels and states."""
        needs: set[object] = {(i, name) for i, group in enumerate(groups) for name in self._rule.used_states(group)}
        if self._rule.clips(groups):
            needs.add("clipping")
            if any(map(self._rule.measures_clipped, groups)):
                needs.add("norms of clipped gradients")
        return needs

    def check_replays(self, groups: list[Group]) -> None:
        """Refuse options that a captured step cannot follow."""
        needs = self._needs(groups)
        if not all(needs <= had for had in self._replayed):
            raise RuntimeError(
                "an option changed what a step consists of (clipping or state): make a step, then capture it again"
            )

    def _measure(self, control: Control, *, updates: bool, gradients: bool, clips: bool) -> None:
        for device in self.devices:
            device.measure(control, updates=updates, gradients=gradients, clips=clips)
        if gradients and control.global_norm and len(self.devices) > 1:
            norms = [device.global_norm() for device in self.devices]
            for i, device in enumerate(self.devices):
                device.take_norms(norms[:i] + norms[i + 1 :])

    def norms(self, kind: str) -> dict[Tensor, Tensor] | None:
        """By parameter, of the last step that took any: its "gradient" or "weight" norm, or its trust "ratio"."""
        found: dict[Tensor, Tensor] = {}
        for device in self.devices:
            norms = device.norms(kind)
            if norms is None:
                return None
            params = (segment.param for bucket in device.buckets for segment in bucket.segments)
            found.update(zip(params, norms, strict=True))
        return found

    @property
    def counts_on_host(self) -> bool:
        return all(isinstance(device, AtenBackend) for device in self.devices)

    def unflatten(self) -> None:
        """Give every parameter that lives in a buffer made here, or in an earlier layout, a storage of its own."""
        made = {weights.data_ptr() for weights in self._weights}
        for bucket in self.buckets:
            for p in bucket.params:
                if p.untyped_storage().data_ptr() in made:
                    p.data = p.data.clone(memory_format=torch.preserve_format)
            bucket.note_places()
        self._weights = []

    @property
    def captured(self) -> bool:
        return any(device.captured for device in self.devices)

    @property
    def capturing(self) -> bool:
        return any(capture.capturing(device.device) for device in self.devices)

    def refuse_under_capture(self, reason: str) -> None:
        if self.capturing:
            raise RuntimeError(f"{reason}: run optimizer.step() eagerly once before capturing it into a graph")


BACKENDS = {backend.name: backend for backend in (TritonBackend, AtenBackend)}
