"""Entries of the user's own in `optimizer.state`: carried as torch.optim carries them, side by side with its SGD."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_legw import SGD, AdamW
from tests.backends.test_host import _calls
from tests.support.cases import make_params, twins


def through_a_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stepped(optimizer: Any) -> Any:
    for _ in range(3):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state["count"] += 1
    return optimizer


def loaded(optimizer: Any) -> Any:
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"]["count"] = 8
    optimizer.load_state_dict(state_dict)
    return optimizer


def loaded_anew(optimizer: Any) -> Any:
    other = type(optimizer)(twins(optimizer.param_groups[0]["params"]), lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    return other


WAYS: dict[str, Callable[[Any], Any]] = {
    "step": stepped,
    "load_state_dict": loaded,
    "another's load_state_dict": loaded_anew,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": through_a_file,
}


def own_entries(state: Any) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(key, str)}


def listed(x: Any) -> Any:
    """With lists in place of tensors, to be compared by ==."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.tolist()
    if isinstance(x, dict):
        return {key: listed(value) for key, value in x.items()}
    return x


def with_entries(cls: type, device: str) -> Any:
    optimizer = cls(make_params(torch.float32, device, [(4,), (3, 2)]), lr=0.1, momentum=0.9)
    optimizer.state["count"] = 3
    optimizer.state["note"] = "warm"
    optimizer.state["history"] = [0.5, 0.25]
    optimizer.state["nothing"] = None
    optimizer.state["average"] = torch.tensor([1.0, 2.0])
    optimizer.state["nested"] = {"x": torch.tensor([3.0]), "y": 4}
    assert optimizer.state["asked for"] == {}  # torch's state is a defaultdict
    return optimizer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [0, 2])
def test_entries_go_where_torchs_go(device, way, before):
    found = []
    for cls in (torch.optim.SGD, SGD):
        optimizer = with_entries(cls, device)
        for _ in range(before):
            stepped(optimizer)
        after = WAYS[way](optimizer)
        seen = [listed(own_entries(after.state)), listed(own_entries(after.state_dict()["state"]))]
        found.append([*seen, listed(own_entries(stepped(after).state))])  # and it still steps
    torchs, ours = found
    assert ours == torchs
    assert [*ours[0]] == ["count", "note", "history", "nothing", "average", "nested", "asked for"]


def test_they_are_the_same_objects_as_in_torch(device):
    for cls in (torch.optim.SGD, SGD):
        optimizer = with_entries(cls, device)
        given = own_entries(optimizer.state)
        stepped(optimizer)
        stored = optimizer.state_dict()["state"]
        optimizer.load_state_dict(optimizer.state_dict())
        for key in given.keys() - {"count"}:
            assert optimizer.state[key] is stored[key] is given[key], (cls, key)


def test_the_trajectory_is_the_one_without_them(device):
    plain = make_params(torch.float32, device, [(4,), (3, 2)])
    other, optimizer = SGD(plain, lr=0.1, momentum=0.9), with_entries(SGD, device)
    other.state["count"] = 0
    stepped(other)
    stepped(optimizer)
    torch.testing.assert_close(optimizer.param_groups[0]["params"], plain, rtol=0, atol=0)


def test_state_of_a_key_that_no_parameter_has(device):
    """torch carries what a dict has under other numbers."""
    for cls in (torch.optim.SGD, SGD):
        optimizer = cls(make_params(torch.float32, device, [(4,)]), lr=0.1, momentum=0.9)
        state_dict = optimizer.state_dict()
        optimizer.load_state_dict({**state_dict, "state": {7: {"momentum_buffer": torch.ones(9)}, 8: 5}})
        state = optimizer.state_dict()["state"]
        assert state[7]["momentum_buffer"].tolist() == [1.0] * 9 and state[8] == 5


def test_entries_that_stay_cost_no_call_for_a_tensor(device):
    counted = []
    for n in (5, 105):
        params = make_params(torch.float32, device, [(3,)] * n)
        optimizer = AdamW(params, lr=0.1, backend="aten")
        optimizer.state.update(count=1000, nested={"x": 1})
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.state["nested"]["x"] += 1000
        counted.append(_calls(optimizer.step))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_step_is_float32_under_any_default_dtype(backend, device, dtype):
    """And a float64 one is taken as it is: exact above 2**24, where float32 is not."""
    params = make_params(torch.float32, device, [(4,)])
    optimizer = AdamW(params, lr=0.1, tile=16, backend=backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for _ in range(2):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
        given = optimizer.state_dict()
        steps = [optimizer.state[params[0]]["step"], given["state"][0]["step"]]
        given["state"][0]["step"] = torch.tensor(2.0**25 + 1, dtype=torch.float64)
        optimizer.load_state_dict(given)
        steps += [optimizer.state[params[0]]["step"], copy.deepcopy(optimizer).state_dict()["state"][0]["step"]]
        optimizer.state[params[0]]["step"] = torch.tensor(257.0, dtype=torch.float64)
        optimizer.step()
        steps += [optimizer.state[params[0]]["step"]]
    finally:
        torch.set_default_dtype(before)
    assert [step.dtype for step in steps] == [torch.float32] * 5
    assert [step.item() for step in steps] == [2, 2, 2**25, 2**25, 258]


def test_a_large_float64_step_counts_exactly(device):
    params = make_params(torch.float32, device, [(4,)])
    optimizer = AdamW(params, lr=0.1, backend="aten")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    given = optimizer.state_dict()
    given["state"][0]["step"] = torch.tensor([2.0**25 + 1], dtype=torch.float64)
    optimizer.load_state_dict(given)
    (bucket,) = optimizer._run.layout.buckets
    assert bucket.exact_steps() == [2**25 + 1]
