"""How a step is timed, and what its time is compared with.

On CUDA a step has two times, which overlap in a training loop, so neither is hidden in the other here:
    device time   between two events around the step. The stream is kept busy until the host has enqueued the whole
                  step, by flushing the L2 often enough; else the gaps of a slow host would count as the device's.
    host time     until the call returns, on an idle device, without synchronisation.
On a CPU the call is the step; its host time is that of the same call on tensors of one element each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .contenders import FLOOR, SCHEDULE, Contender
from .shapes import Shape, smaller

Clock = Callable[[], Any]  # the difference of two readings is seconds


class Mark:
    """A point in the device's stream. Subtracting waits for the later one, so reading the clock does not."""

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


def host_seconds(step: Callable[[], object], device: torch.device, calls: int) -> float:
    """Median time for `step` to return."""
    times = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(seconds(step, time.perf_counter))
    return median(times)


class Round:
    """What comes before each timed step: a copy timed under the same conditions, then cold caches again.

    elements: float32 elements of the buffer that is copied. hide: host seconds for which to keep the device busy.
    """

    def __init__(self, elements: int, device: torch.device, hide: float = 0.0) -> None:
        self.copies: list[float] = []
        self.copy_bytes = 2 * 4 * elements  # read and written
        self._source = torch.zeros(elements, device=device)
        self._target = torch.empty_like(self._source)
        self._clock = clock_of(device)
        self._junk: Tensor | None = None
        self._flushes = 1
        if device.type == "cuda":
            # Four times the L2, and more than AMD's 256 MB Infinity Cache, which is not reported as L2.
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**29)
            self._junk = torch.empty(size, dtype=torch.uint8, device=device)
            self._flushes += math.ceil(hide / min(seconds(self.flush, self._clock) for _ in range(3)))
        self()
        self.copies.clear()  # the first one met untouched memory

    def flush(self) -> None:
        """Nothing on a CPU: the copy, larger than its caches, has already put other data there."""
        if self._junk is not None:
            self._junk.zero_()

    def __call__(self) -> None:
        self.flush()
        self.copies.append(seconds(lambda: self._target.copy_(self._source), self._clock))
        for _ in range(self._flushes):
            self.flush()


def build(shapes: Sequence[Shape], device: torch.device) -> list[Tensor]:
    """Parameters with gradients, float32."""
    params: list[Tensor] = [
        torch.nn.Parameter(torch.empty(shape, device=device).uniform_(-0.05, 0.05)) for shape in shapes
    ]
    for p in params:
        p.grad = torch.empty_like(p).uniform_(-0.05, 0.05)
    return params


def rates(bytes_moved: int, step_seconds: float, copy_bytes: int, copy_seconds: float) -> dict[str, float]:
    """GB/s of a step and of a copy (1 GB = 1e9 bytes), and the first as a share of the second."""
    step_rate, copy_rate = bytes_moved / step_seconds / 1e9, copy_bytes / copy_seconds / 1e9
    return {"gb_per_s": step_rate, "copy_gb_per_s": copy_rate, "share_of_copy": step_rate / copy_rate}


def rounds_for(bytes_moved: int, device: torch.device) -> int:
    """Enough for a steady median; on a CPU about 40 GB of traffic, so that the largest model takes seconds."""
    return 100 if device.type == "cuda" else min(50, max(7, int(4e10 / bytes_moved)))


def measure(benchmark: Any, contender: Contender, shapes: list[Shape], device: torch.device) -> None:
    """Time a contender's step on parameters of these shapes; the numbers go into `benchmark.extra_info`."""
    if benchmark.disabled:
        benchmark.pedantic(contender.make(build(smaller(shapes, 32), device), SCHEDULE))
        return
    params = build(shapes, device)
    elements = sum(p.numel() for p in params)
    step = contender.make(params, SCHEDULE)
    # On a CPU a call's host time can only be seen where there is next to nothing to compute.
    idle = step if device.type == "cuda" else contender.make(build(smaller(shapes, 2**62), device), SCHEDULE)
    for call in (step, idle):
        host_seconds(call, device, 3)  # compiles, makes state, meets untouched memory
    host = host_seconds(idle, device, 20)
    bytes_moved = FLOOR[contender.family] * elements
    before = Round(elements, device, hide=host)
    benchmark.pedantic(step, setup=before, rounds=rounds_for(bytes_moved, device))
    benchmark.extra_info.update(
        parameters=elements,
        tensors=len(params),
        bytes_moved=bytes_moved,
        host_us=1e6 * host,
        **rates(bytes_moved, benchmark.stats.stats.median, before.copy_bytes, median(before.copies)),
    )
