"""PyTorch's own optimizer inputs (its test suite's OptimizerInfo): every one of them, step by step beside torch.

The inputs hold no assertions, the comparisons are ours. Left out: sparse, complex and differentiable.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fused_legw import SGD, Adam, AdamW
from tests.support.cases import error, give_gradients, twins
from tests.support.machine import INTERPRETED

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's fixtures need expecttest")
INFOS = {info.name: info for info in common.optim_db}
STEPS, FROZEN = 20, range(5, 9)
PER_GROUP = 2  # tensors; the second is the layer frozen
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

every_optimizer = pytest.mark.parametrize("cls", [SGD, Adam, AdamW], ids=lambda cls: cls.__name__)


def torchs(cls: type) -> type:
    return INFOS[cls.__name__].optim_cls


def inputs(cls: type, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The keyword arguments of every input: torch lists those for other devices apart, ours take them on all.

    In float64 tensor hyper-parameters are float64 too: torch works with them in their own dtype.
    """
    listed = [x for device in ("cuda", "mps") for x in INFOS[cls.__name__].optim_inputs_func(device, dtype)]
    every = list({x.desc: x.kwargs for x in listed}.values())

    def widened(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        return value.double() if isinstance(value, Tensor) and dtype == torch.float64 else value

    return [{name: widened(value) for name, value in kwargs.items()} for kwargs in every]


def loops(kwargs: dict[str, Any]) -> dict[str, Any]:
    """For torch's for-loop class. `capturable` it refuses on CPUs, and makes bias corrections float32 elsewhere."""
    return {name: value for name, value in kwargs.items() if name != "capturable"} | dict(foreach=False)


def starts(dtype: torch.dtype, device: str, groups: int) -> list[Tensor]:
    """Of tiny tensors, one is of two tiles."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(5,), (3, 6), *[(6,), (2, 4)] * (groups - 1)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def pair(cls: type, every: list[dict[str, Any]], lists: list[list[Tensor]], **own: Any) -> list[torch.optim.Optimizer]:
    """Ours for the first list, torch's for the others: each input is a group, and the first gives the defaults too."""

    def groups(tensors: list[Tensor], options: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [dict(params=tensors[i * PER_GROUP : (i + 1) * PER_GROUP], **kw) for i, kw in enumerate(options)]

    theirs = list(map(loops, every))
    return [
        cls(groups(lists[0], every), **every[0], tile=16, **own),
        *(torchs(cls)(groups(tensors, theirs), **theirs[0]) for tensors in lists[1:]),
    ]


def train(optimizers: list[torch.optim.Optimizer], lists: list[list[Tensor]]) -> None:
    """20 steps with missing gradients, a layer of each group frozen and thawed."""
    for step in range(STEPS):
        give_gradients(step, *lists)
        for tensors in lists:
            for p in tensors[1::PER_GROUP]:
                p.requires_grad_(step not in FROZEN)
                p.grad = p.grad if p.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()


def plain(value: Any) -> Any:
    """A hyper-parameter's numbers."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, Tensor) else value


def assert_same_groups(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Every key of torch's groups, with its value."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        ignored = {"params", "foreach", "capturable"}
        assert other.keys() <= mine.keys()
        assert {k: plain(mine[k]) for k in other.keys() - ignored} == {
            k: plain(other[k]) for k in other.keys() - ignored
        }
        assert all(isinstance(mine[k], type(other[k])) for k in other.keys() - ignored)


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, **tolerance: float) -> None:
    """State dicts with the same keys and values."""
    mine, others = ours.state_dict()["state"], theirs.state_dict()["state"]
    others = {i: {k: v for k, v in state.items() if v is not None} for i, state in others.items()}
    assert {i: s.keys() for i, s in mine.items() if s} == {i: s.keys() for i, s in others.items() if s}
    for i, state in others.items():
        for name, value in state.items():
            torch.testing.assert_close(mine[i][name], value, check_device=name != "step", **tolerance)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_input(cls, backend, device, dtype):
    every = inputs(cls, dtype)
    params = starts(dtype, device, len(every))
    theirs = twins(params)
    optimizers = pair(cls, every, [params, theirs], backend=backend)
    assert_same_groups(*optimizers)
    train(optimizers, [params, theirs])
    tolerance = dict(rtol=1e-12, atol=1e-14) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(params, theirs, **tolerance)
    assert_same_state(*optimizers, **tolerance)
    assert_same_groups(*optimizers)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_weights", [True, False])
def test_every_input_in_low_precision(cls, backend, device, dtype, master_weights):
    """At most twice torch's own error against float64; float32 masters are held to twice that of torch in float32."""
    truncates = INTERPRETED and backend == "triton" and dtype == torch.bfloat16  # the interpreter's conversion
    if truncates and not master_weights:
        pytest.skip("the interpreter truncates to bfloat16, where hardware rounds")
    every = inputs(cls, dtype)
    params = starts(dtype, device, len(every))
    lists = [params, twins(params), twins(params, torch.float32), twins(params, torch.float64)]
    optimizers = pair(cls, every, lists, backend=backend, master_weights=master_weights)
    train(optimizers, lists)
    _, theirs, single, exact = lists
    if master_weights:
        masters = [optimizers[0].state[p].get("master_param", p) for p in params]
        for mine, other in zip(error(masters, exact), error(single, exact), strict=True):
            assert mine <= 2 * other + 2 * 2**-23
        if not truncates:
            assert all(a <= 2 * b for a, b in zip(error(params, exact), error(theirs, exact), strict=True))
    else:  # each step's rounding stays, so single tensors of a few elements differ by luck
        assert sum(error(params, exact)) <= 2 * sum(error(theirs, exact))
    for i, p in enumerate(params):
        for name in optimizers[0].state[p].keys() & set(MOMENTS):
            mine, other, true = (optimizers[k].state[lists[k][i]][name] for k in (0, 1, 3))
            assert mine.dtype == torch.float32
            if master_weights:
                assert error([mine], [true])[0] <= 2 * error([other], [true])[0]


@every_optimizer
def test_each_input_alone(cls, backend, device):
    """As constructor arguments; `foreach` and `fused` change no bit."""

    def trained(make: type, **kwargs: Any) -> tuple[torch.optim.Optimizer, Tensor]:
        p = starts(torch.float64, device, 1)[0]
        optimizer = make([p], **kwargs)
        for step in range(2):
            give_gradients(step, [p])
            optimizer.step()
        return optimizer, p

    for kwargs in inputs(cls, torch.float64):
        own = dict(backend=backend, tile=16, **kwargs)
        optimizer, p = trained(cls, **own)
        _, q = trained(torchs(cls), **loops(kwargs))
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        wanted = torchs(cls)([q], **kwargs).defaults
        assert {k: plain(optimizer.defaults[k]) for k in wanted} == {k: plain(v) for k, v in wanted.items()}
        for flag in ("foreach", "fused"):
            if flag == "fused" or "capturable" in kwargs or not isinstance(kwargs.get("lr"), Tensor):
                assert torch.equal(p, trained(cls, **own, **{flag: True})[1])


@every_optimizer
@pytest.mark.parametrize("tensor", [False, True])
def test_torchs_schedulers(cls, backend, device, tensor):
    """The lists of schedulers that torch tests each optimizer with, driving ours and theirs."""
    for makers in INFOS[cls.__name__].scheduler_inputs:
        params = starts(torch.float64, device, 1)[:1]
        theirs = twins(params)
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizers = [
            cls(params, lr=lr, backend=backend, tile=16),
            torchs(cls)(theirs, lr=lr.clone() if tensor else lr, foreach=False),
        ]
        schedulers = [make(optimizer) for optimizer in optimizers for make in makers]
        for step in range(12):
            give_gradients(step, params, theirs)
            for optimizer in optimizers:
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-14)
        assert plain(optimizers[0].param_groups[0]["lr"]) == plain(optimizers[1].param_groups[0]["lr"])
