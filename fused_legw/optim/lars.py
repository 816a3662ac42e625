"""LARS (You, Gitman, Ginsburg 2017) in the published variants, fused with its LEGW schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch requires it

from legw_kernels import formulas
from legw_kernels.formulas import MomentumHyper

from .. import variants
from ..backends.aten_math import AtenBatch, norms, scaled
from ..checks import check_flag, check_number, unread
from ..schedules.base import Schedule
from ..spec import Group
from ..torch_private import foreach_add
from .base import CommonOptions, FusedOptimizer
from .sgd import SGDSpec, fused_sgd

_FORMS = {
    "scaled": formulas.SCALED,
    "corrected": formulas.TORCH,
    "torch": formulas.TORCH,
    "unscaled": formulas.UNSCALED,
    "popular": formulas.POPULAR,
}
_GRAIN = 32768  # elements from which ATen starts threads
_ZERO_NORMS = {"one": formulas.ONE, "denominator": formulas.BY_DENOMINATOR, "plain": formulas.PLAIN}


class LARSSpec(SGDSpec):
    """SGD's state and options, and a trust ratio. Options that a group leaves at None come from its variant."""

    name = "lars"
    adapts = carries = True

    def check(self, group: Group) -> None:
        super().check(group)
        variants.check(variants.LARS, group, ("nothing", "no_decay", "vectors"))
        check_flag("adapt", group["adapt"])
        nesterov, dampening = group["nesterov"], group["dampening"]
        if group["variant"] in variants.PLAIN_MOMENTUM_ONLY and (nesterov or unread(dampening) or dampening != 0):
            raise ValueError(
                f"variant {group['variant']!r} defines neither nesterov nor dampening, got "
                f"nesterov={nesterov!r}, dampening={dampening!r}"
            )
        if group.get("eps") is not None:
            check_number("eps", group["eps"])

    def hyper(self, group: Group) -> MomentumHyper:
        axes = variants.axes(variants.LARS, group)
        no_decay = axes["not_adapted"] == "no_decay" and not torch.is_tensor(group["weight_decay"])
        sgd = super().hyper(group)
        return sgd._replace(
            trust_coefficient=float(axes["trust_coefficient"]),
            eps=float(axes["eps"]),
            form=_FORMS[axes["form"]],
            norm_of_sum=float(axes["denominator"] == "norm_of_sum" or axes["form"] == "popular"),
            trust_clip=float(axes["trust_clip"]),
            zero_norm=_ZERO_NORMS[axes["zero_norm"]],
            adapt=float(group["adapt"] and not (no_decay and group["weight_decay"] == 0)),
        )

    def exempts_vectors(self, group: Group) -> bool:
        return bool(variants.axes(variants.LARS, group)["not_adapted"] == "vectors")

    def needs_clipped(self, group: Group) -> bool:
        return bool(self.hyper(group).norm_of_sum)


def lars_step(batch: AtenBatch, h: MomentumHyper, lr: float) -> None:
    """LARS's `OptimizerSpec.aten`."""
    exempt = h._replace(adapt=0.0, weight_decay=0.0)
    x_norms = _norms_of_sums(batch, h) if h.norm_of_sum else batch.g_norms
    momenta = [[m] for m in batch.states[0]] or [[]] * len(batch.params)
    every = zip(batch.params, batch.grads, momenta, batch.w_norms, x_norms, strict=True)
    for p, g, m, w_norm, x_norm in every:
        own = exempt if batch.exempts_vectors and p.ndim <= 1 else h
        ratio, decay = formulas.lars_ratio(lr, w_norm, x_norm, own)
        inner, outer = formulas.lars_factors(lr, ratio, own.form)
        update = _small_sgd if p.numel() < _GRAIN else fused_sgd
        update([p], [g], m, own, outer, inner * batch.scale, inner * decay, batch.count)
        batch.ratios.append(ratio)


def _norms_of_sums(batch: AtenBatch, h: MomentumHyper) -> list[float]:
    """Norms of gradient plus weight decay; in the "popular" form, norms of the updates made of these sums."""
    sums = scaled(batch.grads, batch.scale * h.sign)
    if h.weight_decay:
        sums = list(foreach_add(sums, batch.params, alpha=h.weight_decay))
    if h.form == formulas.POPULAR and batch.states[0]:
        sums = [_direction(x, [m], h, batch.count)[0] for x, m in zip(sums, batch.states[0], strict=True)]
    return norms(sums)


def _small_sgd(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor],
    h: MomentumHyper, lr: float, factor: float, decay: float, count: int,
) -> None:  # fmt: skip
    """`fused_sgd` for one small tensor, without ATen's fused kernels, which start threads even for small ones."""
    [p], [g] = params, grads
    d = g.mul(factor * h.sign)
    if decay:
        d.add_(p, alpha=decay)
    update, moved = _direction(d, momenta, h, count)
    if momenta:
        momenta[0].copy_(moved)
    p.sub_(update, alpha=lr)


def _direction(d: Tensor, momenta: list[Tensor], h: MomentumHyper, count: int) -> tuple[Tensor, Tensor]:
    """(update without LR and trust ratio, new momentum) of d, the gradient plus weight decay."""
    m = d if count == 0 or not momenta else momenta[0].mul(h.momentum).add_(d, alpha=1 - h.dampening)
    return (d.add(m, alpha=h.momentum) if h.nesterov else m), m


class LARS(FusedOptimizer):
    """LARS: momentum SGD whose update of each tensor w with gradient g is scaled by a trust ratio.

    In the paper ratio = trust_coefficient * |w| / (|g| + weight_decay * |w|); v = momentum * v + lr * ratio * d, where
    d = g + weight_decay * w; w -= v (You, Gitman, Ginsburg 2017, arXiv 1708.03888, Algorithm 1). At the first update of
    a tensor v = lr * ratio * d, as in torch.optim.SGD. Norms are L2, in float32 or wider.

    Args:
        params: parameters, named parameters, or param groups, each of which may set any of the options below.
        lr: a number, a 1-element tensor, or a schedule, `LEGW` or `AutoWU`.
        momentum, weight_decay, dampening, nesterov, maximize: as in torch.optim.SGD.
        variant: "paper", "tensorflow", "simclr", "simclr-popular", "nvidia", "apex-larc", "rocm", "torchlars", "timm",
            "bolts", "moco" or "optax". It gives a value to every option below that is None.
        trust_coefficient, eps: as in the formula; eps is added to the denominator.
        form: where the LR enters. "scaled": as above. "torch": v = momentum * v + ratio * d; w -= lr * v. "corrected":
            NVIDIA's, equal to "torch" under every schedule. "unscaled": v = momentum * v + d; w -= lr * ratio * v.
            "popular": as "unscaled", with the ratio trust_coefficient * |w| / |update|.
        denominator: "sum_of_norms", |g| + weight_decay * |w|, or "norm_of_sum", |g + weight_decay * w|.
        trust_clip: the ratio becomes min(ratio / lr, 1).
        not_adapted: "nothing"; "no_decay": groups without weight decay get ratio 1; or "vectors": tensors of one
            dimension or none get ratio 1 and no decay.
        zero_norm: the rule if a norm is 0. "one": ratio 1. "denominator": ratio 1, but the formula holds if only g is 0
            and the denominator is not. "plain": ratio 1, no trust_clip and no decay.
        adapt: False: ratio 1 in this group; its weight decay stays.
        carry_norms: True: an update keeps the norms of the weights for the next step, whose norm pass then reads only
            gradients: 24 bytes per float32 parameter instead of 28. A step notices when other code bumps version
            counters, moves a parameter or loads a checkpoint. Call `weights_changed()` after other changes of weights,
            such as `p.data.mul_()` or `dist.broadcast(p, 0)`, and after any change before the replay of a captured
            graph. No effect on ATen.
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
    >>> from fused_legw import LARS
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LARS(model.parameters(), lr=1.0, weight_decay=1e-4, variant="timm")
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    _spec = LARSSpec(lars_step)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule,
        momentum: float = 0.9,
        weight_decay: float = 0,
        dampening: float = 0,
        nesterov: bool = False,
        *,
        variant: str = "paper",
        trust_coefficient: float | None = None,
        eps: float | None = None,
        form: str | None = None,
        denominator: str | None = None,
        trust_clip: bool | None = None,
        not_adapted: str | None = None,
        zero_norm: str | None = None,
        adapt: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        carry_norms: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=dampening,
            nesterov=nesterov,
            variant=variant,
            trust_coefficient=trust_coefficient,
            eps=eps,
            form=form,
            denominator=denominator,
            trust_clip=trust_clip,
            not_adapted=not_adapted,
            zero_norm=zero_norm,
            adapt=adapt,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, carry_norms=carry_norms, **common)
