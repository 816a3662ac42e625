"""What decides over one step as a whole: clipping, skipping, and AMP's scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Control:
    """clips: some group clips the global norm. skips: a gradient that is not finite skips the step.

    grad_scale: what the gradients are to be divided by; found_inf: skip the step if it is not 0. Both are 1-element
    tensors, torch.amp.GradScaler's, or None.
    """

    clips: bool = False
    skips: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

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
