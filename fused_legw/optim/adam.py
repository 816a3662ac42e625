"""Adam and AdamW, fused with their LEGW schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch requires it

from legw_kernels.formulas import AdamHyper

from ..backends.aten_math import AtenBatch, scaled
from ..checks import check_flag, check_pair, check_scalar, plain
from ..schedules.base import Schedule
from ..spec import Group, OptimizerSpec, hyper_log, hyper_value
from ..torch_private import fused_adam_, fused_adamw_
from .base import CommonOptions, FusedOptimizer


class MomentsSpec(OptimizerSpec):
    """Two moments and a count of updates per tensor, shared by Adam, AdamP and LAMB."""

    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def check(self, group: Group) -> None:
        super().check(group)
        check_scalar("eps", group["eps"], "epsilon value")
        for i, beta in enumerate(check_pair("betas", group["betas"])):
            check_scalar(f"betas[{i}]", beta, f"beta parameter at index {i}", below=1.0)

    def check_made(self, group: Group) -> None:
        super().check_made(group)
        betas = plain(tuple(group["betas"]))
        if not (all(isinstance(b, float) for b in betas) or all(isinstance(b, Tensor) for b in betas)):
            raise ValueError("betas must be either both floats or both Tensors")
        if group.get("foreach") and not group.get("capturable"):
            for name, value in (("lr", group["lr"]), ("betas[0]", betas[0])):
                if isinstance(value, Tensor):
                    raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")

    def complete(self, group: Group) -> None:
        group["betas"] = plain(tuple(group["betas"]))

    def used_states(self, group: Group) -> tuple[str, ...]:
        return self.states

    def hyper(self, group: Group) -> AdamHyper:
        """The common hyper-parameters, with decoupled weight decay."""
        return AdamHyper(
            weight_decay=hyper_value(group["weight_decay"]),
            beta1=hyper_value(group["betas"][0]),
            beta2=hyper_value(group["betas"][1]),
            log_beta1=hyper_log(group["betas"][0]),
            log_beta2=hyper_log(group["betas"][1]),
            eps=hyper_value(group["eps"]),
            decoupled=1.0,
            sign=-1.0 if group["maximize"] else 1.0,
        )


class AdamSpec(MomentsSpec):
    """The state and options of Adam and AdamW: amsgrad, and where weight decay enters."""

    name = "adam"
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def check(self, group: Group) -> None:
        super().check(group)
        check_flag("amsgrad", group["amsgrad"])
        check_flag("decoupled_weight_decay", group["decoupled_weight_decay"])

    def used_states(self, group: Group) -> tuple[str, ...]:
        return self.states if group["amsgrad"] else self.states[:2]

    def needed_states(self, group: Group) -> tuple[str, ...]:
        return self.states[:2]  # the maximum starts at 0, also where amsgrad is turned on later

    def hyper(self, group: Group) -> AdamHyper:
        own = dict(amsgrad=float(group["amsgrad"]), decoupled=float(group["decoupled_weight_decay"]))
        return super().hyper(group)._replace(**own)


def adam_step(batch: AtenBatch, h: AdamHyper, lr: float) -> None:
    """Adam's and AdamW's `OptimizerSpec.aten`."""
    grads = scaled(batch.grads, batch.scale)
    fused_adam(batch.params, grads, batch.states, h, lr, batch.count + 1.0, h.weight_decay)


def fused_adam(
    params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]],
    h: AdamHyper, lr: float, n: float, decay: float,
) -> None:  # fmt: skip
    """ATen's n-th Adam update; an infinite n means no bias correction. decay: replaces h's weight decay."""
    step = fused_adamw_ if h.decoupled else fused_adam_
    step(
        params,
        grads,
        states[0],
        states[1],
        states[2] if h.amsgrad else [],
        [torch.full((), n, dtype=torch.float32, device=params[0].device)] * len(params),  # ATen only reads it
        lr=lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=decay,
        eps=h.eps,
        amsgrad=bool(h.amsgrad),
        maximize=h.sign < 0,
    )


class Adam(FusedOptimizer):
    """Drop-in for `torch.optim.Adam`: the same arguments, defaults and results, and `lr` may be a `LEGW` schedule.

    For a parameter w with gradient g at its n-th update: m = beta1 * m + (1 - beta1) * g; v = beta2 * v +
    (1 - beta2) * g^2; w -= lr / (1 - beta1^n) * m / (sqrt(v / (1 - beta2^n)) + eps) (Kingma and Ba 2015, Algorithm 1,
    in the form of torch.optim). Each parameter has its own n.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor (torch's LR schedulers may drive either), or a schedule, `LEGW` or `AutoWU`.
        betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch.optim.Adam.
        max_grad_norm: clip the gradients' global L2 norm at this, over all groups, dtypes and devices; None: never.
            The result is that of torch.nn.utils.clip_grad_norm_, but gradients are not written. Each group may set it.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.
        fused: True: `step` divides by the scale of torch.amp.GradScaler itself. Else ignored, as foreach is.
        capturable: ignored, but with foreach=True a tensor lr or betas need it, as in torch.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value; nothing has changed.

    >>> import torch
    >>> from fused_legw import Adam
    >>> w = torch.ones(3, requires_grad=True)
    >>> w.grad = torch.ones(3)
    >>> optimizer = Adam([w], lr=0.25)
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()], optimizer.state[w]["step"]
    ([0.75, 0.75, 0.75], tensor(1.))
    """

    _spec = AdamSpec(adam_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **common)


class AdamW(Adam):
    """Drop-in for `torch.optim.AdamW`: `Adam` with decoupled weight decay, and `lr` may be a `LEGW` schedule.

    Before the update w *= 1 - lr * weight_decay; the gradient has no decay (Loshchilov and Hutter 2019). The default
    weight_decay is that of torch.optim.AdamW.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor (torch's LR schedulers may drive either), or a schedule, `LEGW` or `AutoWU`.
        betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        decoupled_weight_decay: False: weight decay in the gradient, as in `Adam`.
        max_grad_norm: clip the gradients' global L2 norm at this, over all groups, dtypes and devices; None: never.
            The result is that of torch.nn.utils.clip_grad_norm_, but gradients are not written. Each group may set it.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.
        fused: True: `step` divides by the scale of torch.amp.GradScaler itself. Else ignored, as foreach is.
        capturable: ignored, but with foreach=True a tensor lr or betas need it, as in torch.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value; nothing has changed.

    >>> import torch
    >>> from fused_legw import AdamW
    >>> w = torch.ones(3, requires_grad=True)
    >>> w.grad = torch.zeros(3)
    >>> AdamW([w], lr=0.5, weight_decay=0.1).step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.95, 0.95, 0.95]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        max_grad_norm: float | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            max_grad_norm=max_grad_norm,
            **common,
        )
