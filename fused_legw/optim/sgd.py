"""SGD with momentum, fused with its LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch requires it

from legw_kernels.formulas import MomentumHyper

from ..backends.aten_math import AtenBatch, scaled
from ..checks import check_flag, check_scalar, unread
from ..schedules.base import Schedule
from ..spec import Group, OptimizerSpec, hyper_value
from ..torch_private import foreach_zero_, fused_sgd_
from .base import CommonOptions, FusedOptimizer


class SGDSpec(OptimizerSpec):
    """The state and options of SGD."""

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
            weight_decay=hyper_value(group["weight_decay"]),
            momentum=hyper_value(group["momentum"]),
            dampening=hyper_value(group["dampening"]),
            nesterov=float(group["nesterov"]),
            sign=-1.0 if group["maximize"] else 1.0,
        )


def sgd_step(batch: AtenBatch, h: MomentumHyper, lr: float) -> None:
    """SGD's `OptimizerSpec.aten`."""
    fused_sgd(batch.params, batch.grads, batch.states[0], h, lr, batch.scale, h.weight_decay, batch.count)


def fused_sgd(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor],
    h: MomentumHyper, lr: float, factor: float, decay: float, count: int,
) -> None:  # fmt: skip
    """ATen's SGD on the gradients factor * g + decay * w, after `count` earlier updates. decay: replaces h's."""
    dampening, first = h.dampening, count == 0
    share = factor if first else factor * (1 - dampening)
    if factor != 1 and momenta and not h.nesterov and 0 < share < math.inf and params[0].dtype == torch.float32:
        # Compute momentum * m + share * (g + decay / factor * w), which saves writing factor * g. ATen takes 1 - share,
        # which is exact if share is a float32 of at least 2^-29. Below, first scale the gradients by a power of two.
        fraction, exponent = math.frexp(share)
        if exponent < -28:
            grads, factor, exponent = scaled(grads, 2.0**exponent), factor / 2.0**exponent, 0
        dampening, decay = 1 - math.ldexp(round(fraction * 2**24), exponent - 24), decay / factor
        if first:
            foreach_zero_(momenta)
            first = False
    else:
        grads = scaled(grads, factor)
    fused_sgd_(
        params,
        grads,
        momenta,
        weight_decay=decay,
        momentum=h.momentum,
        lr=lr,
        dampening=dampening,
        nesterov=bool(h.nesterov),
        maximize=h.sign < 0,
        is_first_step=first,
    )


class SGD(FusedOptimizer):
    """Drop-in for `torch.optim.SGD`: the same arguments, defaults and results, and `lr` may be a `LEGW` schedule.

    For a parameter w with gradient g: g += weight_decay * w; m = g at the first update, later m = momentum * m +
    (1 - dampening) * g; d = g + momentum * m with nesterov, else d = m; w -= lr * d (Sutskever et al. 2013, in the
    form of torch.optim).

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor (torch's LR schedulers may drive either), or a schedule, `LEGW` or `AutoWU`:
            the step computes its LR from the number of updates applied so far.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        max_grad_norm: clip the gradients' global L2 norm at this, over all groups, dtypes and devices; None: never.
            The result is that of torch.nn.utils.clip_grad_norm_, but gradients are not written. Each group may set it.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.
        fused: True: `step` divides by the scale of torch.amp.GradScaler itself. Else ignored, as foreach is.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value; nothing has changed.

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

    _spec = SGDSpec(sgd_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
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
        **common: Unpack[CommonOptions],
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
