"""Optimizers and schedules from YAML and command lines: what signatures must say for it, and jsonargparse itself.

`pytest -m peers` with jsonargparse installed, which LightningCLI uses; it is not required.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from typing_extensions import Unpack

import fused_legw
from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, AdamW, AutoWU, Constant, Cosine, FusedOptimizer, MultiStep
from fused_legw.optim.base import CommonOptions
from fused_legw.schedules.base import Schedule
from fused_legw.schedules.decays import DECAYS, Decay

CLASSES = [SGD, Adam, AdamW, AdamP, LARS, LAMB]
TORCHS = dict(betas=[0.5, 0.6], eps=1e-3, amsgrad=True, maximize=True, foreach=False, fused=True, capturable=True)
OWN = dict(tile=32, flatten=False, skip_nonfinite=True, master_weights=False, backend="aten")
OPTIONS: dict[type, dict[str, Any]] = {
    SGD: dict(momentum=0.5, nesterov=True, foreach=False, fused=True, max_grad_norm=2.0),
    Adam: TORCHS | dict(decoupled_weight_decay=True),
    AdamW: TORCHS | dict(max_grad_norm=2.0),
    AdamP: dict(betas=[0.5, 0.6], delta=0.2, wd_ratio=0.3, nesterov=True),
    LARS: dict(variant="timm", trust_clip=True, trust_coefficient=0.02, not_adapted="nothing", carry_norms=True),
    LAMB: dict(variant="apex", bias_correction="step_size", trust_clamp=[0.5, 2.0], adapt=False),
}
RECIPE = dict(base_lr=0.1, base_batch_size=16, base_warmup_epochs=0.5, batch_size=64, dataset_size=1280, epochs=10.0)


# What holds without any reader


def test_a_field_for_a_decay_says_so():
    """A dataclass there would be taken for the class itself, and a union for its first member that fits."""
    hints = get_type_hints(LEGW)
    assert hints["decay"] is Decay and not dataclasses.is_dataclass(Decay)
    assert inspect.signature(LEGW).parameters["decay"].default == Constant()
    for name, decay in DECAYS.items():
        assert issubclass(decay, Decay) and dataclasses.is_dataclass(decay) and getattr(fused_legw, name) is decay
        assert set(get_type_hints(decay)) == set(inspect.signature(decay).parameters)


@pytest.mark.parametrize("cls", [LEGW, AutoWU, *DECAYS.values()], ids=lambda cls: cls.__name__)
def test_every_argument_of_a_schedule_has_a_type(cls):
    hints = get_type_hints(cls.__init__)
    assert {name for name in inspect.signature(cls).parameters if name not in hints} == set()
    choices = [get_args(hint) for hint in hints.values() if getattr(hint, "__origin__", None) is Literal]
    assert len(choices) == (cls.__name__ in ("LEGW", "AutoWU", "Polynomial"))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_argument_of_an_optimizer_has_a_type(cls):
    """Also the common ones, behind `**common`, which are those of the base class."""
    hints = get_type_hints(cls.__init__)
    parameters = inspect.signature(cls).parameters
    assert {name for name in parameters if name not in hints} == set()
    assert [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD] == ["common"]
    assert not any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    assert hints["common"] == Unpack[CommonOptions] and set(get_args(hints["lr"])) == {float, Tensor, Schedule}
    base = {name: hint for name, hint in get_type_hints(FusedOptimizer.__init__).items() if name != "return"}
    assert {n: base[n] for n in base.keys() - {"params", "defaults", "carry_norms"}} == get_type_hints(CommonOptions)


# jsonargparse


def parsers(kind: Any, **how: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A parser of one argument "x", and what makes the object of a configuration."""
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    if how:
        parser.add_subclass_arguments(kind, "x", **how)
    else:
        parser.add_argument("--x", type=kind)
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return parser, lambda config: make(config).x


def through(parser: Any, values: Any) -> Any:
    """The configuration of values in YAML, of which JSON is a part, after a way out to YAML and back."""
    config = parser.parse_string(json.dumps({"x": values}))
    again = parser.parse_string(parser.dump(config))
    assert again == config and parser.dump(again) == parser.dump(config)
    return again


def written(cls: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"fused_legw.{cls}", "init_args": arguments}


DECAY_CASES = [
    ({}, Constant()),
    (written("Cosine"), Cosine()),
    (written("MultiStep", milestones=[3, 5], factor=0.5), MultiStep([3, 5], 0.5)),
    (written("Exponential", rate=0.5, start_epoch=4, staircase=False), fused_legw.Exponential(0.5, 4, staircase=False)),
    (written("Polynomial", power=2, end_lr=0.01, span="whole"), fused_legw.Polynomial(2, 0.01, "whole")),
    ("Cosine", Cosine()),
]


@pytest.mark.peers
@pytest.mark.parametrize("kind", [LEGW, Schedule], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(("decay", "right"), DECAY_CASES, ids=str)
def test_a_schedule_from_yaml(kind, decay, right):
    parser, make = parsers(kind)
    given = dict(decay=decay) if decay else {}
    schedule = make(through(parser, written("LEGW", **RECIPE, **given)))
    assert schedule == LEGW(**RECIPE, decay=right) and type(schedule.decay) is type(right)


@pytest.mark.peers
def test_a_schedule_without_a_class_path():
    parser, make = parsers(LEGW)
    assert make(through(parser, {**RECIPE, "decay": written("Cosine", end_lr=0.01)})).decay == Cosine(0.01)


SCHEDULES = {
    "number": (0.25, 0.25),
    "legw": (written("LEGW", **RECIPE), LEGW(**RECIPE)),
    "decay": (written("LEGW", **RECIPE, decay=written("Cosine", end_lr=0.01)), LEGW(**RECIPE, decay=Cosine(0.01))),
    "autowu": (written("AutoWU", total_steps=100, steps_per_epoch=10, decay="cosine"), AutoWU(100, 10)),
}


@pytest.mark.peers
@pytest.mark.parametrize("lr", SCHEDULES)
@pytest.mark.parametrize("way", ["as a callable", "as a subclass"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_optimizer_from_yaml(cls, way, lr):
    """In the two ways of LightningCLI: its OptimizerCallable, and the classes of its `optimizer:` key."""
    given, right = SCHEDULES[lr]
    values = written(cls.__name__, lr=given, weight_decay=0.125, **OPTIONS[cls], **OWN)
    p = torch.zeros(2, requires_grad=True)
    if way == "as a callable":
        parser, make = parsers(Callable[[Iterable], torch.optim.Optimizer])
        optimizer = make(through(parser, values))([p])
    else:
        how = dict(skip={"params"}, fail_untyped=False, instantiate=False)
        parser, make = parsers((torch.optim.Optimizer,), **how)
        made = make(through(parser, values))
        assert made.class_path == f"fused_legw.{cls.__name__}"
        optimizer = cls([p], **made.init_args)
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in OPTIONS[cls].items()}
    twin = cls([torch.zeros(2, requires_grad=True)], lr=right, weight_decay=0.125, **options, **OWN)
    assert type(optimizer) is cls
    assert optimizer.state_dict()["param_groups"] == twin.state_dict()["param_groups"]
    assert optimizer._options == twin._options and optimizer.skip_nonfinite is True


@pytest.mark.peers
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_optimizer_on_the_command_line(cls):
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", skip={"params"}, instantiate=False)
    decay = ["--x.lr.decay=Cosine", "--x.lr.decay.end_lr=0.01"]
    words = ["--x.lr=LEGW", *(f"--x.lr.{name}={value}" for name, value in RECIPE.items()), *decay]
    words += ["--x.weight_decay=0.125", "--x.tile=32", "--x.max_grad_norm=2"]
    config = parser.parse_args(words)
    made = parser.instantiate(config) if hasattr(parser, "instantiate") else parser.instantiate_classes(config)
    assert made.x.lr == LEGW(**RECIPE, decay=Cosine(0.01))
    assert (made.x.weight_decay, made.x.tile, made.x.max_grad_norm) == (0.125, 32, 2.0)
