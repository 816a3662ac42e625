"""Wrappers that run an optimizer's methods with another object as self, as Lightning Fabric's do."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import make, make_params, run, same


class _Copies:
    """A wrapper with a copy of the optimizer's attributes."""

    def __init__(self, optimizer) -> None:
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step", "zero_grad")}
        self.__class__ = type(f"Wrapped{type(optimizer).__name__}", (_Copies, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class _Forwards(_Copies):
    """A wrapper that asks the optimizer for attributes that it lacks."""

    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type(f"Wrapped{type(optimizer).__name__}", (_Forwards, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("wrap", [_Copies, _Forwards])
def test_a_wrapper_and_its_optimizer_stay_one(backend, device, wrap):
    first, later = make_params(torch.float32, device, [(4,)]), make_params(torch.float32, device, [(5,), (2, 3)])
    optimizer = make(first, backend)
    wrapper = wrap(optimizer)
    wrapper.add_param_group(dict(params=later))
    run(wrapper, range(2), first + later)
    assert wrapper.steps_applied == optimizer.steps_applied == 2
    assert wrapper.get_last_lr() == optimizer.get_last_lr() and len(wrapper.get_last_lr()) == 2
    wrapper.skip_nonfinite = True
    assert optimizer.skip_nonfinite
    before = [p.detach().clone() for p in first + later]
    first[0].grad = torch.full_like(first[0], torch.inf)
    wrapper.step()
    same([p.detach() for p in first + later], before)
    assert int(wrapper.steps_skipped) == int(optimizer.steps_skipped) == 1
    wrapper.load_state_dict(optimizer.state_dict())
    run(wrapper, range(2, 3), first + later)
    assert wrapper.steps_applied == optimizer.steps_applied == 3
    assert wrapper.param_groups is optimizer.param_groups and wrapper.state is optimizer.state
    wrapper.unflatten()
    assert all(p.untyped_storage().resizable() for p in first + later)
