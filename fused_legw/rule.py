"""What tells one fused optimizer from another; everything else they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from legw_kernels import scalars

from .checks import check_not_negative
from .schedule import LEGW

Group = dict[str, Any]  # one of torch.optim's param_groups
Gradients = Sequence[Tensor | None]  # one per segment of a bucket, in the parameter's layout
Hyper = scalars.MomentumHyper | scalars.AdamHyper

_ROW, _SMALL = 256, 4096  # see `norms`


def check_limit(limit: float | None) -> None:
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm must be greater than 0, or None, got {limit!r}")


class Rule:
    """An optimizer's state, and what its hyper-parameters mean to the kernels and to ATen.

    name: the kernels' rule, in `legw_kernels.rules.RULES`. states: torch's names, in that rule's order. counts: whether
    optimizer.state holds each parameter's "step". adapts: whether updates have a trust ratio. two_stage: whether the
    states advance as that is measured, which a global norm must come before.
    """

    name: str
    states: tuple[str, ...]
    counts = False
    adapts = False
    two_stage = False

    def check(self, group: Group) -> None:
        """Raise for hyper-parameters that make no sense, with torch.optim's messages."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not isinstance(lr, LEGW):
            check_not_negative("learning rate", lr)
        check_not_negative("weight_decay value", group["weight_decay"])
        if group.get("fused") and group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group.get("differentiable"):
            raise ValueError("differentiable=True is not supported: the fused step is not recorded by autograd")
        check_limit(group["max_grad_norm"])
        scale = group.get("lr_scale", 1.0)
        if not (isinstance(scale, int | float) and 0 <= scale < math.inf):
            raise ValueError(f"lr_scale must be a number, zero or more, got {scale!r}")

    def complete(self, group: Group) -> None:
        """Fill in the defaults that depend on other options."""

    def used_states(self, group: Group) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Hyper:
        """The group's hyper-parameters as numbers; those that are tensors on a GPU stay tensors."""
        raise NotImplementedError

    def clip(self, group: Group) -> tuple[float, bool]:
        """The global norm to clip gradients at (infinite: none), and whether by LAMB's formula or torch's."""
        limit = group["max_grad_norm"]
        return (math.inf if limit is None else float(limit)), False

    def clips(self, groups: list[Group]) -> bool:
        """Whether any group clips."""
        return any(self.clip(group)[0] < math.inf for group in groups)

    def exempt(self, group: Group, p: Tensor) -> bool:
        """Whether the parameter is neither adapted nor decayed."""
        return False

    def measures_clipped(self, group: Group) -> bool:
        """Whether the trust ratio needs gradients that are already clipped, and so the global norm before it."""
        return self.two_stage

    def aten(self, tensors: Tensors, lr: float, count: int, scale: float, group: Group) -> None:
        """One update of these tensors by ATen; where it has trust ratios, it fills in `tensors.ratios`.

        count: their earlier updates. scale: what their gradients are multiplied by, for clipping and AMP.
        """
        raise NotImplementedError


@dataclass
class Tensors:
    """The tensors of one group, dtype and count that ATen updates: lists, an entry per parameter.

    states: a list for each of the rule's states; empty where the group does not use it.
    g_norms: norms of the gradients as they are to be used, empty where not taken. w_norms, ratios: to be filled.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    g_norms: list[float] = field(default_factory=list)
    w_norms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def number(x: Any) -> Any:
    """A hyper-parameter as a float; one that is a tensor on a GPU as it is, for the step must not wait for it."""
    return x if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)


def log(x: Any) -> Any:
    x = number(x)
    if isinstance(x, Tensor):
        return x.double().log()
    return math.log(x) if x > 0 else -math.inf


def floats(hyper: Any) -> Any:
    """Hyper-parameters with those that are tensors read."""
    return type(hyper)(*map(float, hyper))


def scaled(grads: list[Tensor], factor: float) -> list[Tensor]:
    """The gradients times a factor, in new memory; themselves where it is 1."""
    return grads if factor == 1 else list(torch._foreach_mul(grads, factor))


def batches(tensors: Sequence[Tensor], most: int = 1 << 19) -> Iterator[slice]:
    """Runs of tensors with at most so many elements together, or of one: what is made for them stays in the cache."""
    start = total = 0
    for i, x in enumerate(tensors):
        size = x.numel()
        if total and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(tensors))


def norms(tensors: Sequence[Tensor]) -> list[float]:
    """The L2 norm of each tensor, dense in any order, to 1e-7; it does not overflow where the values are finite.

    Summed in float64, which is slow: of tensors of some size, over the norms of short rows, which are taken in the
    tensor's dtype. All are read at once, and none depends on the others.
    """
    parts, lengths = [], []
    for x in tensors:
        size = x.numel()
        x = x.view(-1) if x.is_contiguous() else x.as_strided((size,), (1,))
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        rows = size // _ROW if size >= _SMALL else 0
        if rows:
            parts.append(torch.linalg.vector_norm(x[: rows * _ROW].view(rows, _ROW), dim=1))
        if size > rows * _ROW:
            parts.append(x[rows * _ROW :])
        lengths.append(rows + size - rows * _ROW)
    if not parts:
        return [0.0] * len(tensors)
    squares = torch.cat(parts).to("cpu", torch.float64).square_()
    sums = torch.segment_reduce(squares, "sum", lengths=torch.tensor(lengths, device="cpu"), unsafe=True)
    plain: list[float] = sums.sqrt_().tolist()
    return [y if 1e-12 < y < 1e18 else norm(x) for x, y in zip(tensors, plain, strict=True)]


def norm(x: Tensor) -> float:
    """L2 norm in float64, which does not overflow where the values are finite."""
    plain = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    if 1e-140 < plain < 1e150 or x.numel() == 0:
        return plain
    largest = float(x.abs().max())
    if not 0 < largest < math.inf:
        return largest
    return float(torch.linalg.vector_norm(x.double() / largest)) * largest


def group_lr(group: Group, t: int) -> float:
    """A group's LR at update t."""
    if group["schedule"] is None:
        return float(group["lr"])
    return float(group["schedule"](t) * group.get("lr_scale", 1.0))
