"""Measures the gradient norms that a `GradientNoiseScale` needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from .noise_scale import GradientNoiseScale


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    # In float64, because on a CPU a float32 sum over 25 million elements is 0.1 % too low.
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm


def _square_sum(norms: list[Tensor]) -> Tensor:
    """The sum of squares of 0-dim tensors, in float64, on the first one's device."""
    if not norms:
        raise RuntimeError("run backward() before step(): no gradient was seen since the last step()")
    device = norms[0].device
    return torch.stack([x.to(device) for x in norms]).double().square().sum()


class MicroBatchNorms:
    """Feeds a `GradientNoiseScale` from micro-batches that accumulate into `.grad`, on one process.

    `.grad` shows only the sum, so a hook on every parameter measures what each backward pass adds. That reads the
    gradient once per micro-batch; `step` reads the sum once. Leaving the context removes the hooks, as `close` does.

    Args:
        noise: its small_batch is the samples of a micro-batch; its big_batch is those of an update, a multiple of it.
        params: the parameters of the update.
        mean_of_parts: True if each micro-batch's mean loss is divided by the number of micro-batches, so that `.grad`
            is the gradient of the mean. False if `.grad` is the sum.

    Raises:
        ValueError: naming the argument and its value.

    >>> w = torch.zeros(2, requires_grad=True)
    >>> noise = GradientNoiseScale(small_batch=1, big_batch=2)
    >>> with MicroBatchNorms(noise, [w]) as norms:
    ...     for sample in torch.tensor([[3.0, 0.0], [0.0, 4.0]]):
    ...         ((w * sample).sum() / 2).backward()
    ...     norms.step()
    >>> noise.trace, noise.grad_sq  # samples at right angles: |G|^2 cannot be told from 0
    (12.5, 0.0)
    """

    def __init__(self, noise: GradientNoiseScale, params: Iterable[Tensor], *, mean_of_parts: bool = True) -> None:
        self._noise = noise
        self._parts, rest = divmod(noise.big_batch, noise.small_batch)
        if rest:
            fail("noise.big_batch", noise.big_batch, f"a multiple of small_batch={noise.small_batch}")
        self._params = [p for p in params if p.requires_grad]
        if not self._params:
            fail("params", [], "parameters that require gradients")
        self._mean_of_parts = mean_of_parts
        self._small: list[Tensor] = []
        # A leaf's hook runs once per backward pass, with the whole gradient of that pass, also for shared weights.
        self._hooks = [p.register_hook(lambda gradient: self._small.append(_norm(gradient))) for p in self._params]

    def step(self, *, loss_scale: float | Tensor = 1.0) -> None:
        """Call after an update's last backward pass, before clipping and `zero_grad`. Waits for no device.

        Args:
            loss_scale: `scaler.get_scale()` if gradients are still scaled by AMP.

        Raises:
            RuntimeError: there was no backward pass since the last call.
        """
        big = _square_sum([_norm(p.grad) for p in self._params if p.grad is not None])
        # Convert each norm to that of a mean over its samples.
        small_unit, big_unit = (self._parts, 1) if self._mean_of_parts else (1, 1 / self._parts)
        small = _square_sum(self._small) / self._parts
        self._small.clear()
        self._noise.update(small * small_unit**2 / loss_scale**2, big * big_unit**2 / loss_scale**2)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> MicroBatchNorms:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DistributedNorms:
    """Feeds a `GradientNoiseScale` from the workers of DistributedDataParallel, with a communication hook.

    The hook measures each bucket before and after its all-reduce, and does not change gradients. Every worker calls
    `step` once after each backward pass with communication; it averages one number over the workers.

        norms = DistributedNorms(GradientNoiseScale(batch, batch * world_size))
        model.register_comm_hook(norms, DistributedNorms.hook)

    Args:
        noise: its small_batch is the samples of one worker; its big_batch is those of all workers.
        process_group: the model's process group; None for the default one.

    Raises:
        ValueError: the batch sizes do not fit the number of workers.
    """

    def __init__(self, noise: GradientNoiseScale, process_group: Any = None) -> None:
        import torch.distributed

        self._group = process_group
        workers = torch.distributed.get_world_size(self._group)
        if noise.big_batch != workers * noise.small_batch:
            fail("noise.big_batch", noise.big_batch, f"{workers} workers times small_batch={noise.small_batch}")
        self._noise, self._workers = noise, workers
        self._small: list[Tensor] = []
        self._big: list[Tensor] = []

    def hook(self, bucket):  # type: ignore[no-untyped-def]  # DistributedDataParallel refuses annotations as text
        """The hook, called by DistributedDataParallel with each bucket of gradients."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self._small.append(_norm(bucket.buffer()))

        def after(future: Any) -> Tensor:
            gradients: Tensor = future.value()
            self._big.append(_norm(gradients))
            return gradients

        return allreduce_hook(self._group, bucket).then(after)

    def step(self, *, loss_scale: float | Tensor = 1.0) -> None:
        """Call after the backward pass; see `MicroBatchNorms.step`. With NCCL it waits for no device."""
        import torch.distributed

        small, big = _square_sum(self._small) / self._workers, _square_sum(self._big)
        self._small.clear()
        self._big.clear()
        torch.distributed.all_reduce(small, group=self._group)
        self._noise.update(small / loss_scale**2, big / loss_scale**2)
