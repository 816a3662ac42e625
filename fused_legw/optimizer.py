"""What every fused optimizer shares: torch.optim's contract over flat buffers, and the LEGW schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, checks, flat
from .backends import BACKENDS, AtenBackend, TritonBackend, explain_backend
from .schedule import LEGW
from .table import capturing


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers; see `SGD` for the arguments they share.

    A subclass names its update rule and its state, and says what a group's hyper-parameters mean to the kernel
    (`_hyper`) and to ATen (`_aten`).
    """

    _rule: str  # in legw_kernels.launch.RULES
    _states: tuple[str, ...]  # torch's names, in the rule's order

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        """Raise for hyper-parameters that make no sense, with torch.optim's messages."""
        raise NotImplementedError

    @staticmethod
    def _used_states(group: dict[str, Any]) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    @staticmethod
    def _hyper(group: dict[str, Any]) -> tuple[float, ...]:
        """The group's hyper-parameters, in the order of `launch.group_row`."""
        raise NotImplementedError

    @staticmethod
    def _aten(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        lr: float,
        group: dict[str, Any],
        first: bool,
    ) -> None:
        """One update of these tensors by ATen; first: of each it is the first counted one."""
        raise NotImplementedError

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        backend: str | None,
        flatten: bool,
        master_weights: bool,
        tile: int,
    ) -> None:
        if not isinstance(tile, int) or tile < 16 or tile & (tile - 1):
            raise ValueError(f"tile must be a power of two, 16 or more, got {tile!r}")
        if defaults["differentiable"]:
            raise ValueError("differentiable=True is not supported: the fused step is not recorded by autograd")
        self._check_group(defaults)
        self._options: dict[str, Any] = dict(backend=backend, flatten=flatten, master_weights=master_weights, tile=tile)
        self._forget()
        self._host_steps = 0
        self._steps_given = False
        self._constructing = True
        super().__init__(params, {**defaults, "schedule": None})
        self._constructing = False
        self.register_state_dict_post_hook(checkpoint.pack)  # type: ignore[arg-type]
        self._adopt()

    def _forget(self) -> None:
        """Drop the flat buffers; what they hold stays reachable through the parameters and `self.state`."""
        self._buckets: list[flat.Bucket] = []
        self._devices: list[TritonBackend | AtenBackend] = []
        self._schedules: list[LEGW | None] = []
        self._shown_lr: list[float | None] = []

    # Param groups and the learning rate

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the group's `lr` may be a LEGW schedule of its own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._named_params()
        except BaseException:
            self.param_groups.pop()
            raise
        if isinstance(group["lr"], LEGW):
            group["schedule"], group["lr"] = group["lr"], 0.0
        if not self._constructing:
            self._adopt()

    @property
    def steps_applied(self) -> int:
        """Updates applied so far, the schedule's t for the next one. Reads the device; can be set."""
        return int(self._devices[0].counts) if self._devices else self._host_steps

    @steps_applied.setter
    def steps_applied(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"steps_applied must be an integer, zero or more, got {value!r}")
        for device in self._devices:
            device.counts.fill_(value)
        self._host_steps, self._steps_given = value, True
        self._show_lr()

    def get_last_lr(self) -> list[float]:
        """Each group's LR in the last applied update, exactly (before any: in the first). Reads the device."""
        t = max(self.steps_applied - 1, 0)
        return [group["schedule"](t) if group["schedule"] else float(group["lr"]) for group in self.param_groups]

    def _show_lr(self, frozen: Iterable[int] = ()) -> None:
        """Let param_groups show the LR of the last update the host knows of."""
        for i, group in enumerate(self.param_groups):
            if group["schedule"] is not None and i not in frozen:
                group["lr"] = self._shown_lr[i] = group["schedule"](max(self._host_steps - 1, 0))

    def _frozen_groups(self) -> set[int]:
        """LEGW groups whose shown LR was overwritten by 0: state is made for them, nothing moves or advances.

        torch.distributed.checkpoint does that to bring an optimizer's state into being.
        """
        frozen = set()
        for i, (group, shown) in enumerate(zip(self.param_groups, self._shown_lr, strict=True)):
            if group["schedule"] is None:
                continue
            if hasattr(self.step, "_wrapped_by_lr_sched"):
                raise RuntimeError(
                    f"param_groups[{i}] follows {group['schedule']}, but a torch LR scheduler was made for this "
                    "optimizer: use one or the other"
                )
            if group["lr"] != shown:
                if group["lr"] != 0:
                    raise RuntimeError(
                        f"param_groups[{i}]['lr'] was set to {group['lr']!r}, but the group follows "
                        f"{group['schedule']}: to change its LR set param_groups[{i}]['schedule']"
                    )
                frozen.add(i)
        return frozen

    # Flat buffers

    def _named_params(self) -> list[tuple[str, Tensor, int]]:
        """(name, parameter, group) of all parameters, checked."""
        named = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))
            ]
            named += [(name, p, i) for name, p in zip(names, group["params"], strict=True)]
        for name, p, group_index in named:
            checks.check_parameter(name, p)
            checks.check_lr(self.param_groups[group_index]["lr"], name, p)
            explain_backend(p.device, self._options["backend"])
        checks.check_overlaps([(name, p) for name, p, _ in named])
        return named

    @torch.no_grad()
    def _adopt(self) -> None:
        """(Re)build the flat buffers from the parameters and `self.state` as they are now."""
        named = self._named_params()
        steps_applied, counts = self.steps_applied, self._own_counts()
        keyed: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for _, p, group in named:
            keyed.setdefault((p.device, p.dtype), []).append((p, group))
        self._forget()
        chosen = {device: explain_backend(device, self._options["backend"])[0] for device, _ in keyed}
        for (device, _), params in keyed.items():
            tables = device if chosen[device] == "triton" else torch.device("cpu")
            self._buckets.append(self._fill(flat.Bucket(params, self._options["tile"], tables), counts))
        for device, name in chosen.items():
            buckets = [bucket for bucket in self._buckets if bucket.device == device]
            self._devices.append(BACKENDS[name](buckets, self.param_groups, steps_applied))
        self._schedules = [group["schedule"] for group in self.param_groups]
        self._shown_lr = [None] * len(self.param_groups)
        self._show_lr()

    def _fill(self, bucket: flat.Bucket, counts: dict[Tensor, int]) -> flat.Bucket:
        """Take the parameters and what `self.state` has for them into a new bucket."""
        bucket.adopt(flatten=self._options["flatten"])
        if self._options["master_weights"] and flat.compute_dtype(bucket.dtype) != bucket.dtype:
            bucket.add_state(flat.MASTER)
        for segment in bucket.segments:
            state = self.state.get(segment.param, {})
            for name in self._states:
                if name in state or name in self._used_states(self.param_groups[segment.group]):
                    bucket.add_state(name)
        for segment in bucket.segments:
            state = self.state.get(segment.param, {})
            for name, view in segment.state.items():
                if name in state:
                    state[name] = view.copy_(state[name])
                    segment.shown.add(name)
        # All that SGD needs to know of a state from outside is whether there was any update.
        steps = [counts.get(s.param, int(not s.shown.isdisjoint(self._states))) for s in bucket.segments]
        bucket.steps.copy_(torch.tensor(steps, dtype=torch.int64))
        return bucket

    def _own_counts(self) -> dict[Tensor, int]:
        """Counted updates by parameter, of those whose state is still ours. Reads the device."""
        return {
            segment.param: count
            for bucket in self._buckets
            for segment, count in zip(bucket.segments, bucket.steps.tolist(), strict=True)
            if not self._state_changed(segment)
        }

    def _state_changed(self, segment: flat.Segment) -> bool:
        """Whether someone else replaced, added or removed entries of `self.state`."""
        state = self.state.get(segment.param, {})
        return any(
            state.get(name) is not (view if name in segment.shown else None) for name, view in segment.state.items()
        )

    def _stale(self) -> bool:
        """Whether anything is not where it was when adopted. Every step asks, so this allocates nothing."""
        if any(group["schedule"] is not known for group, known in zip(self.param_groups, self._schedules, strict=True)):
            return True
        return any(
            segment.moved or self._state_changed(segment) for bucket in self._buckets for segment in bucket.segments
        )

    @torch.no_grad()
    def unflatten(self) -> None:
        """Give every parameter a storage of its own again; state stays flat, and later steps work as before."""
        self._options["flatten"] = False
        for bucket in self._buckets:
            bucket.unflatten()

    @property
    def backend(self) -> str:
        """What runs the step: "triton", "aten", or both joined by "+" where devices differ."""
        return "+".join(sorted({device.name for device in self._devices}))

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given.

        Raises, before anything changes: TypeError or RuntimeError for a gradient that cannot be used (sparse, complex);
        RuntimeError for a LEGW group whose `lr` was written or is driven by a torch LR scheduler.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self._frozen_groups()
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is not None:
                    checks.check_gradient(f"param_groups[{i}]['params'][{j}]", p)
        if self._stale():
            self._refuse_under_capture("a parameter, its state or a schedule was replaced")
            self._adopt()
        gradients = [[self._gradients(bucket, frozen) for bucket in device.buckets] for device in self._devices]
        if any(g is not None for of_device in gradients for of_bucket in of_device for g in of_bucket):
            scheduled = {i for i, schedule in enumerate(self._schedules) if schedule is not None}
            advance = not scheduled or not scheduled <= frozen
            for device, of_device in zip(self._devices, gradients, strict=True):
                device.step(self, of_device, advance=advance)
                for bucket, of_bucket in zip(device.buckets, of_device, strict=True):
                    # Autograd must see the change: it refuses a backward pass through what was saved before.
                    moved = [s.param for s, g in zip(bucket.segments, of_bucket, strict=True) if g is not None]
                    torch.autograd.graph.increment_version(moved)
            if advance and not capturing(self._buckets[0].device):
                self._host_steps += 1
                self._show_lr(frozen)
        return loss

    def _gradients(self, bucket: flat.Bucket, frozen: set[int]) -> list[Tensor | None]:
        """The gradient of each segment that is to move, in its parameter's layout; its state is made and shown."""
        gradients: list[Tensor | None] = []
        for segment in bucket.segments:
            p, gradient = segment.param, segment.param.grad
            if gradient is not None:
                for name in self._used_states(self.param_groups[segment.group]):
                    if name not in bucket.state:
                        self._refuse_under_capture(f"{name} does not exist yet")
                        bucket.add_state(name)
                    segment.used.add(name)
                if segment.shown != segment.used:
                    segment.shown |= segment.used
                    self.state[p].update((name, segment.state[name]) for name in segment.shown)
                gradient = None if segment.group in frozen else flat.in_layout_of(p, gradient)
            gradients.append(gradient)
        return gradients

    def _refuse_under_capture(self, reason: str) -> None:
        if capturing(self._buckets[0].device):
            raise RuntimeError(f"{reason}: run optimizer.step() eagerly once before capturing it into a graph")

    # Checkpoints and copies

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, and from torch.optim's own dicts; a group's schedule and `steps_applied` come with it.

        Raises ValueError, before anything changes, for a dict without `steps_applied` where a group follows LEGW (set
        `optimizer.steps_applied` first), and for state of the wrong shape.
        """
        # The last of the hooks, after the user's.
        hook = self.register_load_state_dict_pre_hook(checkpoint.unpack)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        state = {p: checkpoint.own_storages(values) for p, values in self.state.items()}
        return {
            **super().__getstate__(),
            "state": state,
            "_options": self._options,
            "_steps_applied": self.steps_applied,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict with state and param_groups, by copying and unpickling with everything."""
        state = dict(state)
        copied = "_options" in state
        steps = {group.pop("steps_applied", None) for group in state["param_groups"]} | {
            state.pop("_steps_applied", None)
        }
        steps_applied = max(steps - {None}, default=None)
        if steps_applied is None:
            steps_applied = self.steps_applied
        self._forget()
        super().__setstate__({**state, "state": checkpoint.unbox(state["state"])})
        if copied:
            self._constructing, self._steps_given = False, False
            self.register_state_dict_post_hook(checkpoint.pack)  # type: ignore[arg-type]
        self._host_steps = steps_applied
        self._adopt()
