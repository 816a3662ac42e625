"""One full optimizer step of a training loop, with masters, unscaling, clipping and the LR scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fused_legw
from fused_legw import LEGW, Polynomial

Step = Callable[[], object]

SCHEDULE = LEGW(0.1, 256, 0.3125, batch_size=8192, dataset_size=1_281_167, epochs=90, decay=Polynomial(power=2))
MAX_GRAD_NORM = 1.0
BOOKKEEPING = ("plain", "amp+clip")


def loss_scaler(cls: type[torch.amp.GradScaler], device: torch.device) -> torch.amp.GradScaler:
    """A scaler whose scale stays 1. It does the work of any scale, and the gradients stay what they are."""
    scaler = cls(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.ones((), device=device))  # torch makes the scale's tensors at the first loss
    return scaler


class Masters:
    """Float32 copies of low-precision parameters. An optimizer that keeps none itself is given `weights`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.weights: list[Tensor] = [torch.nn.Parameter(p.detach().float()) for p in params]
        self._gradients = [torch.zeros_like(w) for w in self.weights]
        for w, g in zip(self.weights, self._gradients, strict=True):
            w.grad = g

    @torch.no_grad()
    def take_gradients(self) -> None:
        gradients: list[Any] = [p.grad for p in self.params]
        torch._foreach_copy_(self._gradients, gradients)

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(self.params, self.weights)


def ours(cls: type, options: dict[str, object], params: list[Tensor], bookkeeping: str) -> Step:
    """A step of a fused_legw optimizer, which does masters, schedule, clipping and inf check itself."""
    if bookkeeping == "plain":
        return cls(params, lr=SCHEDULE, **options).step  # type: ignore[no-any-return]
    optimizer = cls(params, lr=SCHEDULE, max_grad_norm=MAX_GRAD_NORM, **options)
    scaler = loss_scaler(fused_legw.GradScaler, params[0].device)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def around(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    params: list[Tensor],
    bookkeeping: str,
    *,
    scheduled: bool = True,
    masters: bool = True,
    wrap: Callable[[Step], Step] = lambda step: step,
) -> Step:
    """A step of any other optimizer, and around it the work that ours does itself.

    make: gives the optimizer of some parameters.
    scheduled: whether a torch scheduler drives its LR.
    masters: whether it is given float32 masters of bfloat16 parameters.
    wrap: goes around the optimizer's own step, such as a compiler.
    """
    keep = Masters(params) if masters and params[0].dtype == torch.bfloat16 else None
    weights = keep.weights if keep else params
    optimizer = make(weights)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE) if scheduled else None
    optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign, assignment]
    scaler = loss_scaler(torch.amp.GradScaler, params[0].device) if bookkeeping == "amp+clip" else None

    def step() -> None:
        if keep:
            keep.take_gradients()
        if scaler:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if scheduler:
            scheduler.step()
        if keep:
            keep.write_back()

    return step


def captured(step: Step) -> Step:
    """The replay of a CUDA graph of one step. Eager steps before the capture make state and kernels."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    alive = graph, step  # a graph knows addresses only, so the optimizer's memory must be kept for it
    return lambda: alive[0].replay()
