"""NumPy's numbers as options: the same values as Python's own, which alone are in a state dict."""

from __future__ import annotations

import copy
import io
import json
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, AdamW, AutoWU, Cosine, Exponential, MultiStep, Polynomial
from fused_legw.checks import plain
from tests.support.cases import give_gradients, legw, make_params, same, twins

COMMON = dict(lr=0.1, weight_decay=0.01, maximize=True, max_grad_norm=0.7)
MOMENTUM = COMMON | dict(momentum=0.9, dampening=0.0, nesterov=True)
MOMENTS = COMMON | dict(betas=(0.8, 0.95), eps=1e-3)
TORCHS = dict(foreach=False, capturable=False, fused=True, differentiable=False)
OPTIONS = {
    SGD: MOMENTUM | dict(foreach=False, fused=True, differentiable=False),
    LARS: MOMENTUM | dict(variant="timm", trust_coefficient=0.02, eps=1e-3, trust_clip=True, adapt=True, form="torch"),
    Adam: MOMENTS | TORCHS | dict(amsgrad=True, decoupled_weight_decay=True),
    AdamW: MOMENTS | TORCHS | dict(amsgrad=False, decoupled_weight_decay=False),
    AdamP: MOMENTS | dict(delta=0.2, wd_ratio=0.3, nesterov=True),
    LAMB: MOMENTS
    | dict(variant="apex", bias_correction=True, decoupled_weight_decay=False, adapt=True)
    | dict(weight_norm_clamp=(0.1, 5.0), trust_clamp=(0.5, 2.0)),
}


def converted(value, kind):
    """A value of the options with NumPy's numbers in place of Python's."""
    if isinstance(value, tuple):
        return np.array(value, kind) if kind is np.float64 else tuple(kind(x) for x in value)
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, str):
        return np.str_(value)
    return np.array(value) if kind == "0-dim" else kind(value)


def numpys(options: dict, kind) -> tuple[dict, dict]:
    """Options with NumPy's numbers, and what they are in Python's."""
    if kind == "0-dim":
        return {n: converted(v, kind) for n, v in options.items() if not isinstance(v, tuple | str)}, {
            n: v for n, v in options.items() if not isinstance(v, tuple | str)
        }
    given = {name: converted(value, kind) for name, value in options.items()}
    back = {
        name: tuple(float(kind(x)) for x in value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, bool | str)
        else float(kind(value))
        for name, value in options.items()
    }
    return given, back


def types(value) -> set[type]:
    """The types of everything in a state dict."""
    if isinstance(value, dict):
        return {type(value)}.union(*map(types, value), *map(types, value.values()))
    return {type(value)}.union(*map(types, value)) if isinstance(value, list | tuple) else {type(value)}


PRIMITIVES = {dict, list, tuple, int, float, bool, str, type(None), Tensor}


def saved(optimizer) -> dict:
    """The state dict after a way through a file without pickles. It holds primitives and tensors only."""
    state_dict = optimizer.state_dict()
    assert types(state_dict) <= PRIMITIVES
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def shown(group: dict, names) -> dict:
    return {name: group[name] for name in names}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.longdouble, "0-dim"], ids=str)
@pytest.mark.parametrize("way", ["made", "in a group", "added", "written", "written and packed", "loaded"])
@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_option(cls, way, kind):
    given, right = numpys(OPTIONS[cls], kind)
    params = make_params(torch.float32, "cpu", [(3,), (4, 5)])
    exact = twins(params)
    made = dict(backend="aten", tile=16)
    plain_group = [dict(params=exact, **right)]
    ours = cls(plain_group, **made, **({} if cls is not LARS else dict(lr=0.1)))
    if way == "made":
        optimizer = cls(params, **made, **given)
        assert types({name: optimizer.defaults[name] for name in given}) <= PRIMITIVES
    elif way == "in a group":
        optimizer = cls([dict(params=params, **given)], lr=0.5, **made)
    elif way == "added":
        optimizer = cls([torch.zeros(1, requires_grad=True)], lr=0.5, **made)
        optimizer.add_param_group(dict(params=params, **given))
    else:
        optimizer = cls(params, lr=0.5, **made)
        if way == "loaded":
            state = optimizer.state_dict()
            state["param_groups"][0].update(given)
            optimizer.load_state_dict(state)
        else:
            optimizer.param_groups[0].update(given)
    group = optimizer.param_groups[-1]
    packed = saved(optimizer)["param_groups"][-1]
    assert shown(packed, right) == right
    assert types(shown(packed, right)) == types(shown(right, right))
    if way != "written and packed":
        for step in range(3):
            give_gradients(step, params, exact, skip=False)
            optimizer.step()
            ours.step()
        same(params, exact)
        assert types(shown(group, right)) == types(shown(right, right)), "the group itself, once it was checked"
    assert shown(saved(optimizer)["param_groups"][-1], right) == right
    assert packed.keys() == ours.state_dict()["param_groups"][0].keys()


def test_no_number_changes():
    """float32's 0.1 is not 0.1, and stays so."""
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=np.float32(0.1), momentum=np.float16(0.3))
    group = saved(optimizer)["param_groups"][0]
    assert group["lr"] == 0.10000000149011612 and group["momentum"] == 0.300048828125


@pytest.mark.parametrize("betas", [[np.float32(0.5), np.float32(0.75)], np.array([0.5, 0.75], np.float32)], ids=type)
def test_betas_in_lists_and_arrays(betas):
    optimizer = Adam([torch.zeros(2, requires_grad=True)], betas=betas)
    assert repr(saved(optimizer)["param_groups"][0]["betas"]) == "(0.5, 0.75)"
    optimizer.param_groups[0]["betas"] = betas
    assert list(map(type, saved(optimizer)["param_groups"][0]["betas"])) == [float, float]


def test_a_list_that_was_written_is_followed_still():
    """Its numbers change in place, and are NumPy's own all the while; the state dict has Python's."""
    optimizer = Adam([torch.zeros(2, requires_grad=True)])
    betas = [np.float64(0.5), np.float64(0.75)]
    optimizer.param_groups[0]["betas"] = betas
    optimizer.step()
    betas[0] = np.float64(0.25)
    assert optimizer.param_groups[0]["betas"] is betas
    assert repr(saved(optimizer)["param_groups"][0]["betas"]) == "[0.25, 0.75]"


def test_options_that_ride_along():
    """Of torch's schedulers and of the user's own, at any depth; an array of theirs stays what it is."""
    p, array = torch.zeros(2, requires_grad=True), np.arange(3)
    optimizer = SGD([dict(params=[p], lr_scale=np.float32(0.5), mine={np.str_("a"): [np.int64(3), (np.bool_(1),)]})])
    optimizer.param_groups[0].update(max_lr=np.float64(0.5), initial_lr=np.float32(0.25))
    optimizer.state[p]["my"] = dict(count=np.int64(7))
    loaded = saved(optimizer)
    group = loaded["param_groups"][0]
    assert repr(group["mine"]) == "{'a': [3, (True,)]}"
    assert [repr(group[name]) for name in ("lr_scale", "max_lr", "initial_lr")] == ["0.5", "0.5", "0.25"]
    assert repr(loaded["state"][0]["my"]) == "{'count': 7}"
    optimizer.param_groups[0]["array"] = array
    assert optimizer.state_dict()["param_groups"][0]["array"] is array


def test_an_lr_that_a_scheduler_writes():
    params = make_params(torch.float32, "cpu", [(3,)])
    exact = twins(params)
    rates = np.linspace(0.1, 0.02, 5)
    ours, theirs = (cls(tensors, lr=rates[0]) for cls, tensors in ((SGD, params), (torch.optim.SGD, exact)))
    followed = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: rates[t] / rates[0]) for o in (ours, theirs)]
    for step in range(4):
        give_gradients(step, params, exact, skip=False)
        for optimizer, scheduler in zip((ours, theirs), followed, strict=True):
            optimizer.step()
            scheduler.step()
        assert type(saved(ours)["param_groups"][0]["lr"]) is float
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    torch.testing.assert_close(params, exact, rtol=1e-6, atol=1e-7)


def test_a_number_written_is_checked_once(monkeypatch):
    """As Python's own are: it was replaced by one of those."""
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    checked, check = [], type(SGD._spec).check
    monkeypatch.setattr(type(SGD._spec), "check", lambda spec, group: (checked.append(1), check(spec, group)))
    optimizer.param_groups[0].update(weight_decay=np.float64(0.1), lr=np.float64(0.5))
    for _ in range(5):
        optimizer.step()
    assert len(checked) <= 2 and type(optimizer.param_groups[0]["lr"]) is float


BAD = [np.float64("nan"), np.float32(-1), np.array([0.1, 0.2]), np.array("x"), np.complex128(1), np.str_("x")]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "max_grad_norm"])
def test_what_is_no_such_number_is_refused_as_ever(name, bad):
    said = "learning rate|lr" if name == "lr" else name
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=said):
        SGD([p], **{"lr": 0.1, name: bad})
    optimizer = SGD([p], lr=0.1)
    optimizer.param_groups[0][name] = bad
    if not (name == "lr" and bad.shape == () and bad == -1):  # a negative one is torch's
        with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\].*({said})"):
            optimizer.step()
    with pytest.raises((TypeError, ValueError), match="tile must be a power of two"):
        SGD([p], lr=0.1, tile=np.int64(17))


def test_whole_numbers_of_an_optimizer():
    schedule = legw()
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=schedule, tile=np.int64(16))
    optimizer.steps_applied = np.int32(7)
    optimizer.set_batch_size(np.int64(128), steps_per_epoch=np.float32(10))
    optimizer.steps_applied = np.uint8(9)
    group = saved(optimizer)["param_groups"][0]
    assert group["steps_applied"] == 9
    assert group["schedule"] == schedule.change_batch_size(7, 128, steps_per_epoch=10.0).to_dict()
    other = copy.deepcopy(optimizer)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["schedule"] == optimizer.param_groups[0]["schedule"]


RECIPE = dict(base_lr=0.1, base_batch_size=16, base_warmup_epochs=0.5, batch_size=64, dataset_size=1280)


@pytest.mark.parametrize("wrap", [lambda x: np.asarray(x)[()], np.array], ids=["scalars", "0-dim"])
@pytest.mark.parametrize(
    ("decay", "arguments"),
    [
        (MultiStep, dict(milestones=[3.0, 5.0], factor=0.5)),
        (Exponential, dict(rate=0.5, start_epoch=2.0, every_epochs=2.0, staircase=False)),
        (Polynomial, dict(power=2.0, end_lr=0.001, span="whole")),
        (Cosine, dict(end_lr=0.001)),
    ],
    ids=str,
)
def test_every_argument_of_a_schedule(wrap, decay, arguments):
    numbers = dict(epochs=10.0, steps_per_epoch=20.0, scaling="linear", **RECIPE)
    right = LEGW(**numbers, decay=decay(**arguments))
    own = {name: wrap(v) if not isinstance(v, list) else np.linspace(3, 5, 2) for name, v in arguments.items()}
    schedule = LEGW(**{name: wrap(value) for name, value in numbers.items()}, decay=decay(**own))
    assert schedule == right and types(schedule.to_dict()) <= PRIMITIVES
    assert json.dumps(schedule.to_dict()) == json.dumps(right.to_dict())
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=schedule)
    assert saved(optimizer)["param_groups"][0]["schedule"] == right.to_dict()


@pytest.mark.parametrize("bad", [np.array(3.0), np.ones((2, 2)), np.array(["x"])], ids=str)
def test_milestones_that_are_no_epochs(bad):
    with pytest.raises(ValueError, match=r"^milestones must be a"):
        MultiStep(bad)


@pytest.mark.parametrize("wrap", [lambda x: np.asarray(x)[()], np.array], ids=["scalars", "0-dim"])
def test_every_argument_of_autowu(wrap):
    numbers = dict(total_steps=100, steps_per_epoch=10.0, min_lr=1e-4, max_lr=0.5, max_warmup_fraction=0.25, patience=2)
    numbers |= dict(tests=3, confidence=0.9, decay="constant-then-cosine", seed=5)
    auto = AutoWU(**{name: wrap(value) for name, value in numbers.items()})
    assert types(auto.to_dict()) <= PRIMITIVES and auto.to_dict() == AutoWU(**numbers).to_dict()
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=auto)
    auto.observe(np.float32(2.5))
    optimizer.set_batch_size(np.int64(7), steps_per_epoch=np.float64(20))
    assert types(auto.state_dict()) <= PRIMITIVES
    saved(optimizer)


class Numbers(IntEnum):
    """A subclass of int."""

    TWO = 2


class Float(float):
    """A subclass of float, as the readers of some configuration files give."""


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.longdouble(0.5), 0.5),
        (np.int8(-3), -3),
        (np.uint64(2**63), 2**63),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array(4), 4),
        (np.complex64(1j), 1j),
        (Fraction(1, 4), 0.25),
        (Numbers.TWO, 2),
        (Float(0.5), 0.5),
        ((np.float32(0.5), (np.int64(1), None)), (0.5, (1, None))),
    ],
    ids=repr,
)
def test_plain(value, right):
    made = plain(value)
    assert made == right and type(made) is type(right) and types(made) == types(right)


@pytest.mark.parametrize("value", [1, 0.5, True, None, "x", (1, (2.0,)), [np.int64(1)], Fraction(10**400), np.ones(1)])
def test_what_is_left_as_it_is(value):
    assert plain(value) is value
    tensor = torch.ones(1)
    assert plain(tensor) is tensor and plain((tensor, 1))[0] is tensor
