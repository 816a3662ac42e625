"""The devices of one optimizer: runs the passes of a step on each, and joins what they find."""

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
    """The backend of that name for the buckets of one device."""
    if name == "aten":
        return AtenBackend(spec, buckets, steps_applied)
    from .triton import TritonBackend  # the one place that imports Triton, which may be absent

    return TritonBackend(spec, buckets, steps_applied, carry_norms=carry_norms)


class Engine:
    """Makes the steps of an optimizer whose tensors lie in a layout."""

    def __init__(
        self,
        spec: OptimizerSpec,
        layout: Layout,
        backends: Mapping[torch.device, str],
        steps_applied: int,
        *,
        carry_norms: bool,
        previous: Engine | None,
    ) -> None:
        """backends: by device, the name of what runs its steps. previous: the engine that this one replaces."""
        self._spec, self._layout = spec, layout
        skipped = {device.device: int(device.step_counts[1]) for device in previous.devices} if previous else {}
        self.devices: list[Backend] = []
        for device, name in backends.items():
            own = [bucket for bucket in layout.buckets if bucket.device == device]
            self.devices.append(make_backend(name, spec, own, steps_applied, carry_norms=carry_norms))
            self.devices[-1].step_counts[1] = skipped.get(device, 0)
        self.counts_on_host = all(device.counts_on_host for device in self.devices)
        self._carries = carry_norms and not self.counts_on_host
        self._passes: tuple[object, tuple[Pass, ...]] = None, ()  # of the last step, and what they follow from
        self._versions = list[int]()  # of the parameters after the last step, where norms are carried over from it
        self._replayed = list[frozenset[object]]()  # what each captured step has; see `needs`
        # A captured graph goes on addressing the buffers and tables it was captured with.
        self._kept: list[Engine] = []
        if previous is not None:
            self._kept = [*previous._kept, *([previous] if any(device.captured for device in previous.devices) else [])]

    @property
    def capturing(self) -> bool:
        return capture.any_capturing(device.device for device in self.devices)

    def step(self, groups: Sequence[Group], found: GradientSet, control: StepControl, options: int) -> bool:
        """One step on every device; returns whether a graph capture has recorded it instead of making it.

        options: grows by one whenever an option of any group changes.
        """
        follows_from = options, control.clips, control.global_norm
        if follows_from != self._passes[0]:
            every = passes(self._spec, groups, clips=control.clips, global_norm=control.global_norm)
            self._passes = follows_from, every
        if self._carries:
            self._see_versions()
        try:
            for device in self.devices:
                device.begin(groups, self._own(device, found), control, others=len(self.devices) - 1, options=options)
            recorded = self.capturing
            if recorded:
                self._replayed.append(needs(self._spec, groups))
            for what in self._passes[1]:
                self._run(what, groups, control)
        finally:
            for device in self.devices:
                device.end()
        # Autograd must see the change, which ATen's fused kernels do not tell: it refuses a backward pass through what
        # was saved before.
        torch.autograd.graph.increment_version(found.moving)
        if self._carries:
            self._versions = self._versions_now()
        return recorded

    def _own(self, device: Backend, found: GradientSet) -> GradientSet:
        """The gradients of one device's buckets."""
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
        """Let captured graphs see the groups' values as they are now; RuntimeError for what they cannot follow."""
        wanted = needs(self._spec, groups)
        if not all(wanted <= had for had in self._replayed):
            raise RuntimeError(
                "an option changed what a step consists of (clipping or state): make a step, then capture it again"
            )
        if self._carries:
            self._see_versions()
            self._versions = self._versions_now()
        for device in self.devices:
            device.write_groups(groups)

    # Norms of weights that are carried over from one step to the next

    def weights_changed(self) -> None:
        for device in self.devices:
            device.weights_changed()

    def _see_versions(self) -> None:
        """If parameters have changed since the last step, the norms that it left are of no use."""
        if self._versions != self._versions_now():
            # A graph would forget the norms at every replay, and an eager step before the first would not.
            capture.refuse(self._layout.devices, "weights changed since the last step")
            self.weights_changed()

    def _versions_now(self) -> list[int]:
        return [version(p) for bucket in self._layout.buckets for p in bucket.params]

    def norms(self, kind: str) -> dict[Tensor, Tensor] | None:
        """By parameter, of the last step that took any: its "gradient" or "weight" norm, or its trust "ratio"."""
        found: dict[Tensor, Tensor] = {}
        for device in self.devices:
            norms = device.norms(kind)
            if norms is None:
                return None
            found.update(zip((p for bucket in device.buckets for p in bucket.params), norms, strict=True))
        return found
