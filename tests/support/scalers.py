"""The optimizers as AMP tests take them, and the two GradScalers."""

from __future__ import annotations

import pytest
import torch

import fused_legw
from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW

FAMILY = [
    (SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    (LARS, dict(weight_decay=0.1, dampening=0.2)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict(maximize=True)),
    (AdamP, dict(weight_decay=0.1, delta=0.5)),
    (LAMB, dict(weight_decay=0.1)),
]
family = pytest.mark.parametrize(("cls", "options"), FAMILY, ids=[cls.__name__ for cls, _ in FAMILY])
TAKES_FUSED = [SGD, Adam, AdamW]  # the drop-ins for torch's classes, with its option
# The last one is torch's with an optimizer of fused=True, which torch's scaler lets divide by the scale itself.
SCALERS = {"ours": fused_legw.GradScaler, "torch's": torch.amp.GradScaler, "torch's, fused": torch.amp.GradScaler}


def fused_option(how: str) -> dict:
    return dict(fused=True) if how == "torch's, fused" else {}


def make_scaler(how: str, device: str, **options):
    scaler = SCALERS[how](device, **dict(init_scale=1024.0, growth_interval=3) | options)
    scaler.scale(torch.zeros((), device=device))  # which makes its scale
    return scaler
