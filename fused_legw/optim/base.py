"""The base class of the fused optimizers: torch.optim's contract over flat buffers, and the LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import capture, checks
from ..backends.base import StepControl
from ..backends.engine import Engine
from ..buffers.gradients import GradientSet
from ..buffers.layout import Layout, named_params
from ..schedules.base import Schedule
from ..spec import Group, OptimizerSpec, python_numbers
from ..torch_private import has_scheduler
from . import checkpoint
from .options import ShownLR, check_params, check_place, check_written_lr, driven_twice, overwritten
from .place import PlaceInSchedule
from .reports import StepReports
from .run import OptimizerState, Run


class CommonOptions(TypedDict, total=False):
    """The keyword arguments that every fused optimizer takes."""

    skip_nonfinite: bool
    backend: str | None
    flatten: bool
    master_weights: bool
    tile: int


class FusedOptimizer(PlaceInSchedule, StepReports, torch.optim.Optimizer):
    """Base class of the fused optimizers: everything but the update itself.

    A group that follows a schedule holds it in `param_groups[i]["schedule"]`, where it can be replaced. The group's
    "lr" shows the LR of the last step. Its "steps_applied" shows the updates that the host knows of; on a GPU these
    include skipped steps. The group's "lr_scale", a finite number, zero or more, multiplies the schedule's LR.

    Do not assign "lr" in a group that follows a schedule: the next step raises. One exception, for
    torch.distributed.checkpoint: it sets "lr" to 0 and steps to create optimizer state. Such a step allocates state and
    changes no weight. If every scheduled group is at 0, the step is not counted.

    With fused=True, as in torch, and under our GradScaler, `step` divides by AMP's scale itself. It takes the scale and
    the inf check in the attributes grad_scale and found_inf.

    Args:
        params: parameters, named parameters, or param groups.
        defaults: the options of groups that do not set them.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        carry_norms: see `LARS`.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.
    """

    _spec: OptimizerSpec

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        skip_nonfinite: bool = False,
        backend: str | None = None,
        flatten: bool = True,
        master_weights: bool = True,
        carry_norms: bool = False,
        tile: int = 1024,
    ) -> None:
        tile = checks.plain(tile)
        if not isinstance(tile, int) or tile < 16 or tile & (tile - 1):
            raise ValueError(f"tile must be a power of two, 16 or more, got {tile!r}")
        options: dict[str, Any] = dict(flatten=flatten, master_weights=master_weights, carry_norms=carry_norms)
        for name, flag in {**options, "skip_nonfinite": skip_nonfinite}.items():
            checks.check_flag(name, flag)
        if carry_norms and not self._spec.carries:
            raise TypeError(f"carry_norms=True: {type(self).__name__} has no norms to carry over, only LARS has")
        defaults = python_numbers({**defaults, "schedule": None})
        self._check_made(dict(defaults))
        options = {"backend": backend, **options, "tile": tile}
        self._run = Run(self._spec, defaults, options, skip_nonfinite=skip_nonfinite)
        super().__init__(params, defaults)
        self.state = OptimizerState(self._run)
        self.register_state_dict_post_hook(checkpoint.pack)  # type: ignore[arg-type]
        self._adopt()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._run.takes_scale or bool(self.defaults.get("fused"))

    # Param groups and the learning rate

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the group's `lr` may be a schedule of its own.

        Raises:
            ValueError, TypeError, RuntimeError: as in the constructor; nothing has changed.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            with checks.naming(f"param_groups[{len(self.param_groups) - 1}]"):
                self._check_made(group)
            self._spec.complete(group)
            if self._run.adopts:
                check_place([group], self.steps_applied)
                check_params(self._spec, self.param_groups, self.state, self._run.options["backend"], self._run.layout)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._run.adopts:
            self._adopt()

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with a gradient that is not finite is skipped. Can be set."""
        return self._run.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._run.skip_nonfinite = value

    def _check_made(self, group: Group) -> None:
        """Check the options of a new group, and move a schedule from its "lr" to its "schedule"."""
        python_numbers(group)
        if isinstance(group["lr"], Schedule):
            group["schedule"], group["lr"] = group["lr"], 0.0
        self._spec.check(group)
        self._spec.check_made(group)

    def _check_groups(self) -> set[int]:
        """Check the groups' options. Returns the scheduled groups whose "lr" was set to 0.

        torch.distributed.checkpoint does that to create optimizer state: such groups get state and do not move.
        """
        self._run.checked.check(self.param_groups)
        scheduler, frozen = has_scheduler(self.step), set[int]()
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if not (type(lr) is float and math.isfinite(lr)):  # saves a call at every step
                check_written_lr(f"param_groups[{i}]", lr)
            if scheduler and group["schedule"] is not None:
                raise driven_twice(i, group)
            if self._run.shown.overwritten(group):
                if lr != 0:
                    raise overwritten(i, group)
                frozen.add(i)
        return frozen

    # Flat buffers

    @torch.inference_mode(False)
    @torch.no_grad()
    def _adopt(self, steps_applied: int | None = None) -> None:
        """(Re)build the flat buffers from the current parameters and `self.state`."""
        run = self._run
        options = dict(run.options)
        backends, let_be = check_params(self._spec, self.param_groups, self.state, options.pop("backend"), run.layout)
        steps = self.steps_applied if steps_applied is None else steps_applied
        check_place(self.param_groups, steps)
        carry_norms = options.pop("carry_norms")
        on_host = [device for device, name in backends.items() if name == "aten"]
        skipped = run.engine.steps_skipped() if run.engine else run.steps_skipped
        run.layout = Layout(
            self._spec,
            self.param_groups,
            self.state,
            let_be=let_be,
            made=run.made,
            on_host=on_host,
            **options,
            previous=run.layout,
        )
        run.engine = Engine(
            self._spec,
            run.layout,
            backends,
            steps,
            carry_norms=carry_norms,
            steps_skipped=skipped,
            previous=run.engine,
        )
        run.adopts = True
        run.shown.show(self.param_groups, run.host_steps)

    @torch.no_grad()
    def unflatten(self) -> None:
        """Give every parameter a storage of its own. State stays flat, and later steps work as before."""
        self._run.options["flatten"] = False
        if self._run.layout is not None:
            self._run.layout.unflatten()

    @property
    def backend(self) -> str:
        """The backend that runs steps: "triton", "aten", or "aten+triton" where devices differ."""
        devices = self._run.engine.devices if self._run.engine else []
        return "+".join(sorted({device.name for device in devices}))

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss, if there is a closure.

        State lives in buffers of the optimizer: a tensor that you put into `optimizer.state[p]` is copied in, and the
        tensor itself is not updated. On a CPU, state in memory that other processes share is refused.

        Raises:
            TypeError, RuntimeError: a gradient cannot be used, because it is sparse or complex, for instance.
            RuntimeError: a group with a schedule has an `lr` that other code or a torch LR scheduler wrote.
            TypeError, ValueError: an option or state that was set by hand is not valid. In all cases nothing has
                changed.
        """
        return self._step(closure)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # on `step`, torch 2.9 would lose self
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self._check_groups()
        found = self._read_gradients(frozen)
        if found.moving:
            self._update(found, frozen)
        return loss

    def _read_gradients(self, frozen: set[int]) -> GradientSet:
        """The gradients that this step uses. Raises for one that cannot be used."""
        found = self._current_layout().gradients.read(frozen, self._run.checked.generation)
        if found is None:
            for name, p, _ in named_params(self.param_groups):
                checks.check_gradient(name, p)
            gradients = self._current_layout(thorough=True).gradients
            found = gradients.read(frozen, self._run.checked.generation, checked=True)
            assert found is not None
        return found

    def _current_layout(self, *, thorough: bool = False) -> Layout:
        """The flat buffers, rebuilt if parameters, state or schedules were replaced or moved."""
        layout = self._run.layout
        if layout is None or layout.stale(self.param_groups, self.state, thorough=thorough):
            if layout is not None:
                capture.refuse(layout.devices, "a parameter, its state or a schedule was replaced")
            self._adopt()
            layout = self._run.layout
            assert layout is not None
        return layout

    def _update(self, found: GradientSet, frozen: set[int]) -> None:
        run, engine = self._run, self._run.engine
        assert engine is not None
        scheduled = {i for i, group in enumerate(self.param_groups) if group["schedule"] is not None}
        if run.clips[0] != run.checked.generation:
            run.clips = run.checked.generation, self._spec.clips(self.param_groups)
        control = StepControl(
            clips=run.clips[1],
            skips=run.skip_nonfinite or run.finds_nonfinite,
            counts_step=not scheduled or not scheduled <= frozen,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=None if run.finds_nonfinite else getattr(self, "found_inf", None),
        )
        recorded = engine.step(self.param_groups, found, control, run.checked.generation)
        if control.counts_step and not recorded:
            run.host_steps = self.steps_applied if engine.counts_on_host else run.host_steps + 1
            run.shown.show(self.param_groups, run.host_steps)

    def _find_nonfinite(self) -> dict[torch.device, Tensor]:
        """Make the next step skip itself if a gradient is not finite. Returns the flag that it writes, per device."""
        self._current_layout()
        assert self._run.engine is not None
        devices = self._run.engine.devices
        self._run.finds_nonfinite = True
        return {device.device: device.nonfinite.zero_() for device in devices}

    @torch.no_grad()
    def upload_param_groups(self) -> None:
        """Pass changed values in param_groups to captured CUDA graphs: LR, weight decay, momentum, betas, ...

        Replays read them from a table on the device. Eager steps write it, and so does this method, without a step.

        Raises:
            RuntimeError: a graph cannot follow the change: another schedule, other parameters, or new state.
        """
        self._check_groups()
        layout, engine = self._run.layout, self._run.engine
        if layout is None or engine is None or layout.stale(self.param_groups, self.state):
            raise RuntimeError("a parameter, its state or a schedule was replaced: make a step, then capture it again")
        engine.write_groups(self.param_groups)

    def weights_changed(self) -> None:
        """Tell LARS with carry_norms=True that weights changed in a way that it cannot notice: see `LARS`."""
        if self._run.engine is not None:
            self._run.engine.weights_changed()

    # Checkpoints and copies

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, with each group's schedule and `steps_applied`. Reads the device."""
        self._run.host_steps = self.steps_applied
        self._run.shown.show(self.param_groups, self._run.host_steps)
        return super().state_dict()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim. Also takes state dicts of torch.optim, apex, timm and others.

        The dict's schedule and `steps_applied` replace those of the optimizer, like every hyper-parameter. If the dict
        has no schedule, the optimizer keeps its own. To change the schedule, set `param_groups[i]["schedule"]`
        afterwards.

        Raises:
            ValueError: state has the wrong shape or lacks what an update needs; or the dict has no `steps_applied`
                although a group follows a schedule: set `optimizer.steps_applied` first. Nothing has changed.
            ValueError, TypeError: an option is not valid; nothing has changed.
        """
        # Registered here, so that it runs after the user's hooks.
        hook = self.register_load_state_dict_pre_hook(checkpoint.unpack)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.pickled(self, super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """load_state_dict calls this with state and param_groups; copying and unpickling, with everything."""
        state = dict(state)
        made = state.pop("_made", None)  # what `checkpoint.pickled` adds
        steps_applied = checkpoint.steps_applied_of(state)
        state["state"] = checkpoint.unbox(state["state"])
        if made is None:
            followed, held = [group["schedule"] for group in self.param_groups], (self.param_groups, self.state)
            super().__setstate__(state)
            for group, schedule in zip(self.param_groups, followed, strict=False):
                if schedule is not None and group["schedule"] is not None:
                    group["schedule"] = schedule.become(group["schedule"])
        else:
            super().__setstate__(state)
            self._run = Run(self._spec, self.defaults, **made)
            held = [], OptimizerState(self._run)
            self.register_state_dict_post_hook(checkpoint.pack)  # type: ignore[arg-type]
        # In place, because a wrapper may hold the same list and dict.
        dict.clear(held[1])
        held[1].update(self.state)
        held[0][:] = self.param_groups
        self.param_groups, self.state = held
        run = self._run
        run.shown = ShownLR()
        run.host_steps = self.steps_applied if steps_applied is None else steps_applied
        self._adopt(run.host_steps)
