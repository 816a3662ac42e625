"""SGD's results: torch.optim.SGD's, the float64 reference's, and the schedule's LR in them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fused_legw import SGD, Constant, Cosine, Exponential, MultiStep, Polynomial, reference
from tests.support.cases import error, give_gradients, legw, make_params, twins
from tests.support.machine import INTERPRETED

OPTIONS = [
    dict(),
    dict(weight_decay=0.1),
    dict(momentum=0.9),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, maximize=True),
    dict(momentum=0.5, nesterov=True, weight_decay=0.01),
]
DECAYS = [
    Constant(),
    MultiStep([2, 3.5, 9]),
    Exponential(0.7, 2),
    Exponential(0.9, 1, 0.5, False),
    Polynomial(2),
    Cosine(0.01),
    MultiStep([1, 8], 0.5),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch(backend, device, dtype, options):
    params = make_params(dtype, device)
    theirs = twins(params)
    ours = SGD(params, lr=0.1, backend=backend, tile=32, **options)
    torchs = torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)
    for step in range(20):
        give_gradients(step, params, theirs)
        params[1].requires_grad_(step not in range(5, 9))  # a layer frozen and thawed
        if step in range(5, 9):
            params[1].grad = theirs[1].grad = None
        ours.step()
        torchs.step()
    tolerance = dict(rtol=1e-12, atol=1e-14) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(params, theirs, **tolerance)
    for p, q in zip(params, theirs, strict=True):
        assert set(ours.state.get(p, {})) == {k for k, v in torchs.state.get(q, {}).items() if v is not None}
        for name, value in ours.state.get(p, {}).items():
            torch.testing.assert_close(value, torchs.state[q][name], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_200_scheduled_steps_against_the_float64_reference(backend, device, dtype):
    """Every decay, a group each; per tensor at most twice the float32 reference's error plus 2 ulp."""
    params = make_params(dtype, device, [(5, 7), (64,)] * len(DECAYS))
    single, exact = twins(params), twins(params, torch.float64)

    def groups(tensors: list[Tensor]) -> list[dict]:
        return [
            dict(params=tensors[2 * i : 2 * i + 2], lr=legw(d), momentum=0.5 + i / 20) for i, d in enumerate(DECAYS)
        ]

    options = dict(momentum=0.9, weight_decay=1e-3)
    optimizers = [
        SGD(groups(params), backend=backend, tile=32, **options),
        reference.SGD(groups(single), **options),
        reference.SGD(groups(exact), **options),
    ]
    for step in range(200):
        give_gradients(step, params, single, exact)
        for optimizer in optimizers:
            optimizer.step()
    if dtype == torch.float64:
        assert max(error(params, exact)) < 1e-12
    else:
        for ours, theirs in zip(error(params, exact), error(single, exact), strict=True):
            assert ours <= 2 * theirs + 2 * 2**-23
    assert optimizers[0].steps_applied == optimizers[2].steps_applied == 200
    assert optimizers[0].get_last_lr() == [legw(d)(199) for d in DECAYS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_weights", [True, False])
def test_low_precision(backend, device, dtype, master_weights):
    """float32 momentum, and float32 masters by default: with them the result is float32's, rounded once."""
    params = make_params(dtype, device)
    theirs, single, exact = twins(params), twins(params, torch.float32), twins(params, torch.float64)
    options = dict(lr=legw(Cosine()), momentum=0.9, weight_decay=0.01)
    ours = SGD(params, backend=backend, tile=32, master_weights=master_weights, **options)
    others = [reference.SGD(x, **options) for x in (theirs, single, exact)]
    for step in range(60):
        give_gradients(step, params, theirs, single, exact)
        for optimizer in [ours, *others]:
            optimizer.step()
    # Without masters each step's rounding stays, so single tensors of a few elements differ by luck.
    if master_weights:
        for mine, torchs in zip(error(params, exact), error(theirs, exact), strict=True):
            assert mine <= 2 * torchs
    elif not (INTERPRETED and backend == "triton" and dtype == torch.bfloat16):  # the interpreter truncates to bfloat16
        assert max(error(params, exact)) <= 2 * max(error(theirs, exact))
    for p in params:
        assert ours.state[p]["momentum_buffer"].dtype == torch.float32
        assert ("master_param" in ours.state[p]) == master_weights
    if master_weights:
        masters = [ours.state[p]["master_param"] for p in params]
        for mine, theirs_single in zip(error(masters, exact), error(single, exact), strict=True):
            assert mine <= 2 * theirs_single + 2 * 2**-23


def test_a_group_of_its_own_options_each(backend, device):
    """Groups differ in every option and in where their LR comes from; each follows its own."""
    params = make_params(torch.float64, device, [(20,)] * 5)
    exact = twins(params)

    def groups(tensors: list[Tensor]) -> list[dict]:
        extra = [
            dict(lr=legw(Cosine()), momentum=0.9),
            dict(lr=0.3, maximize=True, weight_decay=0.1),
            dict(lr=torch.tensor(0.2, dtype=torch.float64, device=device), momentum=0.8, dampening=0.5),
            dict(lr=legw(MultiStep([1, 2])), momentum=0.7, nesterov=True),
            dict(lr=torch.tensor(0.125, device=device)),
        ]
        return [dict(params=[p], **options) for p, options in zip(tensors, extra, strict=True)]

    ours, theirs = SGD(groups(params), backend=backend, tile=16), reference.SGD(groups(exact))
    for step in range(30):
        give_gradients(step, params, exact)
        ours.step()
        theirs.step()
    assert max(error(params, exact)) < 1e-12


@pytest.mark.parametrize("tensor", [False, True])
def test_torch_schedulers_drive_a_plain_lr(backend, device, tensor):
    params = make_params(torch.float64, device)
    theirs = twins(params)
    optimizers = [
        SGD(
            params, lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1, momentum=0.9, backend=backend, tile=32
        ),
        torch.optim.SGD(theirs, lr=0.1, momentum=0.9),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in optimizers]
    for step in range(20):
        give_gradients(step, params, theirs)
        for x in itertools.chain(optimizers, schedulers):
            x.step()
    torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-14)


def test_momentum_switched_on_later(backend, device):
    params = make_params(torch.float64, device)
    theirs = twins(params)
    ours, torchs = (
        SGD(params, lr=0.1, dampening=0.5, backend=backend, tile=32),
        torch.optim.SGD(theirs, lr=0.1, dampening=0.5),
    )
    for step in range(9):
        if step == 3:
            ours.param_groups[0]["momentum"] = torchs.param_groups[0]["momentum"] = 0.9
        give_gradients(step, params, theirs)
        ours.step()
        torchs.step()
    torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-14)


def test_closure_and_no_gradients(backend, device):
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = SGD([p], lr=legw(), backend=backend, tile=16)
    assert optimizer.step() is None
    assert optimizer.steps_applied == 0, "a step without any gradient updates nothing"

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert optimizer.steps_applied == 1


def test_autograd_sees_the_update(backend, device):
    """As after any in-place change: a backward pass through what was saved before the step is an error."""
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = SGD([p], lr=0.1, backend=backend, tile=16)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the branch not taken, in the interpreter
def test_a_zero_decay_leaves_infinite_weights_alone(backend, device):
    p = torch.tensor([torch.inf, 1.0], device=device, requires_grad=True)
    optimizer = SGD([p], lr=0.1, backend=backend, tile=16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == [torch.inf, pytest.approx(0.9)]


def test_padding_stays_zero(triton_device):
    params = make_params(torch.bfloat16, triton_device)
    optimizer = SGD(params, lr=legw(), momentum=0.9, weight_decay=0.1, tile=32, backend="triton")
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    (bucket,) = optimizer._run.layout.buckets
    for flat in (bucket.weights, *bucket.state.values()):
        assert sum((view != 0).sum() for view in [flat]) <= sum(p.numel() for p in params)


def test_the_reference_takes_the_fused_ones_arguments_and_no_others():
    (p,) = make_params(torch.float64, "cpu", [(3,)])
    reference.SGD([p], lr=0.1, momentum=0.9, backend="aten", tile=32, flatten=False, fused=True, foreach=None)
    with pytest.raises(TypeError, match="unexpected argument 'momentun'"):
        reference.SGD([p], lr=0.1, momentun=0.9)
