"""Reference optimizers: what the fused ones must equal, one tensor at a time, written to be read.

They are ordinary torch optimizers in any floating dtype; in float64 they are the oracle of the tests and of
`fused_legw.verify`. They share nothing with the fused path but the schedule's scalar formulas: no flat buffers, no
launches, so a packing bug cannot hide here. Each takes its fused twin's arguments; those that say only how the fused
one is laid out (backend, flatten, tile, ...) are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .schedule import LEGW

LAYOUT = frozenset({"foreach", "fused", "differentiable", "backend", "flatten", "master_weights", "tile"})


def _check_layout(layout: dict[str, Any]) -> None:
    unknown = sorted(layout.keys() - LAYOUT)
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}")


class SGD(torch.optim.Optimizer):
    """torch.optim.SGD, for-loop form, with `lr` a number, a 1-element tensor or a LEGW schedule.

    For a parameter w with gradient g: g += weight_decay * w; m = g at the first update, then momentum * m +
    (1 - dampening) * g; d = g + momentum * m with nesterov, else m; w -= lr * d.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | LEGW = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **layout: Any,
    ) -> None:
        _check_layout(layout)
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        super().__init__(params, defaults)
        self.steps_applied = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the schedule's t is the number of earlier ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = False
        for group in self.param_groups:
            lr = group["lr"]
            lr = lr(self.steps_applied) if isinstance(lr, LEGW) else float(lr)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, -p.grad if group["maximize"] else p.grad, lr, group)
                    moved = True
        self.steps_applied += moved
        return loss

    def _update(self, p: Tensor, g: Tensor, lr: float, group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        if group["weight_decay"] != 0:
            g = g + group["weight_decay"] * p
        if momentum != 0:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = g.clone()
            else:
                state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * g
            g = g + momentum * state["momentum_buffer"] if group["nesterov"] else state["momentum_buffer"]
        p -= lr * g
