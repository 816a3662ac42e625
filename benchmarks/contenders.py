"""What is compared: one table, a row per way to do a full optimizer step at a scheduled LR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_legw
from fused_legw import LEGW, Polynomial
from fused_legw.backends import explain_backend

Step = Callable[[], None]
Make = Callable[[list[Tensor], LEGW], Step]

SCHEDULE = LEGW(0.1, 256, 0.3125, batch_size=8192, dataset_size=1_281_167, epochs=90, decay=Polynomial(power=2))
SGD: dict[str, Any] = dict(momentum=0.9, weight_decay=1e-4)

# The least a step can move, in bytes per float32 parameter. sgd: read p, g and m, write p and m.
FLOOR = {"sgd": 20}


@dataclass(frozen=True)
class Contender:
    """A row of the table. make(parameters with gradients, schedule) gives the call that is timed: one full step."""

    name: str
    family: str  # a key of FLOOR
    make: Make


def _ours(cls: Any, backend: str, **hyper: Any) -> Make:
    def make(params: list[Tensor], schedule: LEGW) -> Step:
        return cls(params, lr=schedule, backend=backend, **hyper).step  # type: ignore[no-any-return]

    return make


def _reference(cls: Any, **hyper: Any) -> Make:
    def make(params: list[Tensor], schedule: LEGW) -> Step:
        return cls(params, lr=schedule, **hyper).step  # type: ignore[no-any-return]

    return make


def _torch(cls: Any, **hyper: Any) -> Make:
    """A torch optimizer and its scheduler's step: together they do what one step of ours does."""

    def make(params: list[Tensor], schedule: LEGW) -> Step:
        optimizer = cls(params, lr=1.0, **hyper)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

        def step() -> None:
            optimizer.step()
            scheduler.step()

        return step

    return make


CONTENDERS = [
    Contender("ours-triton", "sgd", _ours(fused_legw.SGD, "triton", **SGD)),
    Contender("ours-aten", "sgd", _ours(fused_legw.SGD, "aten", **SGD)),
    Contender("reference", "sgd", _reference(fused_legw.reference.SGD, **SGD)),
    Contender("torch-fused", "sgd", _torch(torch.optim.SGD, fused=True, **SGD)),
    Contender("torch-foreach", "sgd", _torch(torch.optim.SGD, foreach=True, **SGD)),
    Contender("torch-forloop", "sgd", _torch(torch.optim.SGD, foreach=False, fused=False, **SGD)),
]


def contenders(family: str, device: torch.device) -> list[Contender]:
    """The rows of a family that can run on a device. The interpreter is never one of them: its time says nothing."""
    compiled = device.type == "cuda" and explain_backend(device)[0] == "triton"
    return [row for row in CONTENDERS if row.family == family and (compiled or row.name != "ours-triton")]
