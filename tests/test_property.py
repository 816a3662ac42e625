"""Random shapes, dtypes, groups, options and sequences of steps and errors, against the float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import HAS_TRITON, INTERPRETED
from torch import Tensor

from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamW, Cosine, MultiStep, reference

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
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
    SGD: dict(momentum=st.sampled_from([0.0, 0.9])),
    LARS: dict(
        variant=st.sampled_from(["paper", "simclr", "simclr-popular", "apex-larc", "timm", "moco"]),
        trust_coefficient=st.just(0.1),
        nesterov=st.booleans(),
        adapt=st.booleans(),
    ),
    Adam: dict(amsgrad=st.booleans(), betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
    AdamW: dict(),
    LAMB: dict(variant=st.sampled_from(["paper", "author-tf", "apex", "deepspeed"]), adapt=st.booleans()),
}
STEPS = st.lists(
    st.sampled_from(["step", "step", "step", "some", "bad gradient", "reload", "copy", "move", "add group", "errors"]),
    min_size=1,
    max_size=8,
)


def _spoil_group(optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = "much"
    optimizer.step()


def _sparse(optimizer) -> None:
    p = next(p for group in optimizer.param_groups for p in group["params"])
    p.grad = torch.ones_like(p.detach()).to_sparse()
    optimizer.step()


def _bad_state(optimizer) -> None:
    state = optimizer.state_dict()
    state["param_groups"][0]["steps_applied"] = -3
    optimizer.load_state_dict(state)


def _bad_group(optimizer) -> None:
    optimizer.add_param_group(dict(params=[torch.zeros(2, requires_grad=True)], lr=-1.0))


def _snapshot(optimizer) -> list:
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    dictionary = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in dictionary["param_groups"]]
    return [params, dictionary["state"], groups]


def _try_errors(optimizer) -> None:
    """Each leaves everything as it was."""
    kept = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    decay = optimizer.param_groups[0]["weight_decay"]
    before = _snapshot(optimizer)
    for wrong in (_spoil_group, _sparse, _bad_state, _bad_group):
        for p, _ in kept:
            p.grad = torch.ones_like(p)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            wrong(optimizer)
        optimizer.param_groups[0]["weight_decay"] = decay
        after = _snapshot(optimizer)
        torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
        assert after[2] == before[2]
    for p, g in kept:
        p.grad = g


def _drive(data, backend: str) -> None:
    cls = data.draw(st.sampled_from(list(OPTIONS)), label="class")
    options = st.fixed_dictionaries(COMMON | OPTIONS[cls])
    groups = data.draw(st.lists(st.tuples(SHAPES, DTYPES, LRS, options), min_size=1, max_size=3), label="groups")
    steps = data.draw(STEPS, label="steps")
    seed = torch.Generator().manual_seed(7)
    ours, exact = [], []
    for shapes, dtype, lr, own in groups:
        values = [torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype) for shape in shapes]
        ours.append(dict(params=[v.clone().requires_grad_() for v in values], lr=lr, **own))
        exact.append(dict(params=[v.double().requires_grad_() for v in values], lr=lr, **own))
    optimizer = cls(ours, lr=0.01, skip_nonfinite=True, tile=16, backend=backend)
    twin = getattr(reference, cls.__name__)(exact, lr=0.01, skip_nonfinite=True)
    for step in steps:
        if step == "reload":
            optimizer.load_state_dict(optimizer.state_dict())
        elif step == "copy":
            optimizer = copy.deepcopy(optimizer)
        elif step == "move":
            for p in _params(optimizer):
                p.data = p.data.clone()
        elif step == "errors":
            _try_errors(optimizer)
        elif step == "add group":
            for o, dtype in ((optimizer, torch.float32), (twin, torch.float64)):
                o.add_param_group(dict(params=[torch.ones(5, dtype=dtype, requires_grad=True)]))
            if cls in (LARS, LAMB):
                for name, value in optimizer.param_groups[-1].items():
                    twin.param_groups[-1].setdefault(name, value)
        else:
            _give(optimizer, twin, seed, step)
            optimizer.step()
            twin.step()
    assert optimizer.steps_applied == twin.steps_applied
    for p, q in zip(_params(optimizer), _params(twin), strict=True):
        bound = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}[p.dtype]
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=bound, atol=bound)


def _params(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _give(optimizer, twin, seed: torch.Generator, kind: str) -> None:
    for p, q in zip(_params(optimizer), _params(twin), strict=True):
        g = torch.randn(p.shape, generator=seed, dtype=torch.float64).to(p.dtype)
        if kind == "bad gradient" and g.numel():
            g.view(-1)[0] = torch.inf
        absent = kind == "some" and float(torch.rand((), generator=seed)) < 0.5
        p.grad, q.grad = (None, None) if absent else (g, g.double())


_SETTINGS = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=100, **_SETTINGS)
@given(data=st.data())
def test_anything_on_aten(data):
    _drive(data, "aten")


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="on a GPU tensors would have to be there")
@settings(max_examples=25, **_SETTINGS)
@given(data=st.data())
def test_anything_on_triton(data):
    _drive(data, "triton")
