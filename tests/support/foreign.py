"""State dicts as other packages write them, and what loading one that is refused must leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases import same, twins


def dict_of(state: dict[str, Any], n: int = 1, **group: Any) -> dict[str, Any]:
    """A state dict as other packages write it: the first parameter has this state, the group these options."""
    return {"state": {0: state} if state else {}, "param_groups": [{"params": list(range(n)), "lr": 0.1, **group}]}


def ones(device: str, n: int = 1) -> list[Tensor]:
    params = [torch.zeros(3, device=device).requires_grad_() for _ in range(n)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def refused_and_unchanged(optimizer, params, wrong, error, message):
    """Loading raises, and the optimizer is as it was: its dict, its weights, and its next step."""
    twin_params = twins(params)
    twin = copy.deepcopy((params, optimizer))[1]
    twin.param_groups[0]["params"][:] = twin_params
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    same([p.detach() for p in params], [p.detach() for p in twin_params])
    optimizer.step()
