"""Random shapes, dtypes, groups, options and sequences of steps and errors, against the float64 reference."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, AdamW, Cosine, MultiStep, reference
from tests.support.machine import HAS_TRITON, INTERPRETED

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=4)
LRS = st.sampled_from([0.01, 0.003]) | st.builds(
    LEGW,
    st.sampled_from([0.01, 0.02]),
    st.just(16),
    st.sampled_from([0.0, 0.5]),
    batch_size=st.just(64),
    dataset_size=st.just(256),
    epochs=st.just(3),
    decay=st.sampled_from([Cosine(), MultiStep([1, 2], 0.5)]),
)
COMMON = dict(
    weight_decay=st.sampled_from([0.0, 0.1]), maximize=st.booleans(), max_grad_norm=st.sampled_from([None, 0.5, 1e3])
)
OPTIONS = {
    SGD: dict(kind=st.sampled_from([(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)])),
    LARS: dict(
        variant=st.sampled_from(
            ["paper", "simclr", "simclr-popular", "apex-larc", "timm", "moco", "torchlars", "optax"]
        ),
        denominator=st.sampled_from([None, None, "sum_of_norms", "norm_of_sum"]),
        not_adapted=st.sampled_from([None, None, "no_decay", "vectors"]),
        trust_coefficient=st.just(0.1),
        nesterov=st.booleans(),
        adapt=st.booleans(),
    ),
    Adam: dict(amsgrad=st.booleans(), betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
    AdamW: dict(amsgrad=st.booleans()),
    AdamP: dict(delta=st.sampled_from([0.1, 2.0]), wd_ratio=st.sampled_from([0.1, 0.0, 1.0]), nesterov=st.booleans()),
    LAMB: dict(
        variant=st.sampled_from(["paper", "author-tf", "apex", "timm", "deepspeed", "optax"]),
        bias_correction=st.sampled_from([None, None, True, False, "step_size"]),
        trust_clamp=st.sampled_from([None, None, (0.1, 2.0)]),
        adapt=st.booleans(),
    ),
}
STEPS = st.lists(
    st.sampled_from(
        ["step", "step", "step", "some", "bad gradient", "reload", "resume", "copy", "move", "add group", "errors"]
    ),
    min_size=1,
    max_size=8,
)


def _wrong_lr(optimizer) -> None:
    """Of a scheduled group any number but 0 is wrong; of another, what is no number."""
    group = optimizer.param_groups[-1]
    group["lr"] = "high" if group["schedule"] is None else 0.125
    optimizer.step()


def _sparse(optimizer) -> None:
    p = _params(optimizer)[-1]
    p.grad = torch.ones_like(p.detach()).to_sparse()
    optimizer.step()


def _bad_count(optimizer) -> None:
    state = optimizer.state_dict()
    state["param_groups"][0]["steps_applied"] = -3
    optimizer.load_state_dict(state)


def _bad_shape(optimizer) -> None:
    state = optimizer.state_dict()
    name = "exp_avg" if isinstance(optimizer, Adam | AdamP | LAMB) else "momentum_buffer"
    state["state"].setdefault(0, {})[name] = torch.zeros(77)
    optimizer.load_state_dict(state)


def _bad_group(optimizer) -> None:
    optimizer.add_param_group(dict(params=[torch.zeros(2, requires_grad=True)], lr=-1.0))


def _listed_twice(optimizer) -> None:
    optimizer.add_param_group(dict(params=[_params(optimizer)[0]]))


# What no step could use, by option; those that the drawn class has are written to a group, loaded and added with one.
WRONG = dict(
    maximize=["yes", None],
    weight_decay=["x", -1],
    max_grad_norm=["x", 0],
    lr_scale=["x", -1],
    schedule=["cosine"],
    momentum=["x", -1],
    dampening=["x"],
    nesterov=["no"],
    betas=["x", (0.9,), (0.9, 1.5), (0.9, "x")],
    eps=["x", -1],
    amsgrad=["yes"],
    decoupled_weight_decay=["no"],
    variant=["mine"],
    form=[3],
    not_adapted=["x"],
    trust_clip=["yes"],
    trust_clamp=["x", (2, 1)],
    bias_correction=["x"],
    adapt=["no"],
)


def _written(optimizer, wrong: dict) -> None:
    optimizer.param_groups[-1].update(wrong)
    optimizer.step()


def _uploaded(optimizer, wrong: dict) -> None:
    optimizer.param_groups[-1].update(wrong)
    optimizer.upload_param_groups()


def _loaded(optimizer, wrong: dict) -> None:
    state = optimizer.state_dict()
    state["param_groups"][-1].update(wrong)
    optimizer.load_state_dict(state)


def _added(optimizer, wrong: dict) -> None:
    optimizer.add_param_group(dict(params=[torch.zeros(2, requires_grad=True)], **wrong))


def _snapshot(optimizer) -> list:
    dictionary = optimizer.state_dict()
    return [[p.detach().clone() for p in _params(optimizer)], dictionary["state"], dictionary["param_groups"]]


def _wrong_options(data, optimizer) -> list:
    """One wrong value of one option, in every way it can come."""
    names = [name for name in WRONG if name in {**optimizer.param_groups[-1], "lr_scale": 1.0}]
    name = data.draw(st.sampled_from(names), label="option")
    wrong = {name: data.draw(st.sampled_from(WRONG[name]), label="wrong")}
    return [functools.partial(way, wrong=wrong) for way in (_written, _uploaded, _loaded, _added)]


def _try_errors(data, optimizer) -> None:
    """Each leaves everything as it was."""
    kept = [(p, p.grad) for p in _params(optimizer)]
    group, before = optimizer.param_groups[-1], _snapshot(optimizer)
    right = dict(group)
    others = (_wrong_lr, _sparse, _bad_count, _bad_shape, _bad_group, _listed_twice)
    for wrong in (*_wrong_options(data, optimizer), *others):
        for p, _ in kept:
            p.grad = torch.ones_like(p)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            wrong(optimizer)
        group.clear()
        group.update(right)
        after = _snapshot(optimizer)
        torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
        assert after[2] == before[2]
    for p, g in kept:
        p.grad = g


def _resumed(optimizer, **options):
    """A new optimizer on the same parameters, from this one's file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [dict(params=group["params"]) for group in optimizer.param_groups]
    fresh = type(optimizer)(groups, lr=0.01, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def _twins(data, backend: str):
    """A fused optimizer, the float64 reference of it, and what else the first was made with."""
    cls = data.draw(st.sampled_from(list(OPTIONS)), label="class")
    options = st.fixed_dictionaries(COMMON | OPTIONS[cls])
    groups = data.draw(st.lists(st.tuples(SHAPES, DTYPES, LRS, options), min_size=1, max_size=3), label="groups")
    skip, seed = data.draw(st.booleans(), label="skip_nonfinite"), torch.Generator().manual_seed(7)
    ours, exact = [], []
    for shapes, dtype, lr, own in groups:
        if "kind" in own:
            momentum, dampening, nesterov = own.pop("kind")
            own |= dict(momentum=momentum, dampening=dampening, nesterov=nesterov)
        values = [torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype) for shape in shapes]
        ours.append(dict(params=[v.clone().requires_grad_() for v in values], lr=lr, **own))
        exact.append(dict(params=[v.double().requires_grad_() for v in values], lr=lr, **own))
    layout = dict(tile=16, backend=backend, flatten=data.draw(st.booleans(), label="flatten"), skip_nonfinite=skip)
    return cls(ours, lr=0.01, **layout), getattr(reference, cls.__name__)(exact, lr=0.01, skip_nonfinite=skip), layout


def _drive(data, backend: str) -> None:
    optimizer, twin, layout = _twins(data, backend)
    seed = torch.Generator().manual_seed(8)
    for step in data.draw(STEPS, label="steps"):
        if step == "reload":
            optimizer.load_state_dict(optimizer.state_dict())
        elif step == "resume":
            optimizer = _resumed(optimizer, **layout)
        elif step == "copy":
            optimizer = copy.deepcopy(optimizer)
        elif step == "move":
            for p in _params(optimizer):
                p.data = p.data.clone()
        elif step == "errors":
            _try_errors(data, optimizer)
        elif step == "add group":
            for o, dtype in ((optimizer, torch.float32), (twin, torch.float64)):
                o.add_param_group(dict(params=[torch.ones(5, dtype=dtype, requires_grad=True)]))
            for name, value in optimizer.param_groups[-1].items():
                twin.param_groups[-1].setdefault(name, value)
        else:
            _give(optimizer, twin, seed, step if optimizer.skip_nonfinite or step != "bad gradient" else "step")
            optimizer.step()
            twin.step()
    _agree(optimizer, twin)


def _agree(optimizer, twin) -> None:
    assert optimizer.steps_applied == twin.steps_applied
    # A float32 tensor's norm, taken in float32, reaches float64 tensors by the clip factor.
    alone = all(p.dtype == torch.float64 for p in _params(optimizer))
    shown = optimizer.state_dict()["state"]
    for i, (p, q) in enumerate(zip(_params(optimizer), _params(twin), strict=True)):
        bound = {
            torch.float64: 1e-10 if alone else 1e-7,
            torch.float32: 2e-5,
            torch.bfloat16: 0.01,
            torch.float16: 2e-3,
        }[p.dtype]
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=bound, atol=bound)
        exact, bound = dict(twin.state[q]), min(bound, 1e-4)  # state and masters are float32 or wider
        if "master_param" in shown.get(i, {}):
            exact["master_param"] = q.detach()
        assert shown.get(i, {}).keys() == exact.keys()
        for name, value in exact.items():
            mine = shown[i][name].double()
            torch.testing.assert_close(mine, torch.as_tensor(value).double(), rtol=bound, atol=bound)


def _params(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _give(optimizer, twin, seed: torch.Generator, kind: str) -> None:
    for p, q in zip(_params(optimizer), _params(twin), strict=True):
        g = torch.randn(p.shape, generator=seed, dtype=torch.float64).to(p.dtype)
        if kind == "bad gradient" and g.numel():
            g.view(-1)[0] = torch.inf
        absent = kind == "some" and float(torch.rand((), generator=seed)) < 0.5
        p.grad, q.grad = (None, None) if absent else (g, g.double())


_SETTINGS = dict(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@settings(max_examples=100, **_SETTINGS)
@given(data=st.data())
def test_anything_on_aten(data):
    _drive(data, "aten")


on_triton = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="on a GPU tensors would have to be there")


@on_triton
@settings(max_examples=25, **_SETTINGS)
@given(data=st.data())
def test_anything_on_triton(data):
    _drive(data, "triton")


# Norms so far apart that no tensor could do with the ratio of another, nor all with one.
SCALES = st.lists(st.tuples(*[st.sampled_from([0.01, 1.0, 100.0])] * 2), min_size=2, max_size=3)


def _trust(data, backend: str) -> None:
    """Tensors of few elements, each with its own scale of weights and gradients, in one or two groups."""
    cls = data.draw(st.sampled_from([LARS, LAMB]), label="class")
    options = st.fixed_dictionaries(COMMON | OPTIONS[cls] | dict(adapt=st.sampled_from([True, True, True, False])))
    groups = data.draw(st.lists(st.tuples(SCALES, options), min_size=1, max_size=2), label="groups")
    seed = torch.Generator().manual_seed(9)
    values = [[torch.randn(5, generator=seed).double() * w for w, _ in scales] for scales, _ in groups]
    made = [
        make(
            [
                dict(params=[v.clone().requires_grad_() for v in some], **own)
                for some, (_, own) in zip(values, groups, strict=True)
            ],
            lr=0.1,
            **layout,
        )
        for make, layout in ((cls, dict(tile=16, backend=backend)), (getattr(reference, cls.__name__), {}))
    ]
    factors = [g for scales, _ in groups for _, g in scales]
    for _ in range(data.draw(st.integers(1, 2), label="steps")):
        for p, q, factor in zip(*map(_params, made), factors, strict=True):
            p.grad = factor * torch.randn(5, generator=seed).double()
            q.grad = p.grad.clone()
        for optimizer in made:
            optimizer.step()
    for p, q in zip(*map(_params, made), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9 * float(q.detach().abs().max()))


@settings(max_examples=100, **_SETTINGS)
@given(data=st.data())
def test_each_tensor_has_its_own_trust_ratio_on_aten(data):
    _trust(data, "aten")


@on_triton
@settings(max_examples=20, **_SETTINGS)
@given(data=st.data())
def test_each_tensor_has_its_own_trust_ratio_on_triton(data):
    _trust(data, "triton")
