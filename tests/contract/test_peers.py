"""Beside the packages themselves, where they can be imported: our optimizers, and the oracles that stand in for them.

`pytest -m peers` with timm, optax (and jax), pytorch_optimizer or lightning-bolts installed; none of them is required.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS
from tests.support import oracles
from tests.support.cases import error, twins

pytestmark = pytest.mark.peers
STEPS = 60
SHAPES = [(5, 7), (9,), (4, 6), (3, 3)]
MU = dict(momentum=0.9)


def lr_of(step: int) -> float:
    """Up, then down to where LARC and timm clip."""
    return 0.4 * min(1, (step + 1) / 10) * (1 - step / STEPS) ** 2


def start(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    params[2].zero_()
    return [p.to(device).requires_grad_() for p in params]


def gradient(step: int, j: int, p: Tensor) -> Tensor:
    """Of every size; now and then zero, never None: peers differ in whether a step without a gradient counts."""
    generator = torch.Generator().manual_seed(100 * step + j)
    size = 0.0 if (step + j) % 13 == 6 else 10.0 ** ((step + 2 * j) % 5 - 3)
    return size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)


@contextmanager
def left_as_it_was(package: str) -> Iterator[None]:
    """What is imported of a package inside is not there afterwards: other code must find the package, no stand-in."""
    own = lambda: [name for name in sys.modules if name.partition(".")[0] == package]  # noqa: E731
    before = {name: sys.modules[name] for name in own()}
    try:
        yield
    finally:
        for name in own():
            del sys.modules[name]
        sys.modules.update(before)


def bare(package: str, module: str) -> types.ModuleType:
    """A submodule without its package's __init__, which may need more than the submodule does."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    with left_as_it_was(package), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name, path = package, spec.submodule_search_locations[0]
        for part in module.split(".")[1:]:
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = [path]
            name, path = f"{name}.{part}", f"{path}/{part}"
        return importlib.import_module(module)


@functools.cache
def timm(name: str) -> type:
    return getattr(bare("timm", f"timm.optim.{name.lower()}"), name)


@functools.cache
def bolts(name: str) -> type:
    stability = types.ModuleType("pl_bolts.utils.stability")
    stability.under_review = lambda: lambda cls: cls  # only warns
    with left_as_it_was("pl_bolts"):
        sys.modules.setdefault("pl_bolts.utils", types.ModuleType("pl_bolts.utils"))
        sys.modules.setdefault("pl_bolts.utils.stability", stability)
        return getattr(bare("pl_bolts", "pl_bolts.optimizers.lars"), name)


def pytorch_optimizer(name: str) -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip("pytorch_optimizer"), name)


def run_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer], params: list[Tensor]) -> None:
    optimizer = make(params)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step)
        for j, p in enumerate(params):
            p.grad = gradient(step, j, p)
        optimizer.step()


@torch.no_grad()
def run_oracle(oracle: oracles.Oracle, params: list[Tensor]) -> None:
    for step in range(STEPS):
        oracle.step(params, [gradient(step, j, p) for j, p in enumerate(params)], lr_of(step))


def run_optax(name: str, options: dict[str, Any], params: list[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    with jax.enable_x64(True):
        chain = optax.inject_hyperparams(getattr(optax, name))(learning_rate=0.0, **options)
        values = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in params]
        state = chain.init(values)
        for step in range(STEPS):
            state.hyperparams["learning_rate"] = jax.numpy.asarray(lr_of(step))
            grads = [jax.numpy.asarray(gradient(step, j, p).cpu().numpy()) for j, p in enumerate(params)]
            updates, state = chain.update(grads, state, values)
            values = optax.apply_updates(values, updates)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(torch.tensor(value.tolist(), dtype=torch.float64))


def case(name: str, theirs: Callable, oracle: type, told: dict, ours: type, variant: str, **options):
    """What their package does, the oracle with the options it is told, and ours with its own."""
    make = functools.partial(ours, lr=1.0, variant=variant, **options)
    return pytest.param(theirs, functools.partial(oracle, **told), make, id=f"{ours.__name__}-{name}")


def of_torch(find: Callable[[str], type], name: str, **options) -> Callable:
    return lambda params: run_torch(lambda ps: find(name)(ps, lr=1.0, **options), params)


def of_optax(name: str, **options) -> Callable:
    return lambda params: run_optax(name, options, params)


WD = dict(weight_decay=0.05)
TINY = 1e-30  # pytorch_optimizer adds eps to the norm of the update too; its adam_debias leaves the step size alone
TIMM_LARS = [
    (WD, {}, {}),
    (WD, dict(nesterov=True), dict(nesterov=True)),
    (WD, dict(dampening=0.3), dict(dampening=0.3)),
    (WD, dict(trust_clip=True, trust_coeff=0.02), dict(trust_clip=True, trust_coefficient=0.02)),
    ({}, {}, {}),
    ({}, dict(always_adapt=True), dict(not_adapted="nothing")),
]
TIMM_LAMB = [
    (WD, {}, {}),
    (WD, dict(trust_clip=True), dict(trust_clamp=(0.0, 1.0))),
    (dict(weight_decay=0.0), {}, {}),
    (dict(weight_decay=0.0), dict(always_adapt=True), dict(not_adapted="nothing")),
    (WD, dict(bias_correction=False), dict(bias_correction=False)),
    (WD, dict(max_grad_norm=None), dict(max_grad_norm=math.inf)),
]
BOLTS = [WD, WD | dict(nesterov=True), WD | dict(dampening=0.3), {}]
OPTAX_LARS = [WD, WD | dict(nesterov=True), {}, WD | dict(eps=1e-3, trust_coefficient=0.02)]
MOCO = dict(variant="moco", denominator="sum_of_norms", zero_norm="denominator")
CLAMPED = dict(variant="author-tf", eps=TINY, weight_norm_clamp=(0.0, 10.0), max_grad_norm=math.inf)
CASES = [
    *(
        case(f"timm-{a | b}", of_torch(timm, "Lars", **MU, **a, **b), oracles.TimmLARS, a | b, LARS, "timm", **a, **c)
        for a, b, c in TIMM_LARS
    ),
    *(
        case(f"timm-{a | b}", of_torch(timm, "Lamb", **a, **b), oracles.TimmLAMB, a | b, LAMB, "timm", **a, **c)
        for a, b, c in TIMM_LAMB
    ),
    *(case(f"bolts-{a}", of_torch(bolts, "LARS", **MU, **a), oracles.BoltsLARS, a, LARS, "bolts", **a) for a in BOLTS),
    *(case(f"optax-{a}", of_optax("lars", **a), oracles.OptaxLARS, a, LARS, "optax", **a) for a in OPTAX_LARS),
    *(case(f"optax-{a}", of_optax("lamb", **a), oracles.OptaxLAMB, a, LAMB, "optax", **a) for a in [WD, {}]),
    *(
        case(
            f"pytorch_optimizer-{a}",
            of_torch(pytorch_optimizer, "LARS", **a),
            oracles.PytorchOptimizerLARS,
            a,
            LARS,
            **MOCO,
            **a,
        )
        for a in [WD, WD | dict(nesterov=True)]
    ),
    case(
        "pytorch_optimizer-lamb",
        of_torch(pytorch_optimizer, "Lamb", weight_decouple=False, adam_debias=True, eps=TINY, **WD),
        oracles.PytorchOptimizerLAMB,
        dict(epsilon=TINY, **WD),
        LAMB,
        **CLAMPED,
        **WD,
    ),
]


@pytest.mark.parametrize(("theirs", "oracle", "ours"), CASES)
def test_the_oracle_is_the_package(theirs, oracle, ours):
    exact = start("cpu")
    values = [p.detach().clone() for p in exact]
    theirs(exact)
    run_oracle(oracle(), values)
    assert max(error(values, exact)) < 1e-13


@pytest.mark.parametrize(("theirs", "oracle", "ours"), CASES)
def test_ours_is_the_package(backend, device, theirs, oracle, ours):
    params = start(device)
    exact = twins(params)
    theirs(exact)
    run_torch(lambda ps: ours(ps, backend=backend, tile=32), params)
    assert max(error(params, exact)) < 1e-12


@pytest.mark.parametrize("imported", [False, True])
def test_no_stand_in_is_left(tmp_path, monkeypatch, imported):
    """transformers asks importlib.util.find_spec for timm, which raises for a module without __spec__."""
    inside = tmp_path / "a_peer" / "optim"
    inside.mkdir(parents=True)
    for folder in inside.parent, inside:
        (folder / "__init__.py").write_text("WHOLE = True\n" if imported else "raise ImportError('needs more')\n")
    (inside / "lars.py").write_text("from .base import Base\nclass Lars(Base): pass\n")
    (inside / "base.py").write_text("class Base: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with left_as_it_was("a_peer"):
        whole = importlib.import_module("a_peer") if imported else None
        assert bare("a_peer", "a_peer.optim.lars").Lars.__mro__[1].__name__ == "Base"
        assert sys.modules.get("a_peer") is whole
        assert importlib.util.find_spec("a_peer").origin == str(inside.parent / "__init__.py")
        assert [name for name in sys.modules if name.startswith("a_peer.")] == []
    assert "a_peer" not in sys.modules
