"""What is compared: the ways to make a full optimizer step at a scheduled LR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_legw
from fused_legw.backends.select import explain_backend

from . import baselines
from .full_step import SCHEDULE, Step, around, captured, ours
from .least_bytes import FAMILIES
from .peers import PEERS, Peer

Make = Callable[[list[Tensor], str], Step]

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": dict(momentum=0.9, weight_decay=1e-4),
    "lars": dict(momentum=0.9, weight_decay=1e-4),
    "adam": {},
    "adamw": dict(weight_decay=0.01),
    "lamb": dict(weight_decay=0.01),
}
_NAMES = {"sgd": "SGD", "lars": "LARS", "adam": "Adam", "adamw": "AdamW", "lamb": "LAMB"}
# torch.compile takes seconds to minutes, and longer for more tensors. So it runs on these only, in float32.
COMPILED = {"cuda": ("resnet50", "ptb-large", "flat-1e7"), "cpu": ("ptb-large", "flat-1e7")}


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    name: str
    family: str
    make: Make  # from parameters with gradients and the bookkeeping to the timed call, one full step
    mode: str = "eager"  # or "graph", the replay of a CUDA graph
    peer: Peer | None = None  # of another package

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    def offered(self, model: str, dtype: str, bookkeeping: str, device: torch.device) -> bool:
        """Whether it takes part in a group on this kind of device."""
        if self.name.startswith("ours-triton"):  # the time of Triton's interpreter says nothing
            compiled = device.type == "cuda" and explain_backend(device)[0] == "triton"
            return compiled and (self.mode == "eager" or bookkeeping == "plain")
        if self.mode == "graph":
            return device.type == "cuda" and bookkeeping == "plain"
        if self.name == "torch-compile":
            return dtype == "float32" and model in COMPILED[device.type]
        return True


def _torch_class(family: str) -> Any:
    return getattr(torch.optim, _NAMES[family], None) or getattr(baselines, _NAMES[family])


def _torch(family: str, *, wrap: Callable[[Step], Step] = lambda step: step, **options: Any) -> Make:
    """torch's optimizer with its scheduler. lr="tensor" puts the LR on the device: compiled code is reused."""

    def optimizer(params: list[Tensor]) -> torch.optim.Optimizer:
        lr = torch.ones((), device=params[0].device) if "lr" in options else 1.0
        return _torch_class(family)(params, **{**OPTIONS[family], **options, "lr": lr})  # type: ignore[no-any-return]

    return lambda params, bookkeeping: around(optimizer, params, bookkeeping, wrap=wrap)


def _compiled(step: Step) -> Step:
    torch._dynamo.reset()  # after eight optimizers dynamo would give up on a function and silently compile nothing
    return torch.compile(step)


def _ours(family: str, backend: str, **options: Any) -> Make:
    return partial(ours, getattr(fused_legw, _NAMES[family]), {**OPTIONS[family], **options, "backend": backend})


def _ours_captured(family: str, **options: Any) -> Make:
    return lambda params, bookkeeping: captured(_ours(family, "triton", **options)(params, bookkeeping))


def _reference(family: str) -> Make:
    cls = getattr(fused_legw.reference, _NAMES[family])

    def optimizer(params: list[Tensor]) -> torch.optim.Optimizer:
        return cls(params, lr=SCHEDULE, **OPTIONS[family])  # type: ignore[no-any-return]

    return lambda params, bookkeeping: around(optimizer, params, bookkeeping, scheduled=False)


def _rows(family: str) -> list[Contender]:
    """The most telling rows first. Where memory is short, the first ones are measured together."""
    row = partial(Contender, family=family)
    rows = [row("ours-triton", make=_ours(family, "triton"))]
    adapts, adam = family in ("lars", "lamb"), family in ("adam", "adamw")
    foreach: dict[str, Any] = {} if adapts else dict(foreach=True)
    if not adapts:
        rows.append(row("torch-fused", make=_torch(family, fused=True)))
    rows.append(row("torch-foreach", make=_torch(family, **foreach)))
    rows.append(row("ours-triton", make=_ours_captured(family), mode="graph"))
    if family == "lars":
        rows.append(row("ours-triton-carry", make=_ours(family, "triton", carry_norms=True)))
        rows.append(row("ours-triton-carry", make=_ours_captured(family, carry_norms=True), mode="graph"))
    if adam:
        for kind in ("fused", "foreach"):
            options: dict[str, Any] = {kind: True}
            make = _torch(family, wrap=captured, capturable=True, lr="tensor", **options)
            rows.append(row(f"torch-{kind}", make=make, mode="graph"))
    rows.append(row("ours-aten", make=_ours(family, "aten")))
    capturable: dict[str, Any] = dict(capturable=True) if adam else {}
    rows.append(row("torch-compile", make=_torch(family, wrap=_compiled, lr="tensor", **capturable)))
    if not adapts:
        rows.append(row("torch-forloop", make=_torch(family, foreach=False, fused=False)))
    rows.append(row("reference", make=_reference(family)))
    return rows + [row(peer.package, make=peer.make, peer=peer) for peer in PEERS if peer.family == family]


CONTENDERS = [row for family in FAMILIES for row in _rows(family)]
