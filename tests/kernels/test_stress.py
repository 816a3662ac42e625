"""What relies on order inside a launch: the ticket by which the last program to finish advances the counts.

On a GPU thousands of launches, of many programs with uneven work, beside a second stream's. Elsewhere a few, and the
interpreter runs programs one after another: that exercises this file and finds a wrong count, but no race.
"""

from __future__ import annotations

import math

import pytest
import torch

from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, AdamW
from fused_legw.backends import device_table
from tests.support.cases import give_gradients, make_params, same, twins
from tests.support.graphs import capturing
from tests.support.machine import DEVICE

pytestmark = pytest.mark.gpu

GPU = DEVICE == "cuda"
STEPS, RUNS, TILE = (3000, 100, 1024) if GPU else (3, 1, 16)
UNEVEN = [(1,)] * 1000 + [(2**22,), (999, 1001), (2**20,)] if GPU else [(1,)] * 6 + [(100,), (5, 7)]
# lr(t) = (t + 1) / 4096: sums of it are exact in float32 up to t = 5791, so a count read early or late is a wrong bit.
COUNTING = LEGW(1.0, 1, 1.0, batch_size=1, dataset_size=4096)


class _Load:
    """Matmuls and copies on a second stream. Each call adds some, unless the last ones are still under way."""

    def __init__(self) -> None:
        if GPU:
            self._factor = torch.ones(2048, 2048, device=DEVICE)
            self._product, self._copy = torch.empty_like(self._factor), torch.empty_like(self._factor)
            self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
            torch.cuda.synchronize()

    def __call__(self) -> None:
        if GPU and self._done.query():
            with torch.cuda.stream(self._stream):
                torch.mm(self._factor, self._factor, out=self._product)
                self._copy.copy_(self._product)
                self._done.record()


@pytest.fixture
def load():
    yield _Load()
    if GPU:
        torch.cuda.synchronize()


def _check_counts(optimizer, steps: int) -> None:
    (device,) = optimizer._run.engine.devices
    assert device.step_counts.tolist() == [steps, 0]
    assert [int(ticket) for _, ticket in device._address_tables.values()] == [0] * len(optimizer._run.layout.buckets)
    for bucket in optimizer._run.layout.buckets:
        assert bucket.exact_steps() == [steps] * len(bucket.params)


def _check_weights(optimizer, steps: int) -> None:
    """Every element is the sum of the learning rates, bit for bit; in its master, where it has one."""
    expected = steps * (steps + 1) / 2 / 4096
    for bucket in optimizer._run.layout.buckets:
        exact = [optimizer.state[p].get("master_param", p).detach().flatten() for p in bucket.params]
        wrong = torch.cat(exact) != expected
        assert not wrong.any(), f"{int(wrong.sum())} elements of {bucket.dtype} after {steps} steps"


@pytest.mark.parametrize("how", ["eager", "replayed"])
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float32, torch.bfloat16], [torch.float32, torch.float16, torch.float64]],
    ids=["1 launch", "2 launches", "3 launches"],
)
def test_every_program_reads_the_count_of_its_own_step(triton_device, monkeypatch, load, dtypes, how):
    """Gradients are -1, and momentum and dampening of 1 keep them, so each step adds lr(t) to every weight."""
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    params = [torch.zeros(s, dtype=d, device=triton_device, requires_grad=True) for d in dtypes for s in UNEVEN]
    for p in params:
        p.grad = -torch.ones_like(p)
    optimizer = SGD(params, lr=COUNTING, momentum=1.0, dampening=1.0, tile=TILE, backend="triton")
    optimizer.step()
    advance = optimizer.step
    if how == "replayed":
        with capturing(monkeypatch) as graph:
            optimizer.step()
        advance = graph.replay
    for step in range(2, STEPS + 1):
        load()
        advance()
        if step % (STEPS // 3) == 0:
            _check_weights(optimizer, step)
    _check_counts(optimizer, STEPS)


@pytest.mark.parametrize("options", [dict(), dict(max_grad_norm=1.0, skip_nonfinite=True)], ids=["plain", "clipped"])
@pytest.mark.parametrize("cls", [LARS, LAMB, AdamP])
def test_measured_steps_give_the_same_bits_in_every_run(triton_device, load, cls, options):
    """Norms of one launch are read by the next, however long each takes: under load as without."""
    shapes = UNEVEN[-30:]
    start = [p for dtype in (torch.float32, torch.bfloat16) for p in make_params(dtype, triton_device, shapes)]
    begin = twins(start)
    give_gradients(0, start, skip=False)

    def run(between) -> list[torch.Tensor]:
        params = twins(begin)
        optimizer = cls(params, lr=0.1, weight_decay=0.1, tile=TILE, backend="triton", **options)
        for p, like in zip(params, start, strict=True):
            p.grad = like.grad
        for _ in range(3):
            between()
            optimizer.step()
        _check_counts(optimizer, 3)
        return params

    expected = run(lambda: None)
    assert all(p.isfinite().all() for p in expected) and not torch.equal(expected[-1], begin[-1])
    for _ in range(RUNS):
        same(run(load), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, LARS, LAMB, AdamP])
def test_every_kernel_once(triton_device, cls, dtype):
    """Small tensors, whole tiles and parts of them: what tests/gpu.py lets compute-sanitizer watch."""
    for options in (dict(), dict(max_grad_norm=1.0, skip_nonfinite=True)):
        params = make_params(dtype, triton_device, [(1,), (2048,), (1025,), (37, 3)])
        optimizer = cls(params, lr=COUNTING, weight_decay=0.1, backend="triton", **options)
        for step in range(2):
            give_gradients(step, params, skip=False)
            optimizer.step()
        if options:
            assert math.isfinite(optimizer.grad_norm)
        assert all(p.isfinite().all() for p in params)
        assert optimizer.steps_applied == 2
