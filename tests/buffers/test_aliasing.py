"""Where flat buffers go wrong: copies, moved and shared parameters, odd layouts, changes from outside."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_legw import SGD, Cosine
from fused_legw.buffers import memory
from tests.support.cases import give_gradients, goes_on_like_one_resumed, legw, make, make_params, run, same, twins


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(backend, params, how):
    optimizer = make(params, backend)
    run(optimizer, range(3), params)
    copied = how(optimizer)
    theirs = copied.param_groups[0]["params"]
    assert not {p.data_ptr() for p in params if p.numel()} & {p.data_ptr() for p in theirs if p.numel()}
    assert copied.steps_applied == 3 and copied.param_groups[0]["schedule"] == legw(Cosine())
    run(copied, range(3, 6), theirs)
    assert optimizer.steps_applied == 3
    run(optimizer, range(3, 6), params)
    same(params, theirs)
    same(optimizer.state_dict()["state"], copied.state_dict()["state"])


def test_deepcopy_of_model_and_optimizer_stay_linked(backend, device):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device)
    optimizer = make(model.parameters(), backend)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    assert [id(p) for p in model_copy.parameters()] == [id(p) for p in optimizer_copy.param_groups[0]["params"]]
    before = twins(list(model.parameters()))
    model_copy(torch.ones(3, 4, device=device)).sum().backward()
    optimizer_copy.step()
    same(list(model.parameters()), before)
    assert not torch.equal(model_copy[0].weight, model[0].weight)


def test_pickles_hold_no_more_than_they_must(backend, device):
    params = make_params(torch.float32, device, [(10,), (100_000,)])
    optimizer = make(params, backend, tile=1024)
    run(optimizer, range(1), params)
    small = {"state": {0: optimizer.state_dict()["state"][0]}}
    file = io.BytesIO()
    torch.save(small, file)
    assert file.tell() < 4000


def test_what_a_part_of_a_flattened_model_weighs(backend, device):
    """Its own bytes: torch.save keeps whole storages, and each parameter has one of its own."""

    def size(x) -> int:
        file = io.BytesIO()
        torch.save(x, file)
        return file.tell()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 1000)).to(device)
    optimizer = make(model.parameters(), backend, tile=1024)
    assert size(model[0].state_dict()) < 4000
    assert size(model.state_dict()) < 500_000
    assert not any(p.untyped_storage().resizable() for p in model.parameters())
    before = twins(list(model.parameters()))
    optimizer.unflatten()
    assert size(model[0].state_dict()) < 4000
    assert all(p.untyped_storage().resizable() for p in model.parameters())
    same(list(model.parameters()), before)
    twin = make(before, backend, tile=1024)
    run(optimizer, range(2), list(model.parameters()))
    run(twin, range(2), before)
    same(list(model.parameters()), before)
    assert size(model[0].state_dict()) < 4000, "and a step does not flatten again"


def test_model_to_another_dtype(backend, device):
    """model.to gives parameters new memory; the optimizer goes on there, its state with it, never on the old copy."""
    model = nn.Linear(5, 7).to(device)
    optimizer = make(model.parameters(), backend)
    params = list(model.parameters())
    run(optimizer, range(2), params)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    model.to(torch.float64)
    exact = twins(params)
    twin = make(exact, backend)
    twin.steps_applied = 2
    for p, m in zip(exact, momentum, strict=True):
        twin.state[p]["momentum_buffer"] = m.double()
    run(optimizer, range(2, 4), params)
    run(twin, range(2, 4), exact)
    same(params, exact)
    assert params[0].dtype == optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float64


@pytest.mark.parametrize("change", ["clone", "transpose"])
def test_replaced_data_is_adopted(backend, params, change):
    twin_params = twins(params)
    optimizer, twin = make(params, backend), make(twin_params, backend, flatten=False)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        run(o, range(2), ps)
    old = params[1].data
    if change == "clone":
        params[1].data = old * 2
    else:
        params[1].data = (old * 2).t().contiguous().t()
    twin_params[1].data.mul_(2)
    kept = old.clone()
    for o, ps in ((optimizer, params), (twin, twin_params)):
        run(o, range(2, 4), ps)
    same(params, twin_params)
    assert torch.equal(old, kept), "the stale memory is not written"
    assert optimizer.steps_applied == 4


def test_swapped_parameters(backend, device):
    """As weight averaging does: p.data is exchanged and exchanged back, also between two parameters of one buffer."""
    a, b = make_params(torch.float32, device, [(20,), (20,)])
    optimizer = make([a, b], backend)
    a.data, b.data = b.data, a.data
    values = twins([a, b])
    twin = make(values, backend)
    run(optimizer, range(2), [a, b])
    run(twin, range(2), values)
    same([a, b], values)


@pytest.mark.parametrize("rebuilt", ["load_state_dict", "add_param_group", "replaced data"])
def test_unflatten_after_a_rebuild(backend, device, rebuilt):
    params = make_params(torch.float32, device)
    optimizer = make(params[:-1], backend)
    if rebuilt == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    elif rebuilt == "add_param_group":
        optimizer.add_param_group(dict(params=params[-1:]))
    else:
        params[0].data = params[0].data.clone()
        run(optimizer, range(1), params)
    optimizer.unflatten()
    storages = [p.untyped_storage() for p in params[:-1]]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(s.nbytes() == p.numel() * 4 for s, p in zip(storages, params, strict=False))
    assert all(p.untyped_storage().resizable() for p in params[:-1] if p.numel())
    assert not any(map(memory.in_buffer, params[:-1]))


def test_channels_last_and_transposed_layouts(backend, device):
    shapes = [(4, 3, 5, 5), (6, 7), (2, 3, 4)]
    plain = make_params(torch.float32, device, shapes)
    odd = [
        plain[0].detach().to(memory_format=torch.channels_last).requires_grad_(),
        plain[1].detach().t().contiguous().t().requires_grad_(),
        plain[2].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_(),
    ]
    strides = [p.stride() for p in odd]
    optimizers = make(plain, backend), make(odd, backend)
    for step in range(4):
        give_gradients(step, plain, odd)  # contiguous gradients for all: another layout than their parameter's
        if step == 3:
            odd[0].grad = odd[0].grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    same(plain, odd)
    assert [p.stride() for p in odd] == strides
    assert [optimizers[1].state[p]["momentum_buffer"].stride() for p in odd] == strides


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_gradients_of_another_layout(backend, device, layout):
    p = torch.zeros(6, 6, device=device, requires_grad=True)
    optimizer = SGD([p], lr=1.0, backend=backend, tile=16)
    values = torch.arange(72.0, device=device).view(6, 12)
    p.grad = {
        "expanded": values[:, :1].expand(6, 6),
        "transposed": values[:, :6].contiguous().t(),
        "sliced": values[:, ::2],
    }[layout]
    optimizer.step()
    same([p.detach()], [-p.grad])


def test_flatten_false_leaves_parameters_alone(backend, params):
    addresses, values = [p.data_ptr() for p in params], twins(params)
    optimizer, twin = make(params, backend, flatten=False), make(values, backend)
    run(optimizer, range(3), params)
    run(twin, range(3), values)
    assert [p.data_ptr() for p in params] == addresses
    same(params, values)


def test_order_and_padding_leave_no_trace(backend, device):
    """The same tensors in another order, on another tile, give the same bits."""
    params = make_params(torch.float32, device)
    other = twins(params)
    optimizers = make(params, backend), make(other[::-1], backend, tile=64)
    for o, ps in zip(optimizers, (params, other), strict=True):
        run(o, range(3), ps)
    same(params, other)


def test_a_failed_group_changes_nothing(backend, params):
    optimizer = make(params, backend)
    run(optimizer, range(2), params)
    place = [p.data_ptr() for p in params]
    with pytest.raises(TypeError, match=r"dtype torch\.complex64"):
        optimizer.add_param_group(dict(params=[torch.zeros(3, dtype=torch.complex64, requires_grad=True)]))
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group(dict(params=[params[2].detach()[10:20].requires_grad_()]))
    assert len(optimizer.param_groups) == 1 and [p.data_ptr() for p in params] == place
    goes_on_like_one_resumed(optimizer, params, range(2, 3), backend)
