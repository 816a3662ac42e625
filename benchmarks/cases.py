"""All cases, the most telling first, and which of them a machine runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .contenders import CONTENDERS, Contender
from .full_step import BOOKKEEPING
from .least_bytes import FAMILIES
from .shapes import FLAT, MODELS

MEASURED_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CaseGroup:
    """The cases that are compared with each other: same family, shapes, dtype and bookkeeping."""

    family: str
    model: str
    dtype: str
    bookkeeping: str

    def __str__(self) -> str:
        return f"{self.family}-{self.model}-{self.dtype}-{self.bookkeeping}"


@dataclass(frozen=True)
class Case:
    """One row of the results. A group that is not run, and a package that is not installed, have one row each."""

    group: CaseGroup
    name: str
    mode: str = ""
    contender: Contender | None = None
    status: str = ""  # the reason if it is not run

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that tell a row from all others; `results.KEY` has their names."""
        g = self.group
        return g.family, g.model, g.dtype, g.bookkeeping, self.name, self.mode

    def __str__(self) -> str:
        return "-".join(filter(None, (str(self.group), self.name, self.mode)))


def groups() -> list[CaseGroup]:
    """Models come before flat sizes, but for one size. So a run that is cut short has the more telling half."""
    telling = [(m, d, b) for d in MEASURED_DTYPES for b in BOOKKEEPING for m in MODELS]
    rows = [*telling[: len(MODELS)], ("flat-1e7", "float32", "plain"), *telling[len(MODELS) :]]
    rows += [(m, "float32", "plain") for m in FLAT if m != "flat-1e7"]
    return [CaseGroup(family, *row) for row in rows for family in FAMILIES]


def left_out(group: CaseGroup, device: torch.device) -> str:
    """The reason why a device does not run a group, or "". Two CPU cores have time for the smaller half."""
    if device.type == "cuda":
        return ""
    if group.model in FLAT:
        run = FLAT[group.model] <= 10**7
    elif group.model == "resnet50":
        run = group.bookkeeping == "plain" or group.dtype == "float32"
    elif group.model == "ptb-large":
        run = (group.dtype, group.bookkeeping) == ("float32", "plain")
    else:
        run = group == CaseGroup("sgd", "bert-large", "float32", "plain")
    return "" if run else "not run: GPU only"


def every_case(device: torch.device) -> list[Case]:
    """Every case, run or not."""
    cases: list[Case] = []
    for group in groups():
        if status := left_out(group, device):
            cases.append(Case(group, "all", status=status))
            continue
        for row in CONTENDERS:
            there = row.peer is None or row.peer.installed
            fields = group.model, group.dtype, group.bookkeeping
            if row.family == group.family and there and row.offered(*fields, device):
                cases.append(Case(group, row.name, row.mode, row))
    for peer in (row.peer for row in CONTENDERS if row.peer):
        if not peer.installed:
            cases.append(Case(CaseGroup(peer.family, "any", "any", "any"), peer.package, status="not installed"))
    return cases
