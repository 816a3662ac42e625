"""Measures the gradient norms that a `GradientNoiseScale` needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..checks import count, fail
from ..torch_private import backward_pass
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


def _workers() -> int:
    """The workers of the default process group; 1 without one."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MicroBatchNorms:
    """Feeds a `GradientNoiseScale` from micro-batches that accumulate into `.grad`, on one process.

    `.grad` shows only the sum, so a hook on every parameter measures what each backward pass adds. That reads the
    gradient once per micro-batch; `step` reads the sum once. Leaving the context removes the hooks, as `close` does.

    The micro-batches of an update are counted: as many as the backward passes over the parameter that had the most. To
    a parameter that a pass did not reach it added 0. An update of fewer micro-batches than noise.big_batch promises
    counts as one of a smaller big batch; one of a single micro-batch tells nothing, and is left out. A call of
    torch.autograd.grad is no pass.

    Args:
        noise: its small_batch is the samples of a micro-batch; its big_batch is those of an update, a multiple of it.
        params: the parameters of the update.
        mean_of_parts: True if each micro-batch's mean loss is divided by the number of micro-batches, so that `.grad`
            is the gradient of the mean. False if `.grad` is the sum.

    Raises:
        ValueError: naming the argument and its value.
        RuntimeError: torch.distributed has more than one worker, whose average `.grad` may hold: `DistributedNorms`
            measures that.

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
        self._promised, rest = divmod(noise.big_batch, noise.small_batch)
        if rest:
            fail("noise.big_batch", noise.big_batch, f"a multiple of small_batch={noise.small_batch}")
        self._params = [p for p in params if p.requires_grad]
        if not self._params:
            fail("params", [], "parameters that require gradients")
        self._refuse_workers()
        self._mean_of_parts = mean_of_parts
        self._small: list[list[Tensor]] = [[] for _ in self._params]  # norms, by parameter and pass
        # By parameter: what its hook measured last, until the pass adds it to `.grad`. torch.autograd.grad never does.
        self._measured: list[Tensor | None] = [None] * len(self._params)
        self._pass, self._nested = -1, False  # the latest backward pass, and whether an earlier one went on after it
        self._hooks = [handle for i in range(len(self._params)) for handle in self._watch(i)]

    def _watch(self, i: int) -> Iterator[RemovableHandle]:
        # A leaf's hook runs once per backward pass, with the whole gradient of that pass, also for shared weights.
        def measure(gradient: Tensor) -> None:
            self._measured[i] = _norm(gradient)
            current = backward_pass()
            self._nested = self._nested or current < self._pass
            self._pass = max(self._pass, current)

        def count_pass(_: Tensor) -> None:
            measured, self._measured[i] = self._measured[i], None
            if measured is not None:
                self._small[i].append(measured)

        yield self._params[i].register_hook(measure)
        yield self._params[i].register_post_accumulate_grad_hook(count_pass)

    def step(self, *, loss_scale: float | Tensor = 1.0, micro_batches: int | None = None) -> None:
        """Call after an update's last backward pass, before clipping and `zero_grad`. Waits for no device.

        Args:
            loss_scale: `scaler.get_scale()` if gradients are still scaled by AMP.
            micro_batches: the number of micro-batches since the last call, where the passes do not show it: if
                backward runs more than once per micro-batch, or no parameter is reached by all of them. None: counted.

        Raises:
            RuntimeError: there was no backward pass since the last call; or a parameter was in more passes than there
                are micro-batches, and the norm of their sum is not known; or passes ran inside others, unevenly. What
                was measured is dropped.
            RuntimeError: torch.distributed has more than one worker.
            ValueError: micro_batches is no positive integer.
        """
        if micro_batches is not None:
            micro_batches = count("micro_batches", micro_batches)
        small, self._small = self._small, [[] for _ in self._params]
        self._refuse_workers()
        nested, self._nested = self._nested, False
        parts = self._micro_batches([len(passes) for passes in small], micro_batches, nested=nested)
        if parts == 1:
            return
        big = _square_sum([_norm(p.grad) for p in self._params if p.grad is not None])
        # Convert each norm to that of a mean over its samples.
        small_unit, big_unit = (parts, 1) if self._mean_of_parts else (1, 1 / parts)
        mean = _square_sum([*chain.from_iterable(small)]) / parts
        self._noise.update(
            mean * small_unit**2 / loss_scale**2,
            big * big_unit**2 / loss_scale**2,
            big_batch=parts * self._noise.small_batch,
        )

    def _micro_batches(self, passes: list[int], told: int | None, *, nested: bool) -> int:
        """The number of micro-batches, from how many passes were over each parameter.

        nested: passes ran inside others, as with re-entrant checkpoints. Each adds to a shared weight by itself.
        """
        most = max(passes)
        if most == 0:
            raise RuntimeError("run backward() before step(): no gradient was seen since the last step()")
        promise = f"noise.big_batch={self._noise.big_batch} has {self._promised} micro-batches"
        if told is not None and told > self._promised:
            raise RuntimeError(f"call step() at every update: micro_batches={told}, but {promise}")
        if most > (told or self._promised):
            raise RuntimeError(
                f"run one backward pass per micro-batch and step() at every update: {most} passes were over a "
                f"parameter of shape {tuple(self._params[passes.index(most)].shape)}, but "
                + (promise if told is None else f"micro_batches={told}")
            )
        fewest = min(filter(None, passes))
        if nested and told is None and fewest < most:
            raise RuntimeError(
                f"use checkpoint(..., use_reentrant=False): {most} passes were over one parameter and {fewest} over "
                "another, some inside others, so the micro-batches cannot be counted"
            )
        return told or most

    @staticmethod
    def _refuse_workers() -> None:
        if (workers := _workers()) > 1:
            raise RuntimeError(
                f"use DistributedNorms: there are {workers} workers, and MicroBatchNorms cannot tell whether .grad is "
                "the average of all of them"
            )

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
    `step` once after each backward pass with communication; it averages one number over the workers. Micro-batches
    accumulate under `model.no_sync()`, all but the last: the gradients of their sum are what is measured.

        norms = DistributedNorms(GradientNoiseScale(batch, batch * world_size))
        model.register_comm_hook(norms, DistributedNorms.hook)

    Args:
        noise: its small_batch is the samples of one worker in an update, of all its micro-batches; its big_batch is
            those of all workers.
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
        self._passes = 0  # backward passes with communication since the last step

    def hook(self, bucket):  # type: ignore[no-untyped-def]  # DistributedDataParallel refuses annotations as text
        """The hook, called by DistributedDataParallel with each bucket of gradients."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self._small.append(_norm(bucket.buffer()))
        self._passes += bucket.is_last()

        def after(future: Any) -> Tensor:
            gradients: Tensor = future.value()
            self._big.append(_norm(gradients))
            return gradients

        return allreduce_hook(self._group, bucket).then(after)

    def step(self, *, loss_scale: float | Tensor = 1.0) -> None:
        """Call after the backward pass. With NCCL it waits for no device.

        Args:
            loss_scale: `scaler.get_scale()` if gradients are still scaled by AMP.

        Raises:
            RuntimeError: there was no backward pass with communication since the last call, or more than one. What was
                measured is dropped.
        """
        import torch.distributed

        norms, passes = (self._small, self._big), self._passes
        self._small, self._big, self._passes = [], [], 0
        if passes > 1:
            raise RuntimeError(
                f"call step() after each backward pass with communication, and accumulate under model.no_sync(): there "
                f"were {passes} passes since the last step(), not 1"
            )
        small, big = _square_sum(norms[0]) / self._workers, _square_sum(norms[1])
        torch.distributed.all_reduce(small, group=self._group)
        self._noise.update(small / loss_scale**2, big / loss_scale**2)
