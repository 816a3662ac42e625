"""AdamP (Heo et al. 2021), fused with its LEGW schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch requires it

from legw_kernels.formulas import AdamHyper, one_minus_power

from ..backends.aten_math import AtenBatch, scaled
from ..checks import check_flag, check_number
from ..schedules.base import Schedule
from ..spec import Group, hyper_value
from ..torch_private import foreach_add_, foreach_addcmul_, foreach_div_, foreach_mul, foreach_mul_, foreach_sqrt
from .adam import MomentsSpec
from .base import CommonOptions, FusedOptimizer


class AdamPSpec(MomentsSpec):
    """Adam's moments and the options of AdamP's projection."""

    name = "adamp"
    projects = True

    def check(self, group: Group) -> None:
        super().check(group)
        check_flag("nesterov", group["nesterov"])
        check_number("delta", group["delta"])
        check_number("wd_ratio", group["wd_ratio"])

    def needs_clipped(self, group: Group) -> bool:
        return True  # the projected update must come from clipped gradients

    def hyper(self, group: Group) -> AdamHyper:
        delta, wd_ratio = hyper_value(group["delta"]), hyper_value(group["wd_ratio"])
        return super().hyper(group)._replace(nesterov=float(group["nesterov"]), delta=delta, wd_ratio=wd_ratio)


def adamp_step(batch: AtenBatch, h: AdamHyper, lr: float) -> None:
    """AdamP's `OptimizerSpec.aten`."""
    correction1, correction2 = (one_minus_power(x, batch.count + 1.0) for x in (h.log_beta1, h.log_beta2))
    grads, (m, v) = scaled(batch.grads, batch.scale * h.sign), batch.states
    foreach_mul_(m, h.beta1)
    foreach_add_(m, grads, alpha=1 - h.beta1)
    foreach_mul_(v, h.beta2)
    foreach_addcmul_(v, grads, grads, value=1 - h.beta2)
    below = foreach_sqrt(v)
    foreach_div_(below, math.sqrt(correction2))
    foreach_add_(below, h.eps)
    updates = foreach_mul(m, h.beta1 if h.nesterov else 1.0)
    if h.nesterov:
        foreach_add_(updates, grads, alpha=1 - h.beta1)
    foreach_div_(updates, below)
    for p, g, u in zip(batch.params, grads, updates, strict=True):
        decay = h.weight_decay * _project(p, g, u, h)
        if decay:
            p.mul_(1 - lr * decay)
        p.add_(u, alpha=-lr / correction1)


def _project(p: Tensor, g: Tensor, u: Tensor, h: AdamHyper) -> float:
    """Project u off the weight, in place, if the gradient is tangent to it. Returns the factor on weight decay."""
    if p.ndim < 2 or p.numel() == 0:
        return 1.0
    w, g, rows = (x.as_strided((len(p), p.numel() // len(p)), (p.numel() // len(p), 1)) for x in (p, g, u))
    sums = torch.stack([(x * y).sum(1, dtype=torch.float64) for x, y in ((g, w), (g, g), (w, w), (w, rows))])
    for gw, gg, ww, wu in (sums, sums.sum(1, keepdim=True)):
        cosines = gw.abs() / (gg.sqrt().clamp(min=h.eps) * ww.sqrt().clamp(min=h.eps))
        if (cosines < h.delta / math.sqrt(p.numel() // len(gw))).all():
            rows.addcmul_(w, (wu / (ww.sqrt() + h.eps).square()).to(w.dtype)[:, None], value=-1)
            return h.wd_ratio
    return 1.0


class AdamP(FusedOptimizer):
    """AdamP: Adam whose update is projected off the weight if the weight seems to be scale-invariant.

    Let m' and v' be Adam's bias-corrected moments of a tensor, and u = m' / (sqrt(v') + eps). A tensor of two or more
    dimensions is viewed by rows, one row w_i for each index of its first dimension, and then as a single row. If
    |cos(g_i, w_i)| < delta / sqrt(row length) for every row of a view, the gradient counts as tangent to the weight:
    then u_i -= n_i * <n_i, u_i>, where n_i = w_i / (|w_i| + eps), and weight decay is multiplied by wd_ratio. Only the
    first such view is used. Finally w *= 1 - lr * weight_decay and w -= lr * u (Heo et al. 2021, arXiv 2006.08217,
    Algorithm 2 and equation 12; details as in the authors' package `adamp`). The cosine is taken of clipped gradients,
    with norms of at least eps.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below. In
            a tensor of two or more dimensions the slices along the first must be contiguous, as in channels_last.
        lr: a number, a 1-element tensor, or a schedule: `LEGW` or `AutoWU`.
        betas, eps, maximize: as in torch.optim.Adam.
        weight_decay: decoupled weight decay, as in torch.optim.AdamW.
        delta: the threshold of the cosine; 0 for no projection.
        wd_ratio: the factor on the weight decay of a projected tensor.
        nesterov: True: beta1 * m' + (1 - beta1) * g / (1 - beta1^n) takes the place of m', at the n-th update.
        max_grad_norm: clip the gradients' global L2 norm at this, over all groups, dtypes and devices; None: never.
            The result is that of torch.nn.utils.clip_grad_norm_, but gradients are not written. Each group may set it.
        skip_nonfinite: True: skip a step if a gradient is not finite. It changes nothing and does not count.
        backend: "triton", "aten", or None for Triton on GPUs and ATen elsewhere.
        flatten: True: parameters live in one flat buffer per device and dtype. False: they stay where they are.
        master_weights: True: keep float32 masters of float16 and bfloat16 parameters. State is float32 either way.
        tile: elements that a Triton program updates at a time, a power of two, 16 or more. State is padded to it.

    Raises:
        ValueError, TypeError: naming the argument or parameter and its value; nothing has changed.

    >>> import torch
    >>> from fused_legw import AdamP
    >>> w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> w.grad = torch.tensor([[4.0, -3.0]])  # at right angles to w
    >>> AdamP([w], lr=0.1).step()
    >>> [round(x, 3) for x in w[0].tolist()]  # Adam's update is (1, -1); what is left of it is at right angles to w too
    [2.888, 4.084]
    """

    _spec = AdamPSpec(adamp_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            delta=delta,
            wd_ratio=wd_ratio,
            nesterov=nesterov,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **common)
