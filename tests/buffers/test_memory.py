"""Storages: each parameter and state has its own, whoever moved it; what may be left alone; parameters with gaps."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from fused_legw import LAMB, SGD, AdamW
from fused_legw.buffers import memory
from tests.support.cases import give_gradients, make, make_params, run, same, twins

SHAPES = [(1, 4), (8, 1, 3, 3), (), (0,), (5, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_strides_and_get_storages(backend, device, dtype):
    params = make_params(dtype, device, SHAPES)
    with torch.no_grad():
        params[1].data = params[1].detach().contiguous(memory_format=torch.channels_last)
    strides, before = [p.stride() for p in params], twins(params)
    optimizer = AdamW(params, lr=0.1, backend=backend, tile=16)
    run(optimizer, range(1), params)
    assert [p.stride() for p in params] == strides
    for p in params:
        for tensor in (p, *optimizer.state[p].values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.numel() or not tensor.untyped_storage().resizable()
    twin = AdamW(before, lr=0.1, backend=backend, tile=16, flatten=False)
    run(twin, range(1), before)
    same(params, before)


def test_no_storage_of_one_is_another_s(device, backend):
    a, b = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = make([a, b], backend)
    run(optimizer, range(1), [a, b])
    value = b.detach().clone()
    old = a.data
    a.data = a.data.clone()
    for tensor in (old, optimizer.state[a]["momentum_buffer"]):
        with pytest.raises(RuntimeError, match="not resizable"):
            tensor.untyped_storage().resize_(0)
    assert torch.equal(b, value)


def test_unflatten_of_one_holds_for_all(backend, device):
    params = make_params(torch.float32, device, [(20,), (3, 4)])
    first = make(params, backend)
    second = make(params, backend, flatten=False)
    assert all(map(memory.in_buffer, params))
    second.unflatten()
    for optimizer in (first, second, first):
        run(optimizer, range(1), params)
        assert all(p.untyped_storage().resizable() for p in params)
    make(params, backend)
    assert all(map(memory.in_buffer, params)), "a newly made one moves them"


def test_a_buffer_outlives_its_optimizer_and_is_known(backend, device):
    params = make_params(torch.float32, device, [(20,), (3, 4)])
    make(params, backend)
    gc.collect()
    places = [p.data_ptr() for p in params]
    second = make(params, backend)
    assert [p.data_ptr() for p in params] == places
    second.unflatten()
    assert not any(map(memory.in_buffer, params))


def test_cleared_optimizers_let_go(backend, device):
    model = nn.Linear(3, 4).to(device)
    optimizer = make(model.parameters(), backend)
    run(optimizer, range(2), list(model.parameters()))
    seen = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(optimizer._run.layout.buckets[0].weights)]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    del model
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert optimizer.steps_applied == 2


def test_state_in_shared_memory_is_refused():
    (p,) = make_params(torch.float32, "cpu", [(4,)])
    optimizer = make([p], "aten")
    run(optimizer, range(1), [p])
    before = p.detach().clone()
    optimizer.state[p]["momentum_buffer"] = torch.ones(4).share_memory_()
    with pytest.raises(ValueError, match=r"\['momentum_buffer'\] is in shared memory"):
        run(optimizer, range(1, 2), [p])
    optimizer.state[p]["momentum_buffer"] = torch.ones(4)
    run(optimizer, range(1, 2), [p])
    optimizer.state[p]["momentum_buffer"].share_memory_()
    now = p.detach().clone()
    with pytest.raises(ValueError, match=r"\['momentum_buffer'\] is in shared memory"):
        run(optimizer, range(2, 3), [p])
    assert torch.equal(p, now) and not torch.equal(p, before)


def test_shared_state_that_is_loaded_is_copied_in():
    (p,), (q,) = make_params(torch.float32, "cpu", [(4,)]), make_params(torch.float32, "cpu", [(4,)])
    one, other = make([p], "aten"), make([q], "aten")
    run(one, range(2), [p])
    stored = one.state_dict()
    stored["state"][0]["momentum_buffer"].share_memory_()
    other.load_state_dict(stored)
    assert not other.state[q]["momentum_buffer"].is_shared()
    same([other.state[q]["momentum_buffer"]], [one.state[p]["momentum_buffer"]])


def test_a_state_view_with_other_memory_is_taken(backend, device):
    (p,), (q,) = make_params(torch.float32, device, [(4,)]), make_params(torch.float32, device, [(4,)])
    ours, wanted = make([p], backend), make([q], backend)
    for optimizer, x in ((ours, p), (wanted, q)):
        run(optimizer, range(1), [x])
    view = ours.state[p]["momentum_buffer"]
    view.data = view.data * 3
    wanted.state[q]["momentum_buffer"].mul_(3)
    for optimizer, x in ((ours, p), (wanted, q)):
        run(optimizer, range(1, 3), [x])
    same([p], [q])


ODD = {
    "int8": lambda: torch.ones(4, dtype=torch.int8),
    "uint8": lambda: torch.ones(4, dtype=torch.uint8),
    "int64": lambda: torch.ones(4, dtype=torch.int64),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "meta": lambda: torch.ones(4, device="meta"),
    "expanded": lambda: torch.ones(1).expand(4),
    "strided": lambda: torch.ones(8)[::2],
    "sparse": lambda: torch.ones(4).to_sparse(),
}


@pytest.mark.parametrize("kind", ODD)
def test_frozen_parameters_of_any_kind_are_left_alone(kind):
    (w,), (twin,) = make_params(torch.float32, "cpu", [(3,)]), make_params(torch.float32, "cpu", [(3,)])
    frozen = nn.Parameter(ODD[kind](), requires_grad=False)
    ours, plain = SGD([frozen, w], lr=0.1, momentum=0.9), torch.optim.SGD([frozen, twin], lr=0.1, momentum=0.9)
    for step in range(3):
        give_gradients(step, [w], [twin])
        ours.step()
        plain.step()
    torch.testing.assert_close(w, twin)
    assert frozen not in ours.state and list(ours.state_dict()["state"]) == [1]
    SGD([frozen, w], lr=0.1, momentum=0.9).load_state_dict(ours.state_dict())
    if kind != "sparse":  # torch cannot copy such a parameter
        copy.deepcopy(ours)


def test_a_lazy_parameter_is_left_alone_until_it_is_made():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 5)).sum().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model[0].weight, before - 0.1 * model[0].weight.grad)


def test_one_left_alone_is_judged_once_it_has_a_gradient():
    (w,) = make_params(torch.float32, "cpu", [(3,)])
    odd = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    optimizer = SGD([w, odd], lr=0.1)
    odd.requires_grad_()
    give_gradients(0, [w])
    before = w.detach().clone()
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[1\] has dtype torch.complex64"):
        optimizer.step()
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [SGD, AdamW, LAMB])
def test_a_slice_is_updated_where_it_lies(backend, device, cls, dtype):
    whole = torch.randn(6, 10, device=device).to(dtype)
    neighbours = whole.clone()
    parts = [nn.Parameter(whole[:, :3]), nn.Parameter(whole[:, 3:7])]
    dense = [nn.Parameter(p.detach().clone()) for p in parts]
    address = [p.data_ptr() for p in parts]
    ours, twin = (cls(x, lr=0.1, backend=backend, tile=16, max_grad_norm=1.0) for x in (parts, dense))
    for step in range(3):
        give_gradients(step, parts, dense)
        ours.step()
        twin.step()
    same(parts, dense)
    same(ours.state_dict()["state"], twin.state_dict()["state"])
    assert [p.data_ptr() for p in parts] == address
    assert torch.equal(whole[:, 7:], neighbours[:, 7:]) and torch.equal(whole[:, :3], parts[0])
    assert not torch.equal(whole[:, :7], neighbours[:, :7])
    same(list(ours.grad_norms().values()), list(twin.grad_norms().values()))


def test_parameters_that_share_elements_are_refused():
    whole = torch.zeros(6, 10)
    with pytest.raises(ValueError, match="share memory"):
        SGD([nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 3:7])], lr=0.1)


def test_files_hold_their_own_bytes(backend, device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 1000)).to(device)
    optimizer = make(model.parameters(), backend, tile=1024)
    run(optimizer, range(1), list(model.parameters()))
    for small in (model[0].weight, optimizer.state[model[0].weight]):
        file = io.BytesIO()
        torch.save(small, file)
        assert file.tell() < 4000
