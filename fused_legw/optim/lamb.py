"""LAMB (You et al. 2019) in the published variants, fused with its LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch requires it

from legw_kernels import formulas
from legw_kernels.formulas import AdamHyper

from .. import variants
from ..backends.aten_math import AtenBatch, Joined
from ..checks import check_flag
from ..schedules.base import Schedule
from ..spec import Group
from ..torch_private import foreach_add_
from .adam import MomentsSpec, fused_adam
from .base import CommonOptions, FusedOptimizer


class LAMBSpec(MomentsSpec):
    """Adam's moments and a trust ratio. Options that a group leaves at None come from its variant."""

    name = "lamb"
    adapts = two_stage = True

    def check(self, group: Group) -> None:
        variants.check(variants.LAMB, group, ("nothing", "no_decay"))
        check_flag("adapt", group["adapt"])
        filled = group | variants.axes(variants.LAMB, group)
        super().check(filled)
        check_flag("decoupled_weight_decay", filled["decoupled_weight_decay"])

    def complete(self, group: Group) -> None:
        super().complete(group)
        # Filled in, because other code, such as a weight-decay schedule, reads a number here.
        if group["weight_decay"] is None:
            group["weight_decay"] = variants.LAMB[group["variant"]]["weight_decay"]

    def hyper(self, group: Group) -> AdamHyper:
        axes = variants.axes(variants.LAMB, group)
        kind = axes["bias_correction"]
        no_decay = axes["not_adapted"] == "no_decay" and not isinstance(group["weight_decay"], Tensor)
        adapts = bool(group["adapt"]) and not (no_decay and axes["weight_decay"] == 0)
        weight_low, weight_high = axes["weight_norm_clamp"] or (0.0, math.inf)
        ratio_low, ratio_high = axes["trust_clamp"] or (0.0, math.inf)
        return (
            super()
            .hyper(group | axes)
            ._replace(
                decoupled=float(axes["decoupled_weight_decay"]),
                bias_correction=2.0 if kind == "step_size" else float(kind),
                adapt=adapts * (2.0 if axes["weight_norm_clamp"] or axes["trust_clamp"] else 1.0),
                weight_low=float(weight_low),
                weight_high=min(float(weight_high), formulas.LARGEST_RATIO),
                ratio_low=float(ratio_low),
                ratio_high=min(float(ratio_high), formulas.LARGEST_RATIO),
            )
        )

    def clip(self, group: Group) -> tuple[float, bool]:
        limit, _ = super().clip(group | variants.axes(variants.LAMB, group))
        return limit, group["variant"] in variants.DIVIDING


def lamb_step(batch: AtenBatch, h: AdamHyper, lr: float) -> None:
    """LAMB's `OptimizerSpec.aten`."""
    n = batch.count + 1.0
    correction1, correction2 = (formulas.one_minus_power(x, n) for x in (h.log_beta1, h.log_beta2))
    *_, step = formulas.bias_factors(lr, correction1, correction2, h.bias_correction)
    updates = _updates(batch, h, n if h.bias_correction == 1 else math.inf)
    for p, u, w_norm, u_norm in zip(batch.params, updates.views, batch.w_norms, updates.norms(), strict=True):
        ratio = formulas.lamb_ratio(w_norm, u_norm, h)
        p.add_(u, alpha=step * ratio)
        batch.ratios.append(ratio)


def _updates(batch: AtenBatch, h: AdamHyper, n: float) -> Joined:
    """Advance the moments. Returns the updates without LR and trust ratio; they are to be added to the weights."""
    params, joined, grads, updates = batch.params, batch.joined, batch.gathered, batch.scratch
    assert grads is not None and updates is not None
    if batch.scale != 1:
        grads.whole.mul_(batch.scale)
    if h.weight_decay and not h.decoupled:
        foreach_add_(grads.views, params, alpha=h.sign * h.weight_decay)
    if not (h.weight_decay and h.decoupled):
        updates.whole.zero_()
    elif joined is not None:
        torch.mul(joined.whole, -h.weight_decay, out=updates.whole)
    else:
        for p, u in zip(params, updates.views, strict=True):
            torch.mul(p, -h.weight_decay, out=u)
    # Adam at LR 1 on `updates` in place of the weights.
    fused_adam(updates.parts(batch.whole), grads.parts(batch.whole), batch.states, h, 1.0, n, 0.0)
    return updates


class LAMB(FusedOptimizer):
    """LAMB: Adam whose update of each tensor is scaled by a trust ratio.

    In the paper u = m' / (sqrt(v') + eps) + weight_decay * w, where m' and v' are Adam's bias-corrected moments of a
    tensor w, and w -= lr * |w| / |u| * u (You et al. 2019, arXiv 1904.00962, Algorithm 2). The trust ratio |w| / |u|
    is 1 if a norm is 0. Norms are L2, in float32 or wider.

    The ATen backend keeps two extra buffers of up to 2^21 elements each, or of the largest tensor if that is larger.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor, or a schedule, `LEGW` or `AutoWU`.
        betas, maximize: as in torch.optim.Adam.
        variant: "paper", "author-tf", "apex", "timm", "deepspeed" or "optax". It gives a value to every option below
            that is None.
        eps, weight_decay: 1e-6 and 0.01 in the paper.
        bias_correction: True; False; or "step_size", as in DeepSpeed: u of the raw moments, and a corrected LR.
        decoupled_weight_decay: False puts weight_decay * w into the gradient.
        weight_norm_clamp, trust_clamp: (low, high) limits for |w| and for the trust ratio.
        not_adapted: "nothing"; or "no_decay": groups without weight decay get trust ratio 1.
        adapt: False: trust ratio 1 in this group; its weight decay stays.
        max_grad_norm: clip the gradients' global L2 norm at this, over all groups, dtypes and devices. The
            variants "author-tf", "apex" and "timm" have the default 1.0 and divide gradients by
            max(1, norm / max_grad_norm); math.inf turns that off. The others do not clip unless it is set, and then
            as torch.nn.utils.clip_grad_norm_ does.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value; nothing has changed.

    >>> import torch
    >>> from fused_legw import LAMB
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LAMB(model.parameters(), lr=1e-3, variant="apex")
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> len(optimizer.trust_ratios())
    2
    """

    _spec = LAMBSpec(lamb_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        variant: str = "paper",
        bias_correction: bool | str | None = None,
        decoupled_weight_decay: bool | None = None,
        weight_norm_clamp: tuple[float, float] | None = None,
        trust_clamp: tuple[float, float] | None = None,
        not_adapted: str | None = None,
        adapt: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            variant=variant,
            bias_correction=bias_correction,
            decoupled_weight_decay=decoupled_weight_decay,
            weight_norm_clamp=weight_norm_clamp,
            trust_clamp=trust_clamp,
            not_adapted=not_adapted,
            adapt=adapt,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **common)
