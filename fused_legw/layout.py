"""All the flat buffers of one optimizer: built from its parameters and state, and rebuilt whole when anything moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import checks, flat
from .backends import BACKENDS, AtenBackend, TritonBackend, explain_backend
from .rule import Group, Rule
from .table import capturing

State = dict[Tensor, dict[str, Any]]  # torch.optim's


def named_params(groups: list[Group]) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, group) of all parameters."""
    named = []
    for i, group in enumerate(groups):
        names = group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]
        named += [(name, p, i) for name, p in zip(names, group["params"], strict=True)]
    return named


def check_params(rule: Rule, groups: list[Group], state: State, backend: str | None) -> None:
    """Refuse what cannot be optimized, before anything has changed."""
    named = named_params(groups)
    for name, p, group in named:
        checks.check_parameter(name, p)
        checks.check_lr(groups[group]["lr"], name, p)
        checks.check_state(f"the state of {name}: ", state.get(p, {}), (*rule.states, flat.MASTER), p.shape)
        explain_backend(p.device, backend)
    checks.check_overlaps([(name, p) for name, p, _ in named])


class Layout:
    """Buckets of an optimizer's parameters, the backend of each device, and the schedules they were built for."""

    def __init__(
        self,
        rule: Rule,
        groups: list[Group],
        state: State,
        *,
        backend: str | None,
        flatten: bool,
        master_weights: bool,
        tile: int,
        steps_applied: int,
        counts: Mapping[Tensor, int],
    ) -> None:
        """rule, groups, state: the optimizer's. counts: counted updates of parameters, where `state` goes with them."""
        self._rule, self._groups, self._state = rule, groups, state
        self.buckets: list[flat.Bucket] = []
        self.devices: list[TritonBackend | AtenBackend] = []
        self.schedules = [group["schedule"] for group in groups]
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for _, p, group in named_params(groups):
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        chosen = {device: explain_backend(device, backend)[0] for device, _ in keyed}
        for (device, dtype), params in keyed.items():
            bucket = flat.Bucket(params, tile, device if chosen[device] == "triton" else torch.device("cpu"))
            bucket.adopt(flatten=flatten)
            if master_weights and flat.compute_dtype(dtype) != dtype:
                bucket.add_state(flat.MASTER)
            self._take_state(bucket, counts)
            self.buckets.append(bucket)
        for device, name in chosen.items():
            own = [bucket for bucket in self.buckets if bucket.device == device]
            self.devices.append(BACKENDS[name](rule, own, groups, steps_applied))

    def _take_state(self, bucket: flat.Bucket, counts: Mapping[Tensor, int]) -> None:
        """Copy what the optimizer's state holds into the bucket, and let it hold the views."""
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            for name in self._rule.states:
                if state.get(name) is not None or name in self._rule.used_states(self._groups[segment.group]):
                    bucket.add_state(name)
        for segment in bucket.segments:
            state = self._state.get(segment.param, {})
            for name, view in segment.state.items():
                if state.get(name) is not None:
                    state[name] = view.copy_(state[name])
                    segment.shown.add(name)
        # All that SGD needs to know of a state from outside is whether there was any update.
        steps = [counts.get(s.param, int(not s.shown.isdisjoint(self._rule.states))) for s in bucket.segments]
        bucket.steps.copy_(torch.tensor(steps, dtype=torch.int64))

    def counts(self) -> dict[Tensor, int]:
        """Counted updates by parameter, of those whose state is still ours. Reads the device."""
        return {
            segment.param: count
            for bucket in self.buckets
            for segment, count in zip(bucket.segments, bucket.steps.tolist(), strict=True)
            if not self._state_changed(segment)
        }

    def _state_changed(self, segment: flat.Segment) -> bool:
        """Whether someone else replaced, added or removed entries of the optimizer's state."""
        state = self._state.get(segment.param, {})
        for name, view in segment.state.items():
            if state.get(name) is not (view if name in segment.shown else None):
                return True
        return False

    def stale(self, groups: list[Group], state: State) -> bool:
        """Whether anything is not where it was. Every step asks, so this allocates next to nothing."""
        return (
            state is not self._state
            or groups is not self._groups
            or any(group["schedule"] is not schedule for group, schedule in zip(groups, self.schedules, strict=True))
            or any(segment.moved or self._state_changed(segment) for b in self.buckets for segment in b.segments)
        )

    def gradients(self, bucket: flat.Bucket, frozen: set[int]) -> list[Tensor | None]:
        """The gradient of each segment that is to move, in its parameter's layout; its state is made and shown."""
        gradients: list[Tensor | None] = []
        for segment in bucket.segments:
            p, gradient = segment.param, segment.param.grad
            if gradient is not None:
                for name in self._rule.used_states(self._groups[segment.group]):
                    if name not in bucket.state:
                        self.refuse_under_capture(f"{name} does not exist yet")
                        bucket.add_state(name)
                    segment.used.add(name)
                if segment.shown != segment.used:
                    segment.shown |= segment.used
                    self._state[p].update((name, segment.state[name]) for name in segment.shown)
                gradient = None if segment.group in frozen else flat.in_layout_of(p, gradient)
            gradients.append(gradient)
        return gradients

    @property
    def capturing(self) -> bool:
        return any(capturing(device.device) for device in self.devices)

    def refuse_under_capture(self, reason: str) -> None:
        if self.capturing:
            raise RuntimeError(f"{reason}: run optimizer.step() eagerly once before capturing it into a graph")
