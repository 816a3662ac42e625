"""Memory that others hold too, and weights, masters and state that others change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_legw import SGD
from tests.support.cases import goes_on_like_one_resumed, make, make_params, run, same, twins


def test_weights_changed_in_place_from_outside(backend, params):
    """model.load_state_dict, weight averaging, an initialiser: what stands in the parameter counts, masters follow."""
    optimizer = make(params, backend)
    run(optimizer, range(2), params)
    for p in params:
        p.data.add_(1.0)  # unseen by version counters
    goes_on_like_one_resumed(optimizer, params, range(2, 4), backend)
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
    goes_on_like_one_resumed(optimizer, params, range(2, 4), backend)
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
    (bucket,) = optimizer._run.layout.buckets
    begin, end = bucket.weights.data_ptr(), bucket.weights.data_ptr() + bucket.weights.nbytes
    inside = [begin <= p.data_ptr() < end for p in model.parameters()]
    assert sum(inside) >= 4 and (
        device != "cpu" or all(inside)
    )  # cuDNN keeps the LSTM's weights in a storage of its own


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
