"""The LR that the kernel works out: a parameter of 0 with gradient -1 is the LR itself after one step of SGD."""

from __future__ import annotations

import math

import pytest
import torch

from fused_legw import LEGW, SGD, Constant, Cosine, Exponential, MultiStep, Polynomial

RECIPE = dict(base_lr=0.1, base_batch_size=32, base_warmup_epochs=0.5, batch_size=128, dataset_size=1000, epochs=12)
# W = 15.625 and T = 93.75 updates, 7.8125 an epoch; then far beyond.
UPDATES = [0, 1, 14, 15, 16, 17, 31, 32, 54, 55, 78, 79, 92, 93, 94, 95, 1000, 2**31, 2**40]
DECAYS = [
    Constant(),
    MultiStep([]),
    MultiStep([7], 0.5),
    MultiStep([i / 10 for i in range(1, 101)], 0.95),
    Exponential(0.5, 4),
    Exponential(1 / 1.15, 3, 0.5),
    Exponential(1 - 1e-11, 4, 1.5, staircase=False),
    Exponential(0.9, 4, 1.5, staircase=False),
    Polynomial(),
    Polynomial(2),
    Polynomial(0.5, end_lr=0.01),
    Polynomial(2, span="whole"),
    Cosine(),
    Cosine(0.02),
]


class Probe:
    """One parameter a schedule, each in a param group of its own, in one launch of the kernel."""

    def __init__(self, schedules: list[LEGW | float], dtype: torch.dtype, device: str) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device)) for _ in schedules]
        groups = [{"params": [p], "lr": schedule} for p, schedule in zip(self.params, schedules, strict=True)]
        self.optimizer = SGD(groups, backend="triton", tile=16)
        for p in self.params:
            p.grad = -torch.ones_like(p)

    def lrs(self, t: int) -> list[float]:
        """Each group's LR of the update after t completed ones."""
        for p in self.params:
            p.data.zero_()
        self.optimizer.steps_applied = t
        self.optimizer.step()
        assert self.optimizer.steps_applied == t + 1
        return [p.item() for p in self.params]


def within(dtype: torch.dtype, lr: float) -> object:
    """float64: the formulas' own rounding. float32: one rounding of the result, and its underflow."""
    return (
        pytest.approx(lr, rel=1e-12, abs=1e-300) if dtype == torch.float64 else pytest.approx(lr, rel=1e-6, abs=1e-38)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: str(decay)[:60])
def test_lr_in_the_kernel(decay, dtype, triton_device):
    schedule = LEGW(**RECIPE, decay=decay)
    probe = Probe([schedule], dtype, triton_device)
    for t in UPDATES:
        (lr,) = probe.lrs(t)
        assert lr == within(dtype, schedule(t)), t


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_group_has_its_own_schedule_and_milestones(dtype, triton_device):
    schedules = [LEGW(**RECIPE, decay=decay) for decay in DECAYS]
    lrs = [0.25, *schedules[:3], 0.5, *schedules[3:], schedules[2]]
    probe = Probe(lrs, dtype, triton_device)
    for t in (0, 15, 16, 55, 93, 2**31):
        expected = [lr(t) if isinstance(lr, LEGW) else lr for lr in lrs]
        assert probe.lrs(t) == [within(dtype, lr) for lr in expected], t


def test_no_warmup_and_whole_warmup_in_the_kernel(triton_device):
    none = LEGW(**{**RECIPE, "base_warmup_epochs": 0}, decay=Cosine())
    whole = LEGW(0.1, 32, 0.5, batch_size=32, dataset_size=640, epochs=3, decay=Polynomial(2))
    assert (none.warmup_steps, whole.warmup_steps) == (0, 10)
    probe = Probe([none, whole], torch.float64, triton_device)
    for t in (0, 1, 8, 9, 10, 11, 59, 60, 61):
        assert probe.lrs(t) == [within(torch.float64, none(t)), within(torch.float64, whole(t))], t


@pytest.mark.parametrize("decay", [Polynomial(2), Cosine()], ids=str)
def test_near_the_end_of_a_long_run_no_digits_are_lost(decay, triton_device):
    schedule = LEGW(0.1, 1, 5, batch_size=1, dataset_size=1000, epochs=1000.0005, decay=decay)
    probe = Probe([schedule], torch.float64, triton_device)
    for t in (999_000, 999_999, 1_000_000, 1_000_001):
        assert probe.lrs(t) == [within(torch.float64, schedule(t))], t


@pytest.mark.parametrize("decay", [Polynomial(2), Cosine(), Exponential(0.5, 2**30, 2**33)], ids=str)
def test_counts_past_float32_and_int32_are_exact(decay, triton_device):
    schedule = LEGW(0.1, 1, 5, batch_size=1, dataset_size=1, epochs=2**40, decay=decay)
    probe = Probe([schedule], torch.float64, triton_device)
    for t in (2**24 + 1, 2**30 - 1, 2**31 + 1, 2**40 - 3, 2**40 - 1):
        assert probe.lrs(t) == [within(torch.float64, schedule(t))], t


def test_a_growing_rate(triton_device):
    schedule = LEGW(**RECIPE, decay=Exponential(1.5, 0))
    probe = Probe([schedule], torch.float64, triton_device)
    for t in (20, 1000, 10_000, 2**40):
        assert probe.lrs(t) == [within(torch.float64, schedule(t))], t
    assert schedule(2**40) == pytest.approx(0.2 * math.exp(700), rel=1e-12)  # where the host stops short of overflow


def test_milestones_past_float32_and_int32_are_exact(triton_device):
    schedule = LEGW(0.1, 1, 0, batch_size=1, dataset_size=1, decay=MultiStep([2**24 + 1, 2**31, 2**40], 0.5))
    probe = Probe([schedule], torch.float64, triton_device)
    for i, milestone in enumerate((2**24 + 1, 2**31, 2**40)):
        assert probe.lrs(milestone - 1) == [pytest.approx(0.1 * 0.5**i, rel=1e-14)]
        assert probe.lrs(milestone) == [pytest.approx(0.1 * 0.5 ** (i + 1), rel=1e-14)]


def test_scheduled_steps_follow_the_schedule_and_compile_once(triton_device):
    from legw_kernels.update_pass import update_kernel

    schedule = LEGW(**RECIPE, decay=Cosine())
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=triton_device))
    p.grad = -torch.ones_like(p)
    optimizer = SGD([p], lr=schedule, backend="triton", tile=16)
    total, compiled = 0.0, []
    for t in range(20):
        optimizer.step()
        total += schedule(t)
        assert optimizer.get_last_lr() == [schedule(t)]
        assert p.item() == pytest.approx(total, rel=1e-12), t
        caches = getattr(update_kernel, "device_caches", {})  # the interpreter has none
        compiled.append([len(cache[0]) for cache in caches.values()])
    assert compiled == compiled[:1] * 20


def test_host_and_kernel_share_their_formulas(triton_device):
    """Each formula stands once: the kernel's device functions are the code objects that the host calls."""
    from legw_kernels import formulas, program

    for name in ("sin_half_pi", "decay_factor", "learning_rate"):
        formula, device_function = getattr(formulas, name), getattr(program, f"_{name}")
        assert device_function.fn.__code__ is formula.__code__
