"""The helper by which caches tell that nothing was replaced."""

from __future__ import annotations

import pytest
import torch

from fused_legw import SGD
from fused_legw.buffers.same import Same


def test_the_very_objects_in_their_order_and_no_others():
    a, b, like_a = [1], [2], [1]
    same = Same()
    assert not same.holds([]) and not same.holds([a])
    same.keep([a, b])
    assert same.holds([a, b])
    assert not any(map(same.holds, ([b, a], [a], [a, b, b], [like_a, b], [])))
    same.forget()
    assert not same.holds([a, b])
    assert Same([a]).holds([a]) and Same([]).holds([])


@pytest.mark.parametrize("change", ["replaced", "added", "swapped"])
def test_a_list_of_params_that_someone_changed_is_seen(backend, device, change):
    """The optimizer updates what stands in the group now."""
    params = [torch.ones(3, device=device, requires_grad=True) for _ in range(3)]
    optimizer = SGD(params[:2], lr=0.5, backend=backend, tile=16)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    listed = optimizer.param_groups[0]["params"]
    if change == "replaced":
        listed[1] = params[2]
    elif change == "added":
        listed.append(params[2])
    else:
        listed.reverse()
    optimizer.step()
    assert [p[0].item() for p in params] == {
        "replaced": [-0.5, 0.0, 0.5],
        "added": [-0.5, -0.5, 0.5],
        "swapped": [-0.5, -0.5, 1.0],
    }[change]
