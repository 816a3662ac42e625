"""LAMB (You et al. 2019) in the variants people mean, fused with its LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from legw_kernels import formulas
from legw_kernels.formulas import AdamHyper

from .. import variants
from ..backends.aten_math import Flat, Tensors
from ..checks import check_flag
from ..schedules.base import Schedule
from ..spec import Group, hyper_floats
from .adam import AdamRule, fused_adam
from .base import FusedOptimizer


class LAMBRule(AdamRule):
    """Adam's, with a trust ratio."""

    name = "lamb"
    states = ("exp_avg", "exp_avg_sq")
    adapts = two_stage = True

    def check(self, group: Group) -> None:
        variants.check(variants.LAMB, group, ("nothing", "no_decay"))
        check_flag("adapt", group["adapt"])
        super().check(self._as_adams(group))

    @staticmethod
    def _as_adams(group: Group) -> Group:
        """The group with its axes filled in. "amsgrad" means nothing here, and may stand in a dict of Adam's."""
        return {**group, **variants.axes(variants.LAMB, group), "amsgrad": False}

    def complete(self, group: Group) -> None:
        super().complete(group)
        # External code, such as a weight-decay schedule, reads this as a number.
        if group["weight_decay"] is None:
            group["weight_decay"] = variants.LAMB[group["variant"]]["weight_decay"]

    def hyper(self, group: Group) -> AdamHyper:
        axes = variants.axes(variants.LAMB, group)
        kind = axes["bias_correction"]
        no_decay = axes["not_adapted"] == "no_decay" and not isinstance(group["weight_decay"], Tensor)
        adapts = bool(group["adapt"]) and not (no_decay and axes["weight_decay"] == 0)
        weight_low, weight_high = axes["weight_norm_clamp"] or (0.0, math.inf)
        ratio_low, ratio_high = axes["trust_clamp"] or (0.0, math.inf)
        adam: AdamHyper = super().hyper(self._as_adams(group))
        return adam._replace(
            bias_correction=2.0 if kind == "step_size" else float(kind),
            adapt=adapts * (2.0 if axes["weight_norm_clamp"] or axes["trust_clamp"] else 1.0),
            weight_low=float(weight_low),
            weight_high=min(float(weight_high), formulas.LARGEST_RATIO),
            ratio_low=float(ratio_low),
            ratio_high=min(float(ratio_high), formulas.LARGEST_RATIO),
        )

    def clip(self, group: Group) -> tuple[float, bool]:
        limit, _ = super().clip(self._as_adams(group))
        return limit, group["variant"] in variants.DIVIDING

    def aten(self, tensors: Tensors, lr: float, count: int, scale: float, group: Group) -> None:
        h = hyper_floats(self.hyper(group))
        correction1, correction2 = (formulas.one_minus_power(x, count + 1.0) for x in (h.log_beta1, h.log_beta2))
        *_, step = formulas.bias_factors(lr, correction1, correction2, h.bias_correction)
        updates = _updates(tensors, h, count + 1.0 if h.bias_correction == 1 else math.inf, scale)
        for p, u, w_norm, u_norm in zip(tensors.params, updates.views, tensors.w_norms, updates.norms(), strict=True):
            ratio = formulas.lamb_ratio(w_norm, u_norm, h)
            p.add_(u, alpha=step * ratio)
            tensors.ratios.append(ratio)


def _updates(tensors: Tensors, h: AdamHyper, n: float, scale: float) -> Flat:
    """Advance the moments; what is then added to the weights, but for LR and ratio."""
    params, joined, grads, updates = tensors.params, tensors.joined, tensors.gathered, tensors.scratch
    assert grads is not None and updates is not None
    if scale != 1:
        grads.whole.mul_(scale)
    if h.weight_decay and not h.decoupled:
        torch._foreach_add_(grads.views, params, alpha=h.sign * h.weight_decay)
    if not (h.weight_decay and h.decoupled):
        updates.whole.zero_()
    elif joined is not None:
        torch.mul(joined.whole, -h.weight_decay, out=updates.whole)
    else:
        for p, u in zip(params, updates.views, strict=True):
            torch.mul(p, -h.weight_decay, out=u)
    # Adam at LR 1, of what is to be added instead of what it is added to.
    fused_adam(updates.parts(tensors.whole), grads.parts(tensors.whole), tensors.states, h, 1.0, n, 0.0)
    return updates


class LAMB(FusedOptimizer):
    """LAMB: Adam whose update of each tensor is scaled by a trust ratio.

    The paper's: u = m' / (sqrt(v') + eps) + weight_decay * w with Adam's bias-corrected moments m' and v', which count
    the updates of that tensor; w -= lr * |w| / |u| * u (You et al. 2019, arXiv 1904.00962, Algorithm 2). A zero norm
    gives ratio 1. Norms are L2, in float32 or wider.

    On ATen it keeps memory for two copies of a batch: of 2^21 elements, or the largest tensor if that has more.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor, or a schedule: `LEGW` or `AutoWU`.
        betas, maximize: as in torch.optim.Adam.
        variant: whose LAMB: "paper", "author-tf", "apex", "timm", "deepspeed", "optax". It sets what follows, None
            leaving each as the variant has it, and max_grad_norm: 1.0 for "author-tf", "apex" and "timm", which
            divide gradients by max(1, norm / max_grad_norm); math.inf turns that off.
        eps, weight_decay: 1e-6 and 0.01 in the paper.
        bias_correction: True; False; or "step_size", DeepSpeed's: u of the raw moments, the LR corrected instead.
        decoupled_weight_decay: False puts weight_decay * w into the gradient.
        weight_norm_clamp, trust_clamp: (low, high) for |w| and for the ratio.
        not_adapted: "nothing"; "no_decay": groups without weight decay get ratio 1.
        adapt: False for ratio 1 in a group; its weight decay stays.
        max_grad_norm, skip_nonfinite, backend, flatten, master_weights, tile: as in every `FusedOptimizer`.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value, before anything has changed.

    >>> import torch
    >>> from fused_legw import LAMB
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LAMB(model.parameters(), lr=1e-3, variant="apex")
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> len(optimizer.trust_ratios())
    2
    """

    _rule = LAMBRule()

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
        **common: Any,
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
