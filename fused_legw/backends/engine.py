"""Runs the passes of a step on every device of an optimizer, and combines their norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import capture
from ..buffers.bucket import Bucket
from ..buffers.gradients import GradientSet
from ..buffers.layout import Layout
from ..spec import Group, OptimizerSpec
from ..torch_private import version
from .aten import AtenBackend
from .base import Backend, StepControl
from .passes import Pass, needs, passes


def make_backend(
    name: str, spec: OptimizerSpec, buckets: Sequence[Bucket], steps_applied: int, *, carry_norms: bool = False
) -> Backend:
    """Make the backend with this name for the buckets of one device."""
    if name == "aten":
        return AtenBackend(spec, buckets, steps_applied)
    from .triton import TritonBackend  # the one place that imports Triton, which may be absent

    return TritonBackend(spec, buckets, steps_applied, carry_norms=carry_norms)


class Engine:
    """Runs the steps of an optimizer on the buckets of its layout."""

    def __init__(
        self,
        spec: OptimizerSpec,
        layout: Layout,
        backends: Mapping[torch.device, str],
        steps_applied: int,
        *,
        carry_norms: bool,
        steps_skipped: Mapping[torch.device, int],
        previous: Engine | None,
    ) -> None:
        """backends: the name of each device's backend. previous: the engine that this one replaces."""
        self._spec, self._layout = spec, layout
        self.devices: list[Backend] = []
        for device, name in backends.items():
            own = [bucket for bucket in layout.buckets if bucket.device == device]
            self.devices.append(make_backend(name, spec, own, steps_applied, carry_norms=carry_norms))
            self.devices[-1].step_counts[1] = steps_skipped.get(device, 0)
        self.counts_on_host = all(device.counts_on_host for device in self.devices)
        self._carries = carry_norms and not self.counts_on_host
        self._passes: tuple[object, tuple[Pass, ...]] = None, ()  # the last step's, after the values they depend on
        self._versions = list[int]()  # the parameters' versions after the last step, if it carries norms over
        self._replayed = list[frozenset[object]]()  # the `needs` of each captured step
        # Earlier engines with captured graphs, which use the buffers and tables of their capture.
        self._kept: list[Engine] = []
        if previous is not None:
            self._kept = [*previous._kept, *([previous] if previous._recorded else [])]

    @property
    def _recorded(self) -> bool:
        return any(device.captured for device in self.devices)

    @property
    def captured(self) -> bool:
        """Whether a graph may still replay a step of this engine or an earlier one."""
        return self._recorded or bool(self._kept)

    def steps_skipped(self) -> dict[torch.device, int]:
        """The number of steps skipped, by device. Reads the devices."""
        return {device.device: int(device.step_counts[1]) for device in self.devices}

    @property
    def capturing(self) -> bool:
        return capture.any_capturing(device.device for device in self.devices)

    def step(self, groups: Sequence[Group], found: GradientSet, control: StepControl, options: int) -> bool:
        """Run one step on every device. Returns whether a graph capture recorded the step instead of running it.

        options: the options' generation, a number that grows whenever an option of any group changes.
        """
        key = options, control.clips, control.global_norm
        if key != self._passes[0]:
            every = passes(self._spec, groups, clips=control.clips, global_norm=control.global_norm)
            self._passes = key, every
        if self._carries:
            self._see_versions()
        for bucket in self._layout.buckets:
            bucket.read_gaps()
        try:
            for device in self.devices:
                device.begin(groups, self._own(device, found), control, others=len(self.devices) - 1, options=options)
            recorded = self.capturing
            if recorded:
                self._replayed.append(needs(self._spec, groups))
            for what in self._passes[1]:
                self._run(what, groups, control)
            for bucket, gradients in zip(self._layout.buckets, found.by_bucket, strict=True):
                bucket.write_gaps(gradients)
        finally:
            for device in self.devices:
                device.end()
        # ATen's fused kernels do not tell autograd of the change. It must know, to refuse a backward pass that needs
        # the old values.
        torch.autograd.graph.increment_version(found.moving)
        if self._carries:
            self._versions = self._versions_now()
        return recorded

    def _own(self, device: Backend, found: GradientSet) -> GradientSet:
        """The part of the gradients that belongs to one device."""
        if len(self.devices) == 1:
            return found
        pairs = zip(self._layout.buckets, found.by_bucket, strict=True)
        return found._replace(by_bucket=[gradients for bucket, gradients in pairs if bucket in device.buckets])

    def _run(self, what: Pass, groups: Sequence[Group], control: StepControl) -> None:
        for device in self.devices:
            device.run(what, groups, control)
        if "gradients" in what.of and control.global_norm and len(self.devices) > 1:
            norms = [device.global_norm() for device in self.devices]
            for i, device in enumerate(self.devices):
                device.take_norms(norms[:i] + norms[i + 1 :])

    def write_groups(self, groups: Sequence[Group]) -> None:
        """Pass the groups' current values to captured graphs.

        Raises:
            RuntimeError: a graph lacks a pass or a state that the groups need now.
        """
        wanted = needs(self._spec, groups)
        if not all(wanted <= had for had in self._replayed):
            raise RuntimeError(
                "make a step, then capture it again: an option changed the passes of a step (clipping or state)"
            )
        if self._carries:
            self._see_versions()
            self._versions = self._versions_now()
        for device in self.devices:
            device.write_groups(groups)

    # Norms of weights, carried over from one step to the next

    def weights_changed(self) -> None:
        """Drop the norms that are carried over."""
        for device in self.devices:
            device.weights_changed()

    def _see_versions(self) -> None:
        """Drop the norms if parameters have changed since the last step."""
        if self._versions != self._versions_now():
            # A graph that drops them would do so at every replay.
            capture.refuse(self._layout.devices, "weights changed since the last step")
            self.weights_changed()

    def _versions_now(self) -> list[int]:
        return [version(p) for bucket in self._layout.buckets for p in bucket.params]

    def norms(self, kind: str) -> dict[Tensor, Tensor] | None:
        """Each parameter's "gradient" norm, "weight" norm or trust "ratio" of the last step that computed it."""
        found: dict[Tensor, Tensor] = {}
        for device in self.devices:
            norms = device.norms(kind)
            if norms is None:
                return None
            found.update(zip((p for bucket in device.buckets for p in bucket.params), norms, strict=True))
        return found
