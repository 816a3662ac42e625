"""A GradScaler that leaves its inf check to the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch

from ..optim.base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler`: the same arguments and results, without a pass of its own over gradients.

    A fused optimizer divides by the scale during its update. torch's scaler still reads and writes every gradient
    before that, to find values that are not finite. With this class the step finds them, in the pass that also computes
    the norms for clipping, LARS and LAMB. After an explicit `unscale_`, and with other optimizers, it works as torch's.

    >>> import torch
    >>> from fused_legw import SGD, GradScaler
    >>> w = torch.ones(3, requires_grad=True)
    >>> optimizer, scaler = SGD([w], lr=0.5, max_grad_norm=1e9), GradScaler("cpu")
    >>> scaler.scale(w.sum()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> w.tolist()
    [0.5, 0.5, 0.5]
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> Any:
        if not isinstance(optimizer, FusedOptimizer):
            return super()._check_inf_per_device(optimizer)
        found = optimizer._find_nonfinite()
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As in torch.amp.GradScaler. Removes the scale from the optimizer even after an error."""
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            if isinstance(optimizer, FusedOptimizer):
                optimizer._finds_nonfinite = False
                for name in ("grad_scale", "found_inf"):
                    vars(optimizer).pop(name, None)
