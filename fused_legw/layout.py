"""All the flat buffers of one optimizer: built from its parameters and state, and rebuilt whole when anything moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, flat
from .backends import BACKENDS, AtenBackend, TritonBackend, explain_backend
from .table import capturing

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def named_params(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, group) of all parameters."""
    named = []
    for i, group in enumerate(groups):
        names = group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]
        named += [(name, p, i) for name, p in zip(names, group["params"], strict=True)]
    return named


def check_params(groups: list[dict[str, Any]], backend: str | None) -> None:
    """Refuse what cannot be optimized, before anything has changed."""
    named = named_params(groups)
    for name, p, group in named:
        checks.check_parameter(name, p)
        checks.check_lr(groups[group]["lr"], name, p)
        explain_backend(p.device, backend)
    checks.check_overlaps([(name, p) for name, p, _ in named])


class Layout:
    """Buckets of an optimizer's parameters, the backend of each device, and the schedules they were built for."""

    def __init__(self, optimizer: FusedOptimizer, steps_applied: int, counts: dict[Tensor, int]) -> None:
        """counts: counted updates of the parameters whose state in `optimizer.state` is known to go with them."""
        self._optimizer_state = optimizer.state
        self.buckets: list[flat.Bucket] = []
        self.devices: list[TritonBackend | AtenBackend] = []
        self.schedules = [group["schedule"] for group in optimizer.param_groups]
        options, groups = optimizer._options, optimizer.param_groups
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for _, p, group in named_params(groups):
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        chosen = {device: explain_backend(device, options["backend"])[0] for device, _ in keyed}
        for (device, dtype), params in keyed.items():
            tables = device if chosen[device] == "triton" else torch.device("cpu")
            bucket = flat.Bucket(params, options["tile"], tables)
            bucket.adopt(flatten=options["flatten"])
            if options["master_weights"] and flat.compute_dtype(dtype) != dtype:
                bucket.add_state(flat.MASTER)
            self._take_state(bucket, optimizer, counts)
            self.buckets.append(bucket)
        for device, name in chosen.items():
            self.devices.append(BACKENDS[name]([b for b in self.buckets if b.device == device], groups, steps_applied))

    def _take_state(self, bucket: flat.Bucket, optimizer: FusedOptimizer, counts: dict[Tensor, int]) -> None:
        """Copy what the optimizer's state holds into the bucket, and let it hold the views."""
        for segment in bucket.segments:
            state = optimizer.state.get(segment.param, {})
            for name in optimizer._states:
                if name in state or name in optimizer._used_states(optimizer.param_groups[segment.group]):
                    bucket.add_state(name)
        for segment in bucket.segments:
            state = optimizer.state.get(segment.param, {})
            for name, view in segment.state.items():
                if name in state:
                    state[name] = view.copy_(state[name])
                    segment.shown.add(name)
        # All that SGD needs to know of a state from outside is whether there was any update.
        steps = [counts.get(s.param, int(not s.shown.isdisjoint(optimizer._states))) for s in bucket.segments]
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
        state = self._optimizer_state.get(segment.param, {})
        for name, view in segment.state.items():
            if state.get(name) is not (view if name in segment.shown else None):
                return True
        return False

    def stale(self, optimizer: FusedOptimizer) -> bool:
        """Whether anything is not where it was. Every step asks, so this allocates next to nothing."""
        return (
            optimizer.state is not self._optimizer_state
            or any(g["schedule"] is not s for g, s in zip(optimizer.param_groups, self.schedules, strict=True))
            or any(segment.moved or self._state_changed(segment) for b in self.buckets for segment in b.segments)
        )

    def gradients(self, bucket: flat.Bucket, optimizer: FusedOptimizer, frozen: set[int]) -> list[Tensor | None]:
        """The gradient of each segment that is to move, in its parameter's layout; its state is made and shown."""
        gradients: list[Tensor | None] = []
        for segment in bucket.segments:
            p, gradient = segment.param, segment.param.grad
            if gradient is not None:
                for name in optimizer._used_states(optimizer.param_groups[segment.group]):
                    if name not in bucket.state:
                        self.refuse_under_capture(f"{name} does not exist yet")
                        bucket.add_state(name)
                    segment.used.add(name)
                if segment.shown != segment.used:
                    segment.shown |= segment.used
                    optimizer.state[p].update((name, segment.state[name]) for name in segment.shown)
                gradient = None if segment.group in frozen else flat.in_layout_of(p, gradient)
            gradients.append(gradient)
        return gradients

    @property
    def capturing(self) -> bool:
        return any(capturing(device.device) for device in self.devices)

    def refuse_under_capture(self, reason: str) -> None:
        if self.capturing:
            raise RuntimeError(f"{reason}: run optimizer.step() eagerly once before capturing it into a graph")
