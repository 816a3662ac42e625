"""A GradScaler that leaves its inf check to the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch

from ..optim.base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler`: the same arguments and results, without a pass of its own over gradients.

    torch's scaler reads every gradient and writes it, divided by the scale, before the step; with fused=True it only
    looks for values that are not finite. Under this class a fused optimizer divides during its update, and finds those
    values in the pass that also computes the norms for clipping, LARS and LAMB. After an explicit `unscale_`, and with
    other optimizers, it works as torch's.

    One thing differs: a step is also skipped at a scale that cannot be undone. That is 0, where many skipped steps end,
    or a number of which float32 cannot hold the reciprocal. torch's scaler then makes every weight NaN.

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
            super()._check_inf_per_device(optimizer)
            return self._check_scale(optimizer)
        found = optimizer._find_nonfinite()
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As in torch.amp.GradScaler."""
        super().unscale_(optimizer)
        if self.is_enabled():
            self._check_scale(optimizer)

    def _check_scale(self, optimizer: torch.optim.Optimizer) -> Any:
        """Count a scale without a finite reciprocal as an inf that was found. Waits for no device."""
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        assert self._scale is not None
        unusable = ~torch.isfinite(self._scale.double().reciprocal().float())
        for flag in found.values():
            flag.logical_or_(unusable.to(flag.device, non_blocking=True))  # not a sum: torch's fused steps ask for a 1
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As in torch.amp.GradScaler. Removes the scale from the optimizer even after an error."""
        if isinstance(optimizer, FusedOptimizer):
            optimizer._run.takes_scale = self.is_enabled()
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            if isinstance(optimizer, FusedOptimizer):
                optimizer._run.takes_scale = optimizer._run.finds_nonfinite = False
                for name in ("grad_scale", "found_inf"):
                    vars(optimizer).pop(name, None)
