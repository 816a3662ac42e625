"""`verify` believes a correct optimizer, and no planted defect."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fused_legw import LEGW, SGD, Cosine, verify

SHAPES = [(), (0,), (1,), (17,), (3, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCHEDULE = LEGW(0.1, 16, 0.5, batch_size=64, dataset_size=320, epochs=8, decay=Cosine())


def sgd(cls: type[SGD], backend: str | None = None):
    return lambda params: cls(params, lr=SCHEDULE, momentum=0.9, weight_decay=1e-2, backend=backend, tile=16)


class WrongMomentum(SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["momentum"] = 0.899
        super().step(closure)
        for group in self.param_groups:
            group["momentum"] = 0.9


class FrozenLR(SGD):
    """Every update at the first one's LR, with the count kept right."""

    def step(self, closure=None):
        t = self.steps_applied
        self.steps_applied = 0
        super().step(closure)
        self.steps_applied = t + 1


class CountsTwice(SGD):
    """The schedule runs ahead by one."""

    def step(self, closure=None):
        super().step(closure)
        self.steps_applied += 1


class LastSegmentForgotten(SGD):
    def step(self, closure=None):
        self.param_groups[-1]["params"][-1].grad = None
        super().step(closure)


class Poisoned(SGD):
    """A NaN in one element, gone by the next step."""

    kept = None

    def step(self, closure=None):
        p = self.param_groups[0]["params"][3]
        if self.kept is not None:
            p.data.copy_(self.kept)
        super().step(closure)
        self.kept = p.detach().clone() if self.steps_applied == 5 else None
        if self.kept is not None:
            p.data[2] = float("nan")


class MisreportedLR(SGD):
    def get_last_lr(self):
        return [lr * (1 + 1e-15) for lr in super().get_last_lr()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_correct_optimizer_passes(dtype, backend, device):
    result = verify(sgd(SGD, backend), SHAPES, 50, dtype=dtype, device=device)
    assert result.passed, str(result)
    assert (result.optimizer, result.backend, result.dtype) == ("SGD", backend, str(dtype).removeprefix("torch."))
    assert (result.steps, result.steps_applied, result.lr_error) == (50, 50, 0)
    assert [t.shape for t in result.tensors] == SHAPES
    assert result.tensors[1].error == 0
    assert all(t.error > 0 for t in result.tensors[3:]) or dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broken", [FrozenLR, LastSegmentForgotten])
def test_a_broken_optimizer_fails_in_every_dtype(broken, dtype, backend, device):
    assert not verify(sgd(broken, backend), SHAPES, 30, dtype=dtype, device=device).passed


@pytest.mark.parametrize("broken", [WrongMomentum, Poisoned])
def test_a_slightly_broken_optimizer_fails(broken, backend, device):
    result = verify(sgd(broken, backend), SHAPES, 30, device=device)
    assert not result.passed and not result.worst.passed
    assert result.lr_error == 0 and result.steps_applied == 30
    assert "FAILED" in str(result)


def test_a_wrong_count_or_a_misreported_lr_fails(backend, device):
    result = verify(sgd(CountsTwice, backend), SHAPES, 10, device=device)
    assert not result.passed and result.steps_applied == 20 and result.lr_error > 0
    without_schedule = verify(
        lambda params: CountsTwice(params, 0.1, backend=backend, tile=16), SHAPES, 10, device=device
    )
    assert not without_schedule.passed and without_schedule.lr_error == 0
    assert all(t.passed for t in without_schedule.tensors)
    result = verify(sgd(MisreportedLR, backend), SHAPES, 10, device=device)
    assert not result.passed and all(t.passed for t in result.tensors) and 0 < result.lr_error < 1e-15


def test_groups_with_and_without_schedules_and_a_resumed_run(backend, device):
    def make(params):
        groups = [
            {"params": params[::2], "lr": SCHEDULE, "momentum": 0.9, "nesterov": True},
            {"params": params[1::2], "lr": torch.tensor(0.05, dtype=torch.float64), "dampening": 0.5, "maximize": True},
        ]
        optimizer = SGD(groups, backend=backend, tile=16)
        optimizer.steps_applied = 30
        return optimizer

    result = verify(make, SHAPES, 15, dtype=torch.float64, device=device)
    assert result.passed, str(result)
    assert result.steps_applied == 15


def test_a_module_is_copied_and_its_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    module[2].weight.requires_grad_(False)
    before, addresses = copy.deepcopy(module.state_dict()), [p.data_ptr() for p in module.parameters()]
    random_state = torch.get_rng_state()
    result = verify(sgd(SGD), module, 10)
    assert result.passed, str(result)
    assert [t.name for t in result.tensors] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert addresses == [p.data_ptr() for p in module.parameters()]
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_the_result_as_text_and_as_json():
    result = verify(sgd(SGD), SHAPES, 5)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["passed"] is True and values["lr_error"] == 0 and len(values["tensors"]) == 5
    assert values["worst"] in values["tensors"]
    lines = str(result).splitlines()
    assert lines[0] == f"SGD ({result.backend}, float32) against the float64 reference: passed"
    assert lines[3].split()[:2] == ["0", "scalar"] and lines[7].split()[:2] == ["4", "3×5"]


def test_the_same_seed_gives_the_same_result():
    assert verify(sgd(SGD), SHAPES, 5, seed=1) == verify(sgd(SGD), SHAPES, 5, seed=1)
    assert verify(sgd(SGD), SHAPES, 5, seed=1) != verify(sgd(SGD), SHAPES, 5, seed=2)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_steps_must_be_positive(steps):
    with pytest.raises(ValueError, match=f"^steps must be a positive integer, got {steps!r}$"):
        verify(sgd(SGD), SHAPES, steps)


@pytest.mark.parametrize("source", [[], "ab", [3, 5], nn.ReLU()], ids=str)
def test_there_must_be_parameters(source):
    with pytest.raises(ValueError, match=r"^module_or_shapes must "):
        verify(sgd(SGD), source, 5)


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(ValueError, match=r"^dtype must be one of .*, got torch\.complex64$"):
        verify(sgd(SGD), SHAPES, 5, dtype=torch.complex64)


@pytest.mark.parametrize("make", [lambda params: None, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_only_fused_optimizers_are_verified(make):
    with pytest.raises(TypeError, match="make_optimizer must return an optimizer of fused_legw, got "):
        verify(make, SHAPES, 5)


def test_the_optimizer_must_have_the_parameters_it_was_given():
    with pytest.raises(ValueError, match=r"exactly the parameters .* without 1 of them and with 0 others"):
        verify(lambda params: SGD(params[1:]), SHAPES, 5)
    with pytest.raises(ValueError, match="without 0 of them and with 1 others"):
        verify(lambda params: SGD([*params, nn.Parameter(torch.ones(3))]), SHAPES, 5)
