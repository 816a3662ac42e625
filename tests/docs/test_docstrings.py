"""Every docstring example runs, and `help()` of each optimizer says what each of its options does."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fused_legw
from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW

# A package of an extra is imported by these alone.
NEEDS = {"fused_legw.schedules.autowu": "sklearn", "fused_legw.demo": "sklearn", "fused_legw.backends.triton": "triton"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fused_legw.__path__, "fused_legw.")
    if not module.ispkg and module.name != "fused_legw.__main__"
)
CLASSES = [SGD, Adam, AdamW, AdamP, LARS, LAMB]
COMMON = ("max_grad_norm", "skip_nonfinite", "backend", "flatten", "master_weights", "tile")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    for prefix, package in NEEDS.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    if name == "fused_legw.backends.group_table":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_examples_are_found():
    names = {test.name for test in doctest.DocTestFinder().find(SGD, "SGD") if test.examples}
    assert "SGD" in names and "SGD.set_batch_size" not in names  # inherited: found at its own class
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(fused_legw.LEGW)) > 5


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_has_an_entry_for_each_common_option(cls):
    lines = inspect.getdoc(cls).splitlines()
    for name in COMMON:
        assert any(line.startswith(f"    {name}: ") for line in lines), name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_names_every_argument(cls):
    text = inspect.getdoc(cls)
    names = set(inspect.signature(cls).parameters) - {"common"}
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW], ids=lambda cls: cls.__name__)
def test_signatures_name_what_torchs_name(cls):
    theirs = inspect.signature(getattr(torch.optim, cls.__name__)).parameters
    ours = inspect.signature(cls).parameters
    assert [name for name in theirs if name not in ours] == []
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
