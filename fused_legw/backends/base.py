"""The interface of backends, which run one device's part of a step. `triton` and `aten` implement it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..buffers.bucket import Bucket
from ..buffers.gradients import GradientSet
from ..spec import Group
from .passes import Pass

_SMALLEST_SCALE = 1 / torch.finfo(torch.float32).max  # of which float32 can hold the reciprocal


@dataclass(frozen=True)
class StepControl:
    """The settings of one step as a whole: clipping, skipping, and AMP's scale."""

    clips: bool = False  # some group clips the global norm
    skips: bool = False  # a gradient that is not finite skips the step
    counts_step: bool = True  # the step counts as applied
    # 1 element, from torch.amp.GradScaler: gradients must be divided by it. A step is skipped if float32 lacks 1 / it.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None  # 1 element, from torch.amp.GradScaler: skip the step if it is not 0

    @property
    def global_norm(self) -> bool:
        """Whether the step must see every gradient before it updates anything."""
        return self.clips or self.skips

    @property
    def inverse_scale(self) -> float:
        """The factor that undoes `grad_scale`, as a float; infinite or NaN if float32 has none. Reads the device."""
        if self.grad_scale is None:
            return 1.0
        scale = float(self.grad_scale)
        return math.inf if abs(scale) < _SMALLEST_SCALE else 1.0 / scale

    @staticmethod
    def on(device: torch.device, value: Tensor | None) -> Tensor | None:
        """The value as a float32 tensor on the device, without waiting for it."""
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
        """Begin a step.

        found: the gradients of this backend's buckets.
        others: the number of other devices in the step.
        options: the options' generation, a number that grows whenever an option of any group changes.
        """
        raise NotImplementedError

    def run(self, what: Pass, groups: Sequence[Group], control: StepControl) -> None:
        """Run one pass of the step that has begun."""
        raise NotImplementedError

    def end(self) -> None:
        """End the step, even a failed one, and release its gradients."""

    def global_norm(self) -> Tensor:
        """The norm of this device's gradients, float64, 0-dim."""
        raise NotImplementedError

    def take_norms(self, others: Sequence[Tensor]) -> None:
        """Take the global norms of the other devices."""
        raise NotImplementedError

    def norms(self, kind: str) -> list[Tensor] | None:
        """The "gradient" norm, the "weight" norm or the trust "ratio" of each tensor, bucket by bucket.

        None before the first step that computes them.
        """
        raise NotImplementedError

    def write_groups(self, groups: Sequence[Group]) -> None:
        """Pass the groups' current values to captured graphs. Does nothing if every step reads the groups."""

    def weights_changed(self) -> None:
        """Compute the norms of weights anew in the next step. Does nothing if every step computes them."""
