"""LARS and LAMB out of torch's own operations. torch.optim has neither, so these are "torch" in their groups.

They are fast without a kernel of their own: a call (`torch._foreach_*`) takes lists of tensors, and nothing waits for
the device. Both are the papers' variants, as `fused_legw` has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """v = momentum * v + lr * ratio * (g + weight_decay * w); w -= v, ratio = 0.001 |w| / (|g| + weight_decay |w|)."""

    def __init__(self, params: Iterable[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; no closures."""
        for group in self.param_groups:
            weights, decay = group["params"], group["weight_decay"]
            gradients = [p.grad for p in weights]
            w, g = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
            denominator = g + decay * w
            ratio = torch.where((w > 0) & (denominator > 0), 0.001 * w / denominator, 1.0)
            terms = torch._foreach_add(gradients, weights, alpha=decay)
            torch._foreach_mul_(terms, (group["lr"] * ratio).unbind())
            momenta = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, terms)
            torch._foreach_sub_(weights, momenta)


class LAMB(torch.optim.Optimizer):
    """w -= lr * |w| / |u| * u, where u = m' / (sqrt(v') + eps) + weight_decay * w with Adam's corrected moments."""

    def __init__(self, params: Iterable[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=weight_decay))
        for group in self.param_groups:
            group["step"] = torch.zeros((), device=group["params"][0].device)
            for p in group["params"]:
                self.state[p] = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; no closures."""
        for group in self.param_groups:
            weights, (beta1, beta2) = group["params"], group["betas"]
            gradients = [p.grad for p in weights]
            first = [self.state[p]["exp_avg"] for p in weights]
            second = [self.state[p]["exp_avg_sq"] for p in weights]
            group["step"] += 1
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            root = torch._foreach_div(second, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, group["eps"])
            updates = torch._foreach_div(first, 1 - beta1 ** group["step"])
            torch._foreach_div_(updates, root)
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            w, u = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
            ratio = torch.where((w > 0) & (u > 0), w / u, 1.0)
            torch._foreach_mul_(updates, (group["lr"] * ratio).unbind())
            torch._foreach_sub_(weights, updates)
