"""Reference optimizers, one tensor at a time, written to be read. The fused optimizers must equal them.

They are ordinary torch optimizers in any floating dtype. In float64 the tests and `fused_legw.verify` compare the fused
optimizers with them. They share only the schedule's scalar formulas with the fused path, so a bug in its flat buffers
or launches cannot occur here too. Each takes the arguments of its fused twin, and ignores those about layout, such as
backend, flatten and tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import variants
from .schedules.base import Schedule

LAYOUT = frozenset(
    {"foreach", "fused", "differentiable", "capturable", "backend", "flatten", "master_weights", "carry_norms", "tile"}
)
Group = dict[str, Any]


class _Reference(torch.optim.Optimizer):
    """The step that all classes share: each group's LR at update t, clipping by global norm, and skipping."""

    def __init__(self, params: Iterable[Any], defaults: Group, *, skip_nonfinite: bool = False, **layout: Any) -> None:
        unknown = sorted(layout.keys() - LAYOUT)
        if unknown:
            raise TypeError(f"unexpected argument {unknown[0]!r}")
        super().__init__(params, defaults)
        self.skip_nonfinite = skip_nonfinite
        self.steps_applied = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. The schedule's t is the number of earlier updates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = math.hypot(*(float(torch.linalg.vector_norm(g.double())) for g in gradients))
        if not gradients or (self.skip_nonfinite and not math.isfinite(norm)):
            return loss
        for group in self.param_groups:
            lr = group["lr"]
            lr = lr(self.steps_applied) * group.get("lr_scale", 1.0) if isinstance(lr, Schedule) else float(lr)
            clip = self._clip(norm, group)
            for p in group["params"]:
                if p.grad is not None:
                    sign = -1 if group["maximize"] else 1
                    self._update(p, sign * clip * p.grad, lr, group)
        self.steps_applied += 1
        return loss

    def _clip(self, norm: float, group: Group) -> float:
        """The factor by which clipping scales this group's gradients, as in torch.nn.utils.clip_grad_norm_."""
        limit = group["max_grad_norm"]
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        raise NotImplementedError


class SGD(_Reference):
    """torch.optim.SGD, with `lr` a number, a 1-element tensor or a schedule.

    For a parameter w with gradient g: g += weight_decay * w; m = g at the first update, later m = momentum * m +
    (1 - dampening) * g; d = g + momentum * m with nesterov, else d = m; w -= lr * d.
    """

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
        max_grad_norm: float | None = None,
        **layout: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **layout)

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        if group["weight_decay"] != 0:
            g = g + group["weight_decay"] * p
        p -= lr * self._momentum(p, g, group)

    def _momentum(self, p: Tensor, g: Tensor, group: Group) -> Tensor:
        """Add g to the momentum buffer. Returns the update without LR."""
        momentum = group["momentum"]
        if momentum == 0:
            return g
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = g.clone()
        else:
            state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * g
        buffer: Tensor = state["momentum_buffer"]
        return g + momentum * buffer if group["nesterov"] else buffer


class LARS(SGD):
    """LARS. `fused_legw.LARS` gives the formulas and options."""

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
        adapt: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        axes = {name: options.pop(name, None) for name in variants.LARS["paper"]}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
                         max_grad_norm=max_grad_norm, **options)  # fmt: skip
        for group in self.param_groups:
            for name, value in {**axes, "variant": variant, "adapt": adapt}.items():
                group.setdefault(name, value)

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        axes = variants.axes(variants.LARS, group)
        decay, adapt = group["weight_decay"], group["adapt"]
        if axes["not_adapted"] == "vectors" and p.ndim <= 1:
            decay, adapt = 0, False
        if axes["not_adapted"] == "no_decay" and decay == 0:
            adapt = False
        ratio, decay = self._trust(p, g, lr, decay, axes, group) if adapt else (1.0, decay)
        d = g + decay * p if decay else g
        if axes["form"] == "scaled":
            p -= self._momentum(p, lr * ratio * d, group)
        elif axes["form"] in ("torch", "corrected"):
            p -= lr * self._momentum(p, ratio * d, group)
        else:
            p -= lr * ratio * self._momentum(p, d, group)

    def _trust(self, p: Tensor, g: Tensor, lr: float, decay: float, axes: Group, group: Group) -> tuple[float, float]:
        """(trust ratio, weight decay) of one tensor."""
        w_norm, x_norm = _norm(p), _norm(g)
        denominator = x_norm + decay * w_norm + axes["eps"]
        if axes["denominator"] == "norm_of_sum":
            x_norm = _norm(g + decay * p if decay else g)
            denominator = x_norm + axes["eps"]
        if axes["form"] == "popular":
            before = dict(self.state[p])
            x_norm = _norm(self._momentum(p, g + decay * p if decay else g, group))
            self.state[p].clear()
            self.state[p].update(before)
            denominator = x_norm + axes["eps"]
        empty = w_norm == 0 or (denominator if axes["zero_norm"] == "denominator" else x_norm) == 0
        if empty and axes["zero_norm"] == "plain":
            return 1.0, 0
        ratio = 1.0 if empty else axes["trust_coefficient"] * w_norm / denominator
        if axes["trust_clip"]:
            ratio = ratio / lr if ratio < lr else 1.0
        return ratio, decay


class Adam(_Reference):
    """torch.optim.Adam, with `lr` a number, a 1-element tensor or a schedule."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | None = 1e-8,
        weight_decay: float | None = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool | None = False,
        max_grad_norm: float | None = None,
        **layout: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            max_grad_norm=max_grad_norm,
        )
        super().__init__(params, defaults, **layout)

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        decay = group["weight_decay"]
        if decay and group["decoupled_weight_decay"]:
            p *= 1 - lr * decay
        elif decay:
            g = g + decay * p
        m, v, correction1, correction2 = self._moments(p, g, group)
        if group["amsgrad"]:
            state = self.state[p]
            v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", v), v)
        p -= lr / correction1 * m / (v.sqrt() / math.sqrt(correction2) + group["eps"])

    def _moments(self, p: Tensor, g: Tensor, group: Group) -> tuple[Tensor, Tensor, float, float]:
        """Add g to the moments. Returns both moments, and 1 - beta^n for both."""
        beta1, beta2 = map(float, group["betas"])
        state = self.state[p]
        state["step"] = n = state.get("step", 0) + 1
        state["exp_avg"] = beta1 * state.get("exp_avg", torch.zeros_like(p)) + (1 - beta1) * g
        state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", torch.zeros_like(p)) + (1 - beta2) * g * g
        return state["exp_avg"], state["exp_avg_sq"], 1 - beta1**n, 1 - beta2**n


class AdamW(Adam):
    """torch.optim.AdamW, with `lr` a number, a 1-element tensor or a schedule."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **{"decoupled_weight_decay": True, **options})


class AdamP(Adam):
    """AdamP. `fused_legw.AdamP` gives the formulas."""

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
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
        for group in self.param_groups:
            for name, value in dict(delta=delta, wd_ratio=wd_ratio, nesterov=nesterov).items():
                group.setdefault(name, value)

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        m, v, correction1, correction2 = self._moments(p, g, group)
        if group["nesterov"]:
            beta1 = float(group["betas"][0])
            m = beta1 * m + (1 - beta1) * g
        u = m / correction1 / (v.sqrt() / math.sqrt(correction2) + group["eps"])
        decay = group["weight_decay"]
        if p.ndim > 1 and p.numel():
            for rows in (len(p), 1):  # by channel, then the whole layer
                if self._is_tangent(p.reshape(rows, -1), g.reshape(rows, -1), group):
                    w = p.reshape(rows, -1)
                    n = w / (w.norm(dim=1, keepdim=True) + group["eps"])
                    radial = n * (n * u.reshape(rows, -1)).sum(dim=1, keepdim=True)
                    u = u - radial.reshape(p.shape)
                    decay = decay * group["wd_ratio"]
                    break
        p *= 1 - lr * decay
        p -= lr * u

    @staticmethod
    def _is_tangent(w: Tensor, g: Tensor, group: Group) -> bool:
        """Whether every row of the gradient is nearly at right angles to the same row of the weight."""
        cosines = torch.nn.functional.cosine_similarity(g, w, dim=1, eps=group["eps"])
        return bool(cosines.abs().max() < group["delta"] / math.sqrt(w.shape[1]))


class LAMB(Adam):
    """LAMB. `fused_legw.LAMB` gives the formulas and options."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        variant: str = "paper",
        adapt: bool = True,
        decoupled_weight_decay: bool | None = None,
        **options: Any,
    ) -> None:
        own = ("bias_correction", "trust_clamp", "not_adapted", "weight_norm_clamp")
        axes = {name: options.pop(name, None) for name in own}
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled_weight_decay, **options)
        for group in self.param_groups:
            for name, value in {**axes, "variant": variant, "adapt": adapt}.items():
                group.setdefault(name, value)

    def _clip(self, norm: float, group: Group) -> float:
        limit = variants.axes(variants.LAMB, group)["max_grad_norm"]
        if limit is None or group["variant"] not in variants.DIVIDING:
            return super()._clip(norm, group)
        return float(1.0 / max(1.0, norm / limit))

    def _update(self, p: Tensor, g: Tensor, lr: float, group: Group) -> None:
        axes = variants.axes(variants.LAMB, group)
        decay = axes["weight_decay"]
        if decay and not axes["decoupled_weight_decay"]:
            g, decay = g + decay * p, 0
        m, v, correction1, correction2 = self._moments(p, g, group)
        if axes["bias_correction"] == "step_size":
            lr *= math.sqrt(correction2) / correction1
        elif axes["bias_correction"]:
            m, v = m / correction1, v / correction2
        u = m / (v.sqrt() + axes["eps"])
        if decay:
            u = u + decay * p
        unadapted = axes["not_adapted"] == "no_decay" and axes["weight_decay"] == 0
        ratio = self._trust(p, u, axes) if group["adapt"] and not unadapted else 1.0
        p -= lr * ratio * u

    @staticmethod
    def _trust(p: Tensor, u: Tensor, axes: Group) -> float:
        w_norm, u_norm = _norm(p), _norm(u)
        if w_norm == 0 or u_norm == 0:
            return 1.0
        low, high = axes["weight_norm_clamp"] or (0.0, math.inf)
        ratio = min(max(w_norm, low), high) / u_norm
        low, high = axes["trust_clamp"] or (0.0, math.inf)
        return float(min(max(ratio, low), high))


def _norm(x: Tensor) -> float:
    """L2 norm in float64."""
    return float(torch.linalg.vector_norm(x.double()))
