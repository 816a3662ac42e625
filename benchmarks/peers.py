"""Optimizers of other packages, where they are installed. None of them is needed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .full_step import Step, around

_MU: dict[str, Any] = dict(momentum=0.9, weight_decay=1e-4)
_DECAY: dict[str, Any] = dict(weight_decay=0.01)


@dataclass(frozen=True)
class Peer:
    """One optimizer: `module.cls(params, lr=..., **options)`."""

    package: str
    module: str
    family: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    # With these it keeps float32 masters of bfloat16 parameters itself. None: it is given masters.
    bfloat16: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.module.partition(".")[0]) is not None
        except ValueError:  # a stand-in in sys.modules, which has no spec
            return False

    def make(self, params: list[Tensor], bookkeeping: str) -> Step:
        own = self.bfloat16 if params[0].dtype == torch.bfloat16 else None

        def optimizer(weights: list[Tensor]) -> torch.optim.Optimizer:
            cls = getattr(importlib.import_module(self.module), self.cls)
            return cls(weights, lr=1.0, **{**self.options, **(own or {})})  # type: ignore[no-any-return]

        return around(optimizer, params, bookkeeping, masters=own is None)


def _flash(family: str, cls: str, options: dict[str, Any]) -> Peer:
    """flashoptim with uncompressed state of 32 bits, which all contenders have. Its kernels are for GPUs."""
    full = dict(quantize=False, compress_state_dict=False, master_weight_bits=None, fused=torch.cuda.is_available())
    whole = {**options, **full}
    return Peer("flashoptim", "flashoptim", family, cls, whole, bfloat16=dict(master_weight_bits=32))


# Each case says whether gradients are clipped, so a package's own clipping is off. apex's LAMB always clips.
PEERS = [
    Peer("timm", "timm.optim", "lars", "Lars", dict(_MU, always_adapt=True)),
    Peer("timm", "timm.optim", "lamb", "Lamb", dict(_DECAY, max_grad_norm=None)),
    Peer("pytorch_optimizer", "pytorch_optimizer", "lars", "LARS", _MU),
    Peer("pytorch_optimizer", "pytorch_optimizer", "lamb", "Lamb", dict(_DECAY, max_grad_norm=0.0)),
    Peer("apex", "apex.optimizers", "sgd", "FusedSGD", _MU),
    Peer("apex", "apex.optimizers", "adam", "FusedAdam", dict(adam_w_mode=False)),
    Peer("apex", "apex.optimizers", "adamw", "FusedAdam", dict(_DECAY, adam_w_mode=True)),
    Peer("apex", "apex.optimizers", "lamb", "FusedLAMB", _DECAY),
    Peer("bitsandbytes", "bitsandbytes.optim", "sgd", "SGD", _MU),
    Peer("bitsandbytes", "bitsandbytes.optim", "lars", "LARS", _MU),
    Peer("bitsandbytes", "bitsandbytes.optim", "adam", "Adam"),
    Peer("bitsandbytes", "bitsandbytes.optim", "adamw", "AdamW", _DECAY),
    Peer("bitsandbytes", "bitsandbytes.optim", "lamb", "LAMB", _DECAY),
    Peer("torch-optimi", "optimi", "sgd", "SGD", _MU),
    Peer("torch-optimi", "optimi", "adam", "Adam"),
    Peer("torch-optimi", "optimi", "adamw", "AdamW", _DECAY),
    Peer("heavyball", "heavyball", "sgd", "SGD", dict(beta=0.9, weight_decay=1e-4, consume_grad=False)),
    Peer("heavyball", "heavyball", "adamw", "AdamW", dict(_DECAY, consume_grad=False)),
    _flash("sgd", "FlashSGD", _MU),
    _flash("adam", "FlashAdam", {}),
    _flash("adamw", "FlashAdamW", _DECAY),
]
