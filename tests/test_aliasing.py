"""Where flat buffers go wrong: copies, moved and shared parameters, odd layouts, changes from outside."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from test_sgd import give_gradients, legw, make_params, twins
from torch import Tensor, nn

from fused_legw import SGD, Cosine


def make(params, backend, **options) -> SGD:
    return SGD(
        params,
        **dict(lr=legw(Cosine()), momentum=0.9, weight_decay=0.01, dampening=0.2, tile=16, backend=backend) | options,
    )


def run(optimizer: SGD, steps: range, *lists: list[Tensor]) -> None:
    for step in steps:
        give_gradients(step, *lists)
        optimizer.step()


def same(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def params(request, device) -> list[Tensor]:
    return make_params(request.param, device)


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
    """torch.save keeps whole storages, so a part drags the flat buffer along; unflatten() ends that."""

    def size(x) -> int:
        file = io.BytesIO()
        torch.save(x, file)
        return file.tell()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 1000)).to(device)
    optimizer = make(model.parameters(), backend, tile=1024)
    assert size(model[0].state_dict()) > 400_000
    assert size(model.state_dict()) < 500_000, "the whole model holds the buffer once"
    before = twins(list(model.parameters()))
    optimizer.unflatten()
    assert size(model[0].state_dict()) < 4000
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


def test_weights_changed_in_place_from_outside(backend, params):
    """model.load_state_dict, weight averaging, an initialiser: what stands in the parameter counts, masters follow."""
    optimizer = make(params, backend)
    run(optimizer, range(2), params)
    for p in params:
        p.data.add_(1.0)  # unseen by version counters
    values = twins(params)
    twin = make(values, backend)
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, range(2, 4), params)
    run(twin, range(2, 4), values)
    same(params, values)
    for p, q in zip(params, make_params(params[0].dtype, params[0].device), strict=True):
        assert p.numel() == 0 or (p - q).abs().mean() > 0.5, "the change was not undone"


def test_a_master_survives_as_long_as_its_weight_is_its_rounding(backend, device):
    p = torch.ones(8, dtype=torch.bfloat16, device=device, requires_grad=True)
    optimizer = SGD([p], lr=1e-4, tile=16, backend=backend)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[p]["master_param"], torch.full((8,), 0.995, device=device), rtol=1e-5, atol=0
    )


def test_state_replaced_or_cleared_by_the_user(backend, params):
    optimizer = make(params, backend)
    run(optimizer, range(2), params)
    replacement = torch.ones_like(params[2], dtype=torch.float32)
    optimizer.state[params[2]]["momentum_buffer"] = replacement
    del optimizer.state[params[0]]
    values = twins(params)
    twin = make(values, backend)
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, range(2, 4), params)
    run(twin, range(2, 4), values)
    same(params, values)
    assert torch.equal(replacement, torch.ones_like(replacement)), "the user's tensor is copied, not written"


def _aliased(device: str) -> dict[str, tuple[torch.Tensor, Tensor]]:
    """A parameter that has a whole storage, and the other tensor that refers to it."""
    import numpy as np

    x, holder = torch.ones(40, device=device), nn.Linear(10, 4, bias=False).to(device)
    cases = {"tensor": (nn.Parameter(x), x), "state dict": (holder.weight, holder.state_dict()["weight"])}
    if device == "cpu":
        array = np.ones(40, dtype=np.float32)
        cases["numpy"] = nn.Parameter(torch.from_numpy(array)), torch.from_numpy(array)
    return cases


@pytest.mark.parametrize("case", ["tensor", "state dict", "numpy"])
def test_memory_that_someone_else_refers_to_is_not_moved(backend, device, case):
    cases = _aliased(device)
    if case not in cases:
        pytest.skip("NumPy's arrays are on the CPU")
    p, other = cases[case]
    optimizer = SGD([p], lr=0.5, tile=16, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    same([other], [p.detach()])


def test_modules_parameters_are_moved(backend, device):
    """The usual case is not taken for an alias."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8, 2), nn.BatchNorm1d(8)).to(device)
    optimizer = make(model.parameters(), backend)
    (bucket,) = optimizer._layout.buckets
    inside = [p.untyped_storage().data_ptr() == bucket.weights.data_ptr() for p in model.parameters()]
    assert sum(inside) >= 4 and (
        device != "cpu" or all(inside)
    )  # cuDNN keeps the LSTM's weights in a storage of its own


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
    assert not optimizer._layout._weights


def test_masters_go_when_the_parameters_are_float32(backend, device):
    model = nn.Linear(4, 4).to(device, torch.bfloat16)
    optimizer = make(model.parameters(), backend)
    run(optimizer, range(1), list(model.parameters()))
    model.float()
    run(optimizer, range(1, 2), list(model.parameters()))
    assert all(set(values) == {"momentum_buffer"} for values in optimizer.state.values())


def test_made_in_inference_mode(backend, device):
    (p,) = make_params(torch.float32, device, [(4,)])
    with torch.inference_mode():
        optimizer = SGD([p], lr=0.5, tile=16, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    (p * p).sum().backward()


def test_state_of_another_shape_is_refused(backend, device):
    (p,) = make_params(torch.float32, device, [(4,)])
    optimizer = make([p], backend)
    run(optimizer, range(1), [p])
    before = p.detach().clone()
    optimizer.state[p]["momentum_buffer"] = torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"\['momentum_buffer'\] has shape \(1,\), but its parameter has shape \(4,\)"):
        optimizer.step()
    same([p.detach()], [before])


def test_state_is_live(backend, params):
    optimizer = make(params, backend)
    run(optimizer, range(1), params)
    state = optimizer.state[params[0]]["momentum_buffer"]
    before = state.clone()
    run(optimizer, range(1, 2), params)
    assert optimizer.state[params[0]]["momentum_buffer"] is state
    assert not torch.equal(state, before)


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


def test_disjoint_views_of_one_storage_stay_where_they_are(backend, device):
    """As cuDNN keeps RNN weights: re-pointing them would make it compact them again at every call."""
    whole = torch.randn(100, device=device)
    params = [whole[:20].requires_grad_(), whole[20:50].view(5, 6).requires_grad_(), whole[50:].requires_grad_()]
    values, addresses = twins(params), [p.data_ptr() for p in params]
    optimizers = make(params, backend), make(values, backend)
    for o, ps in zip(optimizers, (params, values), strict=True):
        run(o, range(3), ps)
    assert [p.data_ptr() for p in params] == addresses
    same(params, values)
    same([whole], [torch.cat([v.detach().flatten() for v in values])])


def test_two_optimizers_on_one_parameter(backend, device):
    (p,) = make_params(torch.float32, device, [(20,)])
    first = make([p], backend)
    second = make([p], backend)
    address = p.data_ptr()
    for optimizer in (first, second, first):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.data_ptr() == address


def test_shared_memory_stays_shared(backend):
    p = torch.zeros(20).share_memory_().requires_grad_()
    address = p.data_ptr()
    SGD([p], lr=0.1, tile=16, backend=backend)
    assert p.data_ptr() == address and p.is_shared()


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
    with pytest.raises(TypeError, match=r"dtype torch\.int32"):
        optimizer.add_param_group(dict(params=[torch.zeros(3, dtype=torch.int32)]))
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group(dict(params=[params[2].detach()[10:20].requires_grad_()]))
    assert len(optimizer.param_groups) == 1 and [p.data_ptr() for p in params] == place
    values = twins(params)
    twin = make(values, backend)
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, range(2, 3), params)
    run(twin, range(2, 3), values)
    same(params, values)
