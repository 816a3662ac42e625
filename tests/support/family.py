"""The optimizers that count steps or adapt, each with options that use most of it."""

from __future__ import annotations

import pytest

from fused_legw import LAMB, LARS, Adam, AdamP, AdamW, Cosine
from tests.support.cases import give_gradients, legw

FAMILY = [
    (LARS, dict(weight_decay=0.1)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict()),
    (AdamP, dict(weight_decay=0.1, delta=0.5, nesterov=True)),
    (LAMB, dict(variant="apex")),
]
family = pytest.mark.parametrize(("cls", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", ""))
SHAPES = [(5, 7), (20,), (), (0,)]


def make_one(cls, params, backend, **options):
    return cls(params, **dict(lr=legw(Cosine()), tile=16, backend=backend) | options)


def run_steps(optimizer, steps, *lists):
    for step in steps:
        give_gradients(step, *lists)
        optimizer.step()
