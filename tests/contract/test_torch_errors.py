"""What PyTorch's own test suite says an optimizer must refuse: the same type and message, and nothing changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fused_legw import SGD, Adam, AdamW

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's fixtures need expecttest")
INFOS = {info.name: info for info in common.optim_db}


def _flags() -> list[Any]:
    """torch lists these where there is a GPU; its classes refuse them everywhere."""
    listed = [
        (dict(foreach=True, fused=True), "`fused` and `foreach` cannot be `True` together"),
        (dict(fused=True, differentiable=True), "`fused` does not support `differentiable`"),
    ]
    return [
        common.ErrorOptimizerInput(
            common.OptimizerInput(params=[torch.nn.Parameter(torch.randn(2))], kwargs=kwargs, desc=message),
            error_type=RuntimeError,
            error_regex=message,
        )
        for kwargs, message in listed
    ]


def _of(cls: type) -> list[Any]:
    return [*INFOS[cls.__name__].optim_error_inputs_func("cpu", torch.float32), *_flags()]


def error_inputs(*, options: bool) -> Any:
    """Each by its index, to be made anew by each test: torch writes into groups even when it refuses them.

    options: only those that are wrong as options, not as a list of parameters.
    """
    found = [
        pytest.param(cls, i, id=f"{cls.__name__}-{wrong.optimizer_error_input.desc}")
        for cls in (SGD, Adam, AdamW)
        for i, wrong in enumerate(_of(cls))
        if wrong.optimizer_error_input.kwargs or not options
    ]
    return pytest.mark.parametrize(("cls", "index"), found)


def _tensors(params: Any) -> list[torch.Tensor]:
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, dict):
        return _tensors(params["params"])
    return [p for x in params for p in _tensors(x)] if isinstance(params, (list, tuple)) else []


@error_inputs(options=False)
def test_construction(cls, index, backend):
    wrong = _of(cls)[index]
    params, kwargs = wrong.optimizer_error_input.params, wrong.optimizer_error_input.kwargs
    assert wrong.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR
    tensors = _tensors(params)
    before = [(p.detach().clone(), p.data_ptr(), p._version) for p in tensors]
    if issubclass(
        wrong.error_type, Warning
    ):  # parameters listed twice: torch warns that it will be an error, here it is
        with pytest.warns(wrong.error_type, match=wrong.error_regex), pytest.raises(ValueError, match="listed once"):
            cls(params, backend=backend, tile=16, **kwargs)
    else:
        with pytest.raises(wrong.error_type, match=wrong.error_regex) as caught:
            cls(params, backend=backend, tile=16, **kwargs)
        assert caught.type is wrong.error_type
        with pytest.raises(wrong.error_type, match=wrong.error_regex):  # torch's own still says so
            INFOS[cls.__name__].optim_cls(params, **kwargs)
    for p, (value, address, version) in zip(tensors, before, strict=True):
        assert torch.equal(p, value) and p.data_ptr() == address and p._version == version


@error_inputs(options=True)
def test_a_group_added_later(cls, index, backend):
    """The same in a group of its own, beside one that has made a step already; torch's look at no options there."""
    wrong = _of(cls)[index]
    kwargs = wrong.optimizer_error_input.kwargs
    p, late = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    optimizer = cls([p], lr=0.1, backend=backend, tile=16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, stored, address = late.detach().clone(), copy.deepcopy(optimizer.state_dict()), late.data_ptr()
    with pytest.raises(wrong.error_type, match=wrong.error_regex):
        optimizer.add_param_group(dict(params=[late], **kwargs))
    assert torch.equal(late, before) and late.data_ptr() == address
    now = optimizer.state_dict()
    assert now["param_groups"] == stored["param_groups"]
    torch.testing.assert_close(now["state"], stored["state"], rtol=0, atol=0)
    optimizer.step()
