"""SGD with momentum, fused with its LEGW schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .optimizer import FusedOptimizer
from .rule import Group, Rule
from .schedule import LEGW


def _check_not_negative(name: str, value: Any) -> None:
    try:
        valid = bool(value >= 0.0)
    except TypeError as error:
        raise TypeError(f"Invalid {name}: {value!r}") from error
    if not valid:
        raise ValueError(f"Invalid {name}: {value}")


class SGDRule(Rule):
    """SGD's one state, and what its options mean."""

    name = "sgd"
    states = ("momentum_buffer",)

    def check(self, group: Group) -> None:
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not isinstance(lr, LEGW):
            _check_not_negative("learning rate", lr)
        _check_not_negative("momentum value", momentum)
        _check_not_negative("weight_decay value", weight_decay)
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def used_states(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def hyper(self, group: Group) -> tuple[float, ...]:
        flags = float(group["nesterov"]), -1.0 if group["maximize"] else 1.0
        return (float(group["weight_decay"]), float(group["momentum"]), float(group["dampening"]), *flags)

    def aten(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        lr: float,
        group: Group,
        first: bool,
    ) -> None:
        torch._fused_sgd_(
            params,
            grads,
            states[0] if states else [],
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            lr=lr,
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            is_first_step=first,
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
        foreach, fused: accepted and ignored, but not both. differentiable: must be False.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: let parameters live in one flat buffer per (device, dtype) (True), or where they are.
        master_weights: keep float32 masters of float16 and bfloat16 parameters; state is float32 either way.
        tile: elements a Triton program updates at a time, a power of two; state is padded to it, per tensor.

    In a group that follows a schedule, `param_groups[i]["schedule"]` holds it and can be replaced; ["lr"] and
    ["steps_applied"] show the LR of the last step and the updates that the host knows of. Writing to that "lr" is an
    error at the next step, but for 0: then state is made for the group's tensors, which do not move, and if all
    scheduled groups are so written the step does not count (torch.distributed.checkpoint does that, and writes back).

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
        backend: str | None = None,
        flatten: bool = True,
        master_weights: bool = True,
        tile: int = 1024,
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
        )
        super().__init__(params, defaults, backend=backend, flatten=flatten, master_weights=master_weights, tile=tile)
