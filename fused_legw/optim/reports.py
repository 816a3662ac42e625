"""Reports of an optimizer's last step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import OptimizerSpec
from .run import Run


class StepReports:
    """Norms, trust ratios and skipped steps, as tensors on the device. Nothing here waits for it."""

    _spec: OptimizerSpec
    _run: Run

    def _norms(self, kind: str, label: str) -> dict[Tensor, Tensor]:
        found = self._run.engine.norms(kind) if self._run.engine else None
        if found is None:
            raise RuntimeError(f"{label} are not known: {type(self).__name__} has made no step that takes them")
        return found

    def grad_norms(self) -> dict[Tensor, Tensor]:
        """Each parameter's gradient norm at the last step, before clipping and without AMP's scale.

        LARS and LAMB always compute these norms. SGD, Adam, AdamW and AdamP do with max_grad_norm, skip_nonfinite or
        `GradScaler`.

        Returns:
            A 0-dim float64 tensor on the device for each parameter; 0 if it had no gradient. Call the method again
            after the next step or replay.

        Raises:
            RuntimeError: no step has computed them.
        """
        return self._norms("gradient", "gradient norms")

    def param_norms(self) -> dict[Tensor, Tensor]:
        """Each parameter's norm before the last applied step, for LARS and LAMB, in the form of `grad_norms`.

        With carry_norms=True parameters without a gradient have one too, if it is known.

        Raises:
            RuntimeError: the optimizer takes no norms of its parameters, or no step has.
        """
        if not self._spec.adapts:
            raise RuntimeError(f"{type(self).__name__} takes no norms of its parameters: LARS and LAMB do")
        return self._norms("weight", "parameter norms")

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Each parameter's last trust ratio, for LARS and LAMB, in the form of `grad_norms`.

        Raises:
            RuntimeError: the optimizer has no trust ratios, or made no step yet.
        """
        if not self._spec.adapts:
            raise RuntimeError(f"{type(self).__name__} has no trust ratios: LARS and LAMB do")
        return self._norms("ratio", "trust ratios")

    @property
    def grad_norm(self) -> Tensor:
        """The gradients' global norm at the last step: 0-dim, float64, on the first parameter's device.

        Raises:
            RuntimeError: as `grad_norms`.
        """
        norms = list(self.grad_norms().values())
        here = [norm.to(norms[0].device, non_blocking=True) for norm in norms]
        total: Tensor = torch.linalg.vector_norm(torch.stack(here))
        return total

    @property
    def steps_skipped(self) -> Tensor:
        """The number of steps skipped because a gradient was not finite: 0-dim, int64, on the device.

        torch.amp.GradScaler, without fused=True, calls no `step` for these: then they are not counted.
        """
        devices = self._run.engine.devices if self._run.engine else []
        if devices:
            return devices[0].step_counts[1]
        return torch.tensor(max(self._run.steps_skipped.values(), default=0), dtype=torch.int64, device="cpu")
