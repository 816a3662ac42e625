"""What a backend is: one device's part of a step. Its two implementations are `triton` and `aten`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..buffers.bucket import Bucket
from ..buffers.gradients import GradientSet
from ..spec import Group
from .passes import Pass


@dataclass(frozen=True)
class StepControl:
    """What decides over one step as a whole: clipping, skipping, and AMP's scale."""

    clips: bool = False  # some group clips the global norm
    skips: bool = False  # a gradient that is not finite skips the step
    counts_step: bool = True  # the step counts as applied
    grad_scale: Tensor | None = None  # torch.amp.GradScaler's: what gradients are to be divided by, 1 element
    found_inf: Tensor | None = None  # its inf check: skip the step if it is not 0, 1 element

    @property
    def global_norm(self) -> bool:
        """Whether the step must see every gradient before it updates anything."""
        return self.clips or self.skips

    @property
    def inverse_scale(self) -> float:
        """For the host: reads the device."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @staticmethod
    def on(device: torch.device, value: Tensor | None) -> Tensor | None:
        """A float32 tensor of one element on the device, without waiting for it."""
        return None if value is None else value.to(device, torch.float32, non_blocking=True)


class Backend:
    """The passes of a step over the buckets of one device."""

    name: str
    counts_on_host = False  # whether reading `step_counts` waits for no device
    captured: bool = False  # whether a graph may still replay a step of this object

    device: torch.device
    buckets: Sequence[Bucket]
    step_counts: Tensor  # int64[2]: updates applied, the schedule's t; steps skipped
    nonfinite: Tensor  # float32[1]: whether the last step found a gradient that is not finite

    def begin(
        self, groups: Sequence[Group], found: GradientSet, control: StepControl, *, others: int, options: int
    ) -> None:  # fmt: skip
        """Take what one step works on.

        found: the gradients of this backend's buckets. others: how many other devices take part. options: grows by one
        whenever an option of any group changes.
        """
        raise NotImplementedError

    def run(self, what: Pass, groups: Sequence[Group], control: StepControl) -> None:
        """One pass of the step that has begun."""
        raise NotImplementedError

    def end(self) -> None:
        """Let go of what the step worked on, also where it failed."""

    def global_norm(self) -> Tensor:
        """The norm of this device's gradients, float64, 0-dim."""
        raise NotImplementedError

    def take_norms(self, others: Sequence[Tensor]) -> None:
        """The global norms of the other devices."""
        raise NotImplementedError

    def norms(self, kind: str) -> list[Tensor] | None:
        """One kind of norm of each tensor, bucket by bucket: "gradient", "weight", or the trust "ratio".

        None before any were taken.
        """
        raise NotImplementedError

    def write_groups(self, groups: Sequence[Group]) -> None:
        """Let captured graphs see the groups' values as they are now. Nothing where every step reads the groups."""

    def weights_changed(self) -> None:
        """Take the norms of weights anew in the next step. Nothing where every step does."""
