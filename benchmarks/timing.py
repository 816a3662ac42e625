"""How a step is timed.

On CUDA a step has two times. They overlap in a training loop, so each is taken alone:
    device time   between two events around the step. Flushes of the L2 keep the stream busy until the host has
                  enqueued the whole step: else the gaps of a slow host would count as the device's.
    host time     until the call returns, on an idle device, without synchronisation.
On a CPU the call is the step. Its host time is the time of the same call on tensors of one element each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .shapes import Shape

Clock = Callable[[], Any]  # the difference of two readings is seconds
LARGEST_COPY = {"cuda": 2**28, "cpu": 2**26}  # elements. Both are larger than the caches, and a larger copy is as fast.


class Mark:
    """A point in the device's stream. Reading the clock does not wait. Subtracting waits for the later point."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def __sub__(self, earlier: Mark) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def clock_of(device: torch.device) -> Clock:
    return Mark if device.type == "cuda" else time.perf_counter


def seconds(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return float(clock() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(step: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Median time for `step` to return."""
    times = []
    for _ in range(calls):
        synchronize(device)
        times.append(seconds(step, time.perf_counter))
    synchronize(device)
    return median(times)


class Before:
    """Makes the caches cold before a timed step, and times a copy once a round under the same conditions.

    elements: float32 elements of the copied buffer, which has at most LARGEST_COPY of them.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.copies: list[float] = []
        elements = min(elements, LARGEST_COPY[device.type])
        self.copy_bytes = 2 * 4 * elements  # read and written
        self._source = torch.zeros(elements, device=device)
        self._target = torch.empty_like(self._source)
        self._clock = clock_of(device)
        self._junk: Tensor | None = None
        self._flush_seconds = math.inf
        if device.type == "cuda":
            # Four times the L2, and more than AMD's 256 MB Infinity Cache, which is not reported as L2.
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**29)
            self._junk = torch.empty(size, dtype=torch.uint8, device=device)
            self._flush_seconds = min(seconds(self._junk.zero_, self._clock) for _ in range(3))
        for _ in range(3):
            self.copy()
        self.copies.clear()  # the first copy touched new memory

    def copy(self) -> None:
        self.flush()
        self.copies.append(seconds(lambda: self._target.copy_(self._source), self._clock))

    def flush(self, hide: float = 0.0) -> None:
        """Fill the caches with other data. On a CPU the steps and copies before have done so already.

        hide: seconds that the host takes for the step. The device stays busy for as long.
        """
        if self._junk is not None:
            for _ in range(1 + math.ceil(hide / self._flush_seconds)):
                self._junk.zero_()


class Gradients:
    """The gradients that all contenders of a group share. `restore` undoes the writes of AMP and of some contenders."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = [_random(shape, dtype, device) for shape in shapes]
        self._clean = [g.clone() for g in self.tensors]
        self._versions = self._seen()

    def _seen(self) -> list[int]:
        return [g._version for g in self.tensors]

    def restore(self) -> None:
        if self._seen() != self._versions:
            torch._foreach_copy_(self.tensors, self._clean)
            self._versions = self._seen()


def parameters(gradients: Gradients) -> list[Tensor]:
    """New parameters with those gradients."""
    params: list[Tensor] = [torch.nn.Parameter(_random(g.shape, g.dtype, g.device)) for g in gradients.tensors]
    for p, g in zip(params, gradients.tensors, strict=True):
        p.grad = g
    return params


def _random(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).uniform_(-0.05, 0.05)


def launches(step: Callable[[], object], device: torch.device) -> int | None:
    """The number of kernels that one step launches, by torch.profiler. None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    events = [e for e in profile.events() if e.device_type == torch._C._autograd.DeviceType.CUDA]
    kernels = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return sum(not e.name.startswith(("Memcpy", "Memset", "Optimizer.step")) for e in kernels)


def free_bytes(device: torch.device) -> int:
    """Memory that is still free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            (line,) = [line for line in file if line.startswith("MemAvailable:")]
        return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        return 2**33
