"""SGD with momentum, fused with its LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from legw_kernels.scalars import MomentumHyper

from .checks import check_flag, check_scalar, unread
from .optimizer import FusedOptimizer
from .rule import Group, Rule, Tensors, number, scaled
from .schedule import LEGW


class SGDRule(Rule):
    """SGD's one state, and what its options mean."""

    name = "sgd"
    states = ("momentum_buffer",)

    def check(self, group: Group) -> None:
        super().check(group)
        check_scalar("momentum", group["momentum"], "momentum value")
        check_scalar("dampening", group["dampening"], low=-math.inf)
        check_flag("nesterov", group["nesterov"])

    def check_made(self, group: Group) -> None:
        super().check_made(group)
        momentum, dampening = group["momentum"], group["dampening"]
        if group["nesterov"] and not (unread(momentum) or (momentum > 0 and (unread(dampening) or dampening == 0))):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def used_states(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if isinstance(group["momentum"], Tensor) or group["momentum"] != 0 else ()

    def hyper(self, group: Group) -> MomentumHyper:
        return MomentumHyper(
            weight_decay=number(group["weight_decay"]),
            momentum=number(group["momentum"]),
            dampening=number(group["dampening"]),
            nesterov=float(group["nesterov"]),
            sign=-1.0 if group["maximize"] else 1.0,
        )

    def aten(self, tensors: Tensors, lr: float, count: int, scale: float, group: Group) -> None:
        torch._fused_sgd_(
            tensors.params,
            scaled(tensors.grads, scale),
            tensors.states[0],
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            lr=lr,
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            is_first_step=count == 0,
        )


class SGD(FusedOptimizer):
    """Drop-in for `torch.optim.SGD`: the same arguments, defaults and results, and `lr` may be a `LEGW` schedule.

    For a parameter w with gradient g: g += weight_decay * w; m = g at the first update, then momentum * m +
    (1 - dampening) * g; d = g + momentum * m with nesterov, else m; w -= lr * d (Sutskever et al. 2013, as
    torch has it).

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor (driven by torch's LR schedulers as usual), or a `LEGW` schedule, whose LR the
            step works out itself from the number of updates applied so far.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        max_grad_norm, skip_nonfinite, backend, flatten, master_weights, tile: as in every `FusedOptimizer`.
        foreach, fused: accepted and ignored, but not both. differentiable: must be False.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value, before anything has changed.

    >>> import torch
    >>> from fused_legw import LEGW, SGD
    >>> model = torch.nn.Linear(4, 2)
    >>> schedule = LEGW(0.1, 16, 0.5, batch_size=512, dataset_size=1280)
    >>> optimizer = SGD(model.parameters(), lr=schedule, momentum=0.9)
    >>> model(torch.ones(512, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.steps_applied, optimizer.get_last_lr() == [schedule(0)]
    (1, True)
    """

    _rule = SGDRule()

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
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        **common: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **common)
