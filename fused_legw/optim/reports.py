"""What an optimizer can tell of its last step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.engine import Engine
from ..spec import OptimizerSpec


class StepReports:
    """Norms, trust ratios and skipped steps: tensors on the device, whose values nothing here waits for."""

    _spec: OptimizerSpec
    _engine: Engine | None

    def _norms(self, kind: str, what: str) -> dict[Tensor, Tensor]:
        assert self._engine is not None
        found = self._engine.norms(kind)
        if found is None:
            raise RuntimeError(f"{what} are not known: {type(self).__name__} has made no step that takes them")
        return found

    def grad_norms(self) -> dict[Tensor, Tensor]:
        """Each parameter's gradient norm at the last step, before clipping, without AMP's scale; 0 where it had none.

        The norms are float64 tensors on the device, as it is now: ask again after the next step or replay. LARS and
        LAMB always take these norms. SGD, Adam, AdamW and AdamP take them with max_grad_norm, skip_nonfinite or
        `GradScaler`.

        Raises:
            RuntimeError: no step has taken them.
        """
        return self._norms("gradient", "gradient norms")

    def param_norms(self) -> dict[Tensor, Tensor]:
        """Each parameter's norm before the last applied step, of LARS and LAMB; otherwise as `grad_norms`.

        With carry_norms=True also the norms of parameters without a gradient, as far as they are known.
        """
        if not self._spec.adapts:
            raise RuntimeError(f"{type(self).__name__} takes no norms of its parameters: LARS and LAMB do")
        return self._norms("weight", "parameter norms")

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Each parameter's last trust ratio, of LARS and LAMB; otherwise as `grad_norms`."""
        if not self._spec.adapts:
            raise RuntimeError(f"{type(self).__name__} has no trust ratios: LARS and LAMB do")
        return self._norms("ratio", "trust ratios")

    @property
    def grad_norm(self) -> Tensor:
        """The gradients' global norm at the last step: 0-dim, float64, on the first parameter's device."""
        norms = list(self.grad_norms().values())
        here = [norm.to(norms[0].device, non_blocking=True) for norm in norms]
        total: Tensor = torch.linalg.vector_norm(torch.stack(here))
        return total

    @property
    def steps_skipped(self) -> Tensor:
        """How many steps changed nothing because of gradients that were not finite: 0-dim, int64, on the device."""
        devices = self._engine.devices if self._engine else []
        return devices[0].step_counts[1] if devices else torch.zeros((), dtype=torch.int64)
