"""LARS and LAMB as their authors and users wrote them: one short class a source, each in that source's own shape.

Only for comparison. No table of axes and no shared update, so that an axis misread in the package is not misread here.
Plain torch in the dtype of the tensors: a run in float64 is the exact result, one in float32 the yardstick of rounding.

    oracle.step(params, grads, lr)

updates the tensors in place. A gradient that is None leaves its tensor, its state and its own count of updates alone.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.linalg import vector_norm as norm


class Oracle:
    """Options are attributes, with the source's defaults at class level; state by the tensor's position."""

    weight_decay = 0.0

    def __init__(self, **options) -> None:
        for name, value in options.items():
            assert hasattr(type(self), name), f"{type(self).__name__} has no {name}"
            setattr(self, name, value)
        self.state: dict[int, dict] = defaultdict(dict)

    def step(self, params: list[Tensor], grads: list[Tensor | None], lr: float, over_all: Tensor | None = None) -> None:
        """over_all: the norm that a global clip takes, else that of `grads`."""
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is not None:
                self.update(self.state[i], p, g, lr)

    def update(self, s: dict, p: Tensor, g: Tensor, lr: float) -> None:
        raise NotImplementedError


# LARS


class PaperLARS(Oracle):
    """You, Gitman and Ginsburg 2017, algorithm 1: local LR, then momentum with both rates inside."""

    momentum, trust_coefficient = 0.9, 0.001

    def update(self, s, p, g, lr):
        w, below = norm(p), norm(g) + self.weight_decay * norm(p)
        local = self.trust_coefficient * w / below if w > 0 and below > 0 else 1.0
        s["v"] = self.momentum * s.get("v", 0.0) + lr * local * (g + self.weight_decay * p)
        p -= s["v"]


class TensorFlowLARS(Oracle):
    """tf.contrib.opt.LARSOptimizer: the momentum op gets lr = 1 and a gradient that holds both rates."""

    momentum, nesterov, eeta, epsilon = 0.9, False, 0.001, 0.0
    skipped = False  # on the skip list: neither ratio nor decay

    def update(self, s, p, g, lr):
        if not self.skipped:
            w, gn = norm(p), norm(g)
            ratio = self.eeta * w / (gn + self.weight_decay * w + self.epsilon) if w > 0 and gn > 0 else 1.0
            g = (g + self.weight_decay * p) * (lr * ratio)
        else:
            g = lr * g
        s["accum"] = s.get("accum", torch.zeros_like(p)) * self.momentum + g
        p -= g + s["accum"] * self.momentum if self.nesterov else s["accum"]


class TpuLARS(Oracle):
    """tensorflow/tpu's later lars_optimizer.py: the momentum op gets the gradient, and lr * ratio as its LR."""

    momentum, nesterov, eeta = 0.9, False, 0.001

    def update(self, s, p, g, lr):
        w, gn = norm(p), norm(g)
        ratio = self.eeta * w / (gn + self.weight_decay * w) if w > 0 and gn > 0 else 1.0
        g = g + self.weight_decay * p
        s["accum"] = s.get("accum", torch.zeros_like(p)) * self.momentum + g
        p -= lr * ratio * (g + s["accum"] * self.momentum if self.nesterov else s["accum"])


class SimCLRLARS(Oracle):
    """google-research/simclr: decay first, then the ratio of the sum; classic_momentum=False is "popular"."""

    momentum, use_nesterov, eeta, classic_momentum = 0.9, False, 0.001, True

    def ratio(self, p, x):
        w, below = norm(p), norm(x)
        return self.eeta * w / below if w > 0 and below > 0 else 1.0

    def update(self, s, p, g, lr):
        g = g + self.weight_decay * p
        v = s.get("v", torch.zeros_like(p))
        if self.classic_momentum:
            scaled_lr = lr * self.ratio(p, g)
            s["v"] = self.momentum * v + scaled_lr * g
            p -= self.momentum * s["v"] + scaled_lr * g if self.use_nesterov else s["v"]
        else:
            s["v"] = self.momentum * v + g
            u = self.momentum * s["v"] + g if self.use_nesterov else s["v"]
            p -= lr * self.ratio(p, u) * u


class NvidiaLARS(Oracle):
    """NVIDIA's MLPerf ResNet-50: the buffer holds the LR, so an old one is corrected by lr / last lr."""

    momentum, eta, eps = 0.9, 0.001, 0.0
    skipped = False  # gamma, beta and bias: no ratio

    def update(self, s, p, g, lr):
        mult = 1.0
        if not self.skipped:
            w, gn = norm(p), norm(g)
            if w > 0 and gn > 0:
                mult = self.eta * w / (gn + self.weight_decay * w + self.eps)
        correction = lr / s.get("last_lr", lr)
        s["mom"] = self.momentum * correction * s.get("mom", 0.0) - lr * mult * (g + self.weight_decay * p)
        s["last_lr"] = lr
        p += s["mom"]


class RocmLARS(Oracle):
    """ROCm's FusedLARS kernel, which adds a negative momentum; is_skipped keeps the decay."""

    momentum, trust_coefficient, eps, is_skipped = 0.9, 0.001, 0.0, False

    def update(self, s, p, g, lr):
        scaled_lr, g_norm, p_norm = lr, norm(g), norm(p)
        if not self.is_skipped and g_norm > 0 and p_norm > 0:
            scaled_lr = lr * self.trust_coefficient * p_norm / (g_norm + p_norm * self.weight_decay + self.eps)
        mom = s.get("mom", torch.zeros_like(p))
        s["mom"] = mom * self.momentum - scaled_lr * (g + self.weight_decay * p)
        p += s["mom"]


class AroundSGD(Oracle):
    """A wrapper that rewrites the gradient, then lets torch.optim.SGD step without its decay."""

    momentum, dampening, nesterov = 0.9, 0.0, False

    def step(self, params, grads, lr, over_all=None):
        if not hasattr(self, "sgd"):
            rest = dict(momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov)
            self.sgd = torch.optim.SGD(params, lr=lr, foreach=False, **rest)
        self.sgd.param_groups[0]["lr"] = lr
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else self.rewritten(p, g, lr)
        self.sgd.step()

    def rewritten(self, p, g, lr):
        raise NotImplementedError


class ApexLARC(AroundSGD):
    """NVIDIA/apex LARC: with a zero norm the gradient stays plain, decay included."""

    trust_coefficient, eps, clip = 0.02, 1e-8, True

    def rewritten(self, p, g, lr):
        param_norm, grad_norm = norm(p), norm(g)
        if param_norm == 0 or grad_norm == 0:
            return g.clone()
        adaptive = self.trust_coefficient * param_norm / (grad_norm + param_norm * self.weight_decay + self.eps)
        if self.clip:
            adaptive = min(adaptive / lr, 1.0)
        return (g + self.weight_decay * p) * adaptive


class TorchLARS(AroundSGD):
    """kakaobrain/torchlars."""

    trust_coef, eps = 0.001, 1e-8

    def rewritten(self, p, g, lr):
        w, gn, adaptive = norm(p), norm(g), 1.0
        if w > 0 and gn > 0:
            adaptive = self.trust_coef * w / (gn + self.weight_decay * w + self.eps)
        return (g + self.weight_decay * p) * adaptive


class TimmLARS(Oracle):
    """timm.optim.Lars: SGD written out; without decay no adaptation, and no clip, unless always_adapt."""

    momentum, dampening, nesterov = 0.9, 0.0, False
    trust_coeff, eps, trust_clip, always_adapt = 0.001, 1e-8, False, False

    def update(self, s, p, g, lr):
        if self.weight_decay != 0 or self.always_adapt:
            w, gn, ratio = norm(p), norm(g), torch.ones((), dtype=p.dtype)
            if w > 0 and gn > 0:
                ratio = self.trust_coeff * w / (gn + w * self.weight_decay + self.eps)
            if self.trust_clip:
                ratio = (ratio / lr).clamp(max=1.0)
            g = ratio * (g + self.weight_decay * p)
        if self.momentum != 0:
            s["buf"] = self.momentum * s["buf"] + (1 - self.dampening) * g if s else g.clone()
            g = g + self.momentum * s["buf"] if self.nesterov else s["buf"]
        p -= lr * g


class BoltsLARS(Oracle):
    """pl_bolts.optimizers.LARS: adapts, and decays, only where decay and both norms are not zero."""

    momentum, dampening, nesterov, trust_coefficient, eps = 0.9, 0.0, False, 0.001, 1e-8

    def update(self, s, p, g, lr):
        d_p = g.clone()
        if self.weight_decay != 0 and norm(p) != 0 and norm(g) != 0:
            lars_lr = norm(p) / (norm(g) + norm(p) * self.weight_decay + self.eps) * self.trust_coefficient
            d_p = lars_lr * (d_p + self.weight_decay * p)
        if "buffer" in s:
            s["buffer"].mul_(self.momentum).add_(d_p, alpha=1 - self.dampening)
        else:
            s["buffer"] = d_p.clone()
        p -= lr * (d_p + self.momentum * s["buffer"] if self.nesterov else s["buffer"])


class MocoLARS(Oracle):
    """facebookresearch/moco-v3: vectors and scalars are plain SGD without decay."""

    momentum, nesterov, trust_coefficient = 0.9, False, 0.001

    def update(self, s, p, g, lr):
        dp = g
        if p.ndim > 1:
            dp = g + self.weight_decay * p
            param_norm, update_norm = norm(p), norm(dp)
            if param_norm > 0 and update_norm > 0:
                dp = dp * (self.trust_coefficient * param_norm / update_norm)
        s["mu"] = s.get("mu", torch.zeros_like(p)) * self.momentum + dp
        p -= lr * (dp + self.momentum * s["mu"] if self.nesterov else s["mu"])


class PytorchOptimizerLARS(Oracle):
    """pytorch_optimizer.LARS: moco-v3's shape, the paper's denominator and its rule for a zero gradient."""

    momentum, nesterov, trust_coefficient = 0.9, False, 0.001

    def update(self, s, p, g, lr):
        if p.ndim > 1:
            below = norm(g) + self.weight_decay * norm(p)
            ratio = self.trust_coefficient * norm(p) / below if norm(p) > 0 and below > 0 else 1.0
            g = (g + self.weight_decay * p) * ratio
        s["mb"] = self.momentum * s.get("mb", 0.0) + g
        p -= lr * (g + self.momentum * s["mb"] if self.nesterov else s["mb"])


class OptaxLARS(Oracle):
    """optax.lars, a chain: decayed weights, trust ratio, learning rate, trace."""

    momentum, nesterov, trust_coefficient, eps = 0.9, False, 0.001, 0.0

    def update(self, s, p, g, lr):
        update = g + self.weight_decay * p
        if norm(p) != 0 and norm(update) != 0:
            update = update * (self.trust_coefficient * norm(p) / (norm(update) + self.eps))
        update = -lr * update
        s["trace"] = update + self.momentum * s.get("trace", torch.zeros_like(p))
        p += update + self.momentum * s["trace"] if self.nesterov else s["trace"]


# LAMB


def global_norm(grads: list[Tensor | None]) -> Tensor:
    return norm(torch.stack([norm(g) for g in grads if g is not None]))


class PaperLAMB(Oracle):
    """You et al. 2019, algorithm 2, with phi(z) = clip(z, *phi)."""

    weight_decay, betas, eps, phi = 0.01, (0.9, 0.999), 1e-6, (0.0, float("inf"))

    def update(self, s, p, g, lr):
        (b1, b2), t = self.betas, s.get("t", 0) + 1
        m = b1 * s.get("m", 0.0) + (1 - b1) * g
        v = b2 * s.get("v", 0.0) + (1 - b2) * g * g
        s.update(t=t, m=m, v=v)
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        u = r + self.weight_decay * p
        ratio = norm(p).clamp(*self.phi) / norm(u) if norm(p) > 0 and norm(u) > 0 else 1.0
        p -= lr * ratio * u


class AuthorLAMB(Oracle):
    """The first author's TensorFlow code (BERT's AdamWeightDecay with a ratio): global clip, no correction."""

    weight_decay, beta_1, beta_2, epsilon, clip_norm = 0.01, 0.9, 0.999, 1e-6, 1.0

    def step(self, params, grads, lr, over_all=None):
        total = global_norm(grads) if over_all is None else over_all
        shrink = self.clip_norm / max(total, self.clip_norm)
        super().step(params, [None if g is None else g * shrink for g in grads], lr)

    def update(self, s, p, g, lr):
        zeros = torch.zeros_like(p)
        s["m"] = self.beta_1 * s.get("m", zeros) + (1 - self.beta_1) * g
        s["v"] = self.beta_2 * s.get("v", zeros) + (1 - self.beta_2) * g.square()
        update, ratio = s["m"] / (s["v"].sqrt() + self.epsilon), 1.0
        if self.weight_decay > 0:  # not on the exclusion list
            update = update + self.weight_decay * p
            w_norm, u_norm = norm(p), norm(update)
            ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        p -= ratio * lr * update


class ApexLAMB(Oracle):
    """apex.optimizers.FusedLAMB: stage 1 writes the update over the gradient, stage 2 applies it."""

    weight_decay, betas, eps, max_grad_norm = 0.01, (0.9, 0.999), 1e-6, 1.0
    bias_correction, adam_w_mode, use_nvlamb = True, True, False

    def step(self, params, grads, lr, over_all=None):
        total = global_norm(grads) if over_all is None else over_all
        self.clipped = total / self.max_grad_norm if total > self.max_grad_norm else 1.0
        super().step(params, grads, lr)

    def update(self, s, p, g, lr):
        ratio, update = lr, self.stage1(s, p, g / self.clipped)
        if self.use_nvlamb or self.weight_decay != 0:
            param_norm, update_norm = norm(p), norm(update)
            if param_norm != 0 and update_norm != 0:
                ratio = lr * (param_norm / update_norm)
        p -= ratio * update

    def stage1(self, s, p, g):
        (b1, b2), s["step"] = self.betas, s.get("step", 0) + 1
        c1, c2 = (1 - b1 ** s["step"], 1 - b2 ** s["step"]) if self.bias_correction else (1.0, 1.0)
        if not self.adam_w_mode:
            g = g + self.weight_decay * p
        s["m"] = s.get("m", torch.zeros_like(p)) * b1 + (1 - b1) * g
        s["v"] = s.get("v", torch.zeros_like(p)) * b2 + (1 - b2) * g * g
        update = (s["m"] / c1) / ((s["v"] / c2).sqrt() + self.eps)
        return update + self.weight_decay * p if self.adam_w_mode else update


class TimmLAMB(Oracle):
    """timm.optim.Lamb: both corrections on the moments, the second one under the root."""

    weight_decay, betas, eps, max_grad_norm = 0.01, (0.9, 0.999), 1e-6, 1.0
    bias_correction, trust_clip, always_adapt = True, False, False

    def step(self, params, grads, lr, over_all=None):
        if self.max_grad_norm is not None:
            total = global_norm(grads) if over_all is None else over_all
            factor = (total / self.max_grad_norm).clamp(min=1.0)
            grads = [None if g is None else g / factor for g in grads]
        super().step(params, grads, lr)

    def update(self, s, p, g, lr):
        beta1, beta2 = self.betas
        if not s:
            s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        s["step"] += 1
        s["exp_avg"].lerp_(g, 1 - beta1)
        s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first = 1 - beta1 ** s["step"] if self.bias_correction else 1.0
        second = 1 - beta2 ** s["step"] if self.bias_correction else 1.0
        update = s["exp_avg"] / first / (s["exp_avg_sq"].sqrt() / second**0.5 + self.eps)
        if self.weight_decay != 0:
            update = update + self.weight_decay * p
        if self.weight_decay != 0 or self.always_adapt:
            w, u = norm(p), norm(update)
            trust = w / u if w > 0 and u > 0 else torch.ones_like(w)
            update = update * (trust.clamp(max=1.0) if self.trust_clip else trust)
        p -= lr * update


class DeepSpeedLAMB(Oracle):
    """DeepSpeed's FusedLamb before it moved the correction onto the moments: raw moments, a corrected step size."""

    betas, eps, max_coeff, min_coeff = (0.9, 0.999), 1e-8, 10.0, 0.01

    def update(self, s, p, g, lr):
        b1, b2 = self.betas
        s["step"] = s.get("step", 0) + 1
        step_size = lr * (1 - b2 ** s["step"]) ** 0.5 / (1 - b1 ** s["step"])
        s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * g
        s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        update = s["m"] / (s["v"].sqrt() + self.eps) + self.weight_decay * p
        reg_w, reg_u, coeff = norm(p), norm(update), 1.0
        if reg_w != 0 and reg_u != 0:
            coeff = max(min(reg_w / reg_u, self.max_coeff), self.min_coeff)
        p -= step_size * coeff * update


class OptaxLAMB(Oracle):
    """optax.lamb, a chain: scale_by_adam, decayed weights, trust ratio, learning rate."""

    b1, b2, eps = 0.9, 0.999, 1e-6

    def update(self, s, p, g, lr):
        count = s["count"] = s.get("count", 0) + 1
        s["mu"] = (1 - self.b1) * g + self.b1 * s.get("mu", torch.zeros_like(p))
        s["nu"] = (1 - self.b2) * g**2 + self.b2 * s.get("nu", torch.zeros_like(p))
        mu_hat, nu_hat = s["mu"] / (1 - self.b1**count), s["nu"] / (1 - self.b2**count)
        update = mu_hat / (nu_hat.sqrt() + self.eps) + self.weight_decay * p
        safe = norm(p) / norm(update)
        if norm(p) == 0 or norm(update) == 0:
            safe = 1.0
        p += -lr * (safe * update)


class PytorchOptimizerLAMB(Oracle):
    """pytorch_optimizer.Lamb, weight_decouple=False, adam_debias=True: no correction, ||w|| at most 10."""

    betas, epsilon = (0.9, 0.999), 1e-6

    def update(self, s, p, g, lr):
        beta1, beta2 = self.betas
        s["avg"] = s.get("avg", torch.zeros_like(p)) * beta1 + (1 - beta1) * g
        s["sq"] = s.get("sq", torch.zeros_like(p)) * beta2 + (1 - beta2) * g * g
        update = s["avg"] / (s["sq"].sqrt() + self.epsilon) + self.weight_decay * p
        weight_norm, p_norm = norm(p).clamp(max=10.0), norm(update)
        p -= lr * (weight_norm / (p_norm + self.epsilon) if weight_norm > 0 and p_norm > 0 else 1.0) * update
