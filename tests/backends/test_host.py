"""What a step costs the host: Python calls, counted; and that it sees what moved without any for a tensor."""

from __future__ import annotations

import sys

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW
from fused_legw.backends.group_table import GroupTable
from tests.support.cases import legw, make_params, same, twins

EVERY = [(SGD, dict(momentum=0.9)), (LARS, dict()), (Adam, dict()), (AdamW, dict()), (AdamP, dict()), (LAMB, dict())]
FEW, MANY = 5, 105


def _calls(step) -> int:
    """Python functions called while a step is made."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def _instructions(step) -> int:
    """Python's bytecode instructions executed while a step is made."""
    executed = 0

    def count(frame, event, arg):
        nonlocal executed
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return count

    sys.settrace(count)
    try:
        step()
    finally:
        sys.settrace(None)
    return executed


def _made(cls, device, backend, n, options):
    params = make_params(torch.float32, device, [(3,)] * n)
    optimizer = cls(params, lr=legw(), backend=backend, tile=16, **options)
    for _ in range(3):  # state is made, then what is kept from step to step
        _give(params)
        optimizer.step()
    return params, optimizer


def _give(params):
    for p in params:
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=lambda x: getattr(x, "__name__", None))
def test_no_python_call_for_each_tensor(device, backend, monkeypatch, cls, options):
    """But in ATen's LARS, LAMB and AdamP, which work out something for each."""
    if backend == "triton":
        from legw_kernels import launch

        monkeypatch.setattr(launch, "launch", lambda *args, **constants: None)
    counted = []
    for n in (FEW, MANY):
        params, optimizer = _made(cls, device, backend, n, options)
        _give(params)
        counted.append(_calls(optimizer.step))
    few, many = counted
    each = 12 if backend == "aten" and cls in (LARS, LAMB, AdamP) else 0
    assert many - few <= each * (MANY - FEW)
    assert few < 200 + each * FEW


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_little_python_for_each_tensor(device, backend, monkeypatch, cls):
    """Reading its gradient in a list's comprehension; all else is done by calls of C that take all tensors."""
    if backend == "triton":
        from legw_kernels import launch

        monkeypatch.setattr(launch, "launch", lambda *args, **constants: None)
    counted = []
    for n in (FEW, MANY):
        params, optimizer = _made(cls, device, backend, n, dict())
        _give(params)
        counted.append(_instructions(optimizer.step))
    few, many = counted
    assert many - few <= 6 * (MANY - FEW)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_step_that_makes_no_call_sees_what_moved(device, backend, cls):
    """A parameter's memory, the shape at its address, a gradient's layout, an entry of the state."""
    params, optimizer = _made(cls, device, backend, 4, dict())
    plain = twins(params)
    twin = cls(plain, lr=legw(), backend=backend, tile=16)
    twin.load_state_dict(optimizer.state_dict())
    stale = params[0].data
    before = stale.clone()
    params[0].data = params[0].data.clone()
    for p in (params[1], plain[1]):
        if cls is SGD:  # without state, which would have to be reshaped too
            p.data, p.grad = p.data[:2], None
    _give(params)
    _give(plain)
    params[2].grad = torch.ones(6, device=device)[::2]
    if cls is AdamW:
        for made, tensors in ((optimizer, params), (twin, plain)):
            made.state[tensors[3]]["exp_avg"] = torch.full((3,), 5.0, device=device)
    optimizer.step()
    twin.step()
    same(params, plain)
    assert torch.equal(stale, before) and not torch.equal(params[0], before)


@pytest.mark.parametrize("kind", ["a schedule", "a number"])
def test_group_rows_are_made_only_where_an_option_changed(triton_device, monkeypatch, kind):
    params = make_params(torch.float32, triton_device, [(3,), (4,)])
    lr = legw() if kind == "a schedule" else 0.1
    optimizer = SGD([dict(params=[p], lr=lr) for p in params], momentum=0.9, backend="triton", tile=16)
    made, rows = [], GroupTable._rows
    monkeypatch.setattr(GroupTable, "_rows", lambda *args: made.append(1) or rows(*args))

    def step() -> int:
        made.clear()
        _give(params)
        optimizer.step()
        return len(made)

    assert step() == 1
    assert [step() for _ in range(4)] == [0] * 4
    optimizer.param_groups[1]["weight_decay"] = 0.5
    assert [step() for _ in range(3)] == [1, 0, 0]
    optimizer.param_groups[0]["schedule" if kind == "a schedule" else "lr"] = legw(base_lr=0.2) if lr != 0.1 else 0.2
    assert [step() for _ in range(3)] == [1, 0, 0]


def test_options_that_can_change_in_place_are_read_at_every_step(triton_device):
    """A tensor on the CPU, an LR or one in a tuple, is another value without being another object."""
    params = make_params(torch.float64, triton_device, [(3,)])
    plain = twins(params)
    lr, beta = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    betas = (beta, torch.tensor(0.99, dtype=torch.float64))
    ours = Adam(params, lr=lr, betas=betas, backend="triton", tile=16)
    torchs = torch.optim.Adam(plain, lr=lr, betas=betas, foreach=False)
    for step in range(4):
        lr.fill_(0.1 / (step + 1))
        beta.fill_(0.9 - 0.1 * step)
        _give(params)
        _give(plain)
        ours.step()
        torchs.step()
    torch.testing.assert_close(params, plain, rtol=1e-12, atol=0)
