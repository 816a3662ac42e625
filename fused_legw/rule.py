"""What tells one fused optimizer from another; everything else they share."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import checks
from .autowu import AutoWU
from .schedule import LEGW, Schedule

Group = dict[str, Any]  # one of torch.optim's param_groups
Gradients = Sequence[Tensor | None]  # one per segment of a bucket, in the parameter's layout

_ROW, _SMALL = 256, 4096  # of a small tensor `norms` takes the elements, of others the norms of rows


class Rule:
    """An optimizer's state, and what its hyper-parameters mean to the kernels and to ATen.

    name: the kernels' rule, in `legw_kernels.rules.RULES`. states: torch's names, in that rule's order. counts: whether
    optimizer.state holds each parameter's "step". adapts: whether updates have a trust ratio. two_stage: whether the
    states advance as that is measured, which a global norm must come before. carries: whether the norms of the weights
    may be carried over from the last step. projects: whether updates are projected by rows, the
    slices of a tensor at each index of its first dimension, which must then be contiguous in memory.
    """

    name: str
    states: tuple[str, ...]
    counts = False
    adapts = False
    two_stage = False
    carries = False
    projects = False

    def check(self, group: Group) -> None:
        """Raise for options of the wrong kind or out of range, however they came into the group; LRs are checked apart.

        Reads no tensor that is not on the CPU.
        """
        schedule = group["schedule"]
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a LEGW, an AutoWU or None, got {schedule!r}")
        checks.check_number("lr_scale", group.get("lr_scale", 1.0))
        checks.check_scalar("weight_decay", group["weight_decay"], "weight_decay value")
        checks.check_flag("maximize", group["maximize"])
        checks.check_limit("max_grad_norm", group["max_grad_norm"])
        if group.get("differentiable"):
            if group.get("fused"):
                raise RuntimeError("`fused` does not support `differentiable`")
            raise ValueError("differentiable=True is not supported: the fused step is not recorded by autograd")

    def check_made(self, group: Group) -> None:
        """Raise for what torch.optim refuses only where a group is made: its schedulers may well write it later."""
        checks.check_scalar("lr", group["lr"], "learning rate")
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def complete(self, group: Group) -> None:
        """Fill in the defaults that depend on other options, and bring values to one form."""

    def used_states(self, group: Group) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Any:
        """The group's hyper-parameters as one of `scalars`' tuples; what is a tensor on a GPU stays one."""
        raise NotImplementedError

    def clip(self, group: Group) -> tuple[float, bool]:
        """The global norm to clip gradients at (infinite: none), and whether by LAMB's formula or torch's."""
        limit = group["max_grad_norm"]
        return (math.inf if limit is None else float(limit)), False

    def clips(self, groups: list[Group]) -> bool:
        """Whether any group clips."""
        return any(self.clip(group)[0] < math.inf for group in groups)

    def exempts_vectors(self, group: Group) -> bool:
        """Whether tensors of one dimension or none are neither adapted nor decayed."""
        return False

    def measures_clipped(self, group: Group) -> bool:
        """Whether the trust ratio needs gradients that are already clipped, and so the global norm before it."""
        return self.two_stage

    def aten(self, tensors: Tensors, lr: float, count: int, scale: float, group: Group) -> None:
        """One update of these tensors by ATen; where it has trust ratios, it fills in `tensors.ratios`.

        count: their earlier updates. scale: what their gradients are multiplied by, for clipping and AMP.
        """
        raise NotImplementedError


def check_written_lr(label: str, lr: Any) -> None:
    """Refuse an LR written to a group, or loaded. Negative ones torch.optim follows: a LambdaLR past its end, say."""
    if isinstance(lr, Schedule):
        raise TypeError(f"{label}['lr'] is {lr}: set {label}['schedule'] instead")
    checks.check_scalar(f"{label}['lr']", lr, low=-math.inf)


def check_place(groups: list[Group], steps_applied: int) -> None:
    """Refuse a place in a schedule from before its batch last changed: kernels are not told what it was then."""
    for group in groups:
        since = group["schedule"].since if group["schedule"] is not None else 0
        if steps_applied < since:
            raise ValueError(
                f"steps_applied={steps_applied} lies before update {since}, where the batch size of "
                f"{group['schedule']} changed: set a schedule of one batch size first, its with_batch_size"
            )


class Written:
    """A rule's check of groups that anyone may have written to, made only where something was.

    It is left out where the options of a group are the very objects that passed it last. Of types that can change in
    place none pass for good, but for tensors in a tuple, and AutoWU, which checks itself.
    """

    _IMMUTABLE = frozenset({type(None), bool, int, float, str, tuple, LEGW, AutoWU})

    def __init__(self, rule: Rule, defaults: Group) -> None:
        self._rule = rule
        self._options = tuple(defaults.keys() - {"lr"})
        self._passed: dict[int, tuple[object, ...]] = {}

    def check(self, i: int, group: Group) -> None:
        """Refuse the options of group i, but its LR."""
        options = (group.get("lr_scale", 1.0), *map(group.get, self._options))
        passed = self._passed.get(i)
        if passed is not None and all(map(operator.is_, options, passed)):
            return
        with checks.naming(f"param_groups[{i}]"):
            self._rule.check(group)
        if self._IMMUTABLE.issuperset(map(type, options)):
            self._passed[i] = options
        else:
            self._passed.pop(i, None)


@dataclass
class Flat:
    """Tensors that follow one another in one tensor, each padded to whole tiles.

    ATen starts its threads once for each large tensor that it is given, and its fused kernels for small ones too, which
    costs as much as some 100,000 elements; so what can be done with all of them is done with `whole`.
    """

    whole: Tensor
    views: list[Tensor]
    tile: int

    def __post_init__(self) -> None:
        ends = list(accumulate(-(-x.numel() // self.tile) * self.tile for x in self.views))
        self._starts = [0, *ends[:-1]]
        every = zip(self.views, self._starts, ends, strict=True)
        self._pads = [self.whole[start + x.numel() : end] for x, start, end in every if start + x.numel() < end]

    @classmethod
    def like(cls, tensors: Sequence[Tensor], buffer: Tensor, tile: int) -> Flat:
        """Room for tensors of these shapes and strides at the start of a buffer."""
        ends = [0, *accumulate(-(-x.numel() // tile) * tile for x in tensors)]
        views = [buffer.as_strided(x.shape, x.stride(), at) for x, at in zip(tensors, ends, strict=False)]
        return cls(buffer[: ends[-1]], views, tile)

    def parts(self, whole: bool) -> list[Tensor]:
        return [self.whole] if whole else self.views

    def clear_padding(self) -> None:
        if self._pads:
            torch._foreach_zero_(self._pads)

    def norms(self) -> list[float]:
        """`norms` of the views, to the bit; whatever the padding holds."""
        if self.tile % _ROW or not len(self.whole):
            return norms(self.views)
        rows = torch.linalg.vector_norm(self.whole.view(-1, _ROW), dim=1)
        return norms(self.views, [rows[start // _ROW :] for start in self._starts])


@dataclass
class Tensors:
    """The tensors of one group, dtype and count that ATen updates: lists, an entry per parameter.

    states: a list for each of the rule's states; empty where the group does not use it. joined: the parameters, if they
    follow one another. Where the rule is two-stage, gathered: a copy of the gradients; scratch: as much memory again;
    whole: whether the states follow one another like these, then the lists of states hold that one tensor. Where the
    rule adapts, g_norms: norms of the gradients as they are to be used; w_norms: of the weights; ratios: to be filled.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    joined: Flat | None = None
    gathered: Flat | None = None
    scratch: Flat | None = None
    whole: bool = False
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


def norms(tensors: Sequence[Tensor], of_rows: Sequence[Tensor] = ()) -> list[float]:
    """The L2 norm of each dense tensor, to 1e-7; it does not overflow where the values are finite.

    Summed in float64, which is slow, and so of large tensors over short rows, whose norms are taken in their own dtype.
    of_rows: for each tensor those of its rows, and maybe more, where they are known.
    """
    parts, lengths = [], []
    for i, x in enumerate(tensors):
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        rows, left = 0, x.numel()
        if left >= _SMALL:
            rows, left = divmod(left, _ROW)
            if of_rows:
                parts.append(of_rows[i][:rows])
            else:
                parts.append(torch.linalg.vector_norm(x.as_strided((rows, _ROW), (_ROW, 1)), dim=1))
        if left:
            parts.append(x.as_strided((left,), (1,), x.storage_offset() + rows * _ROW))
        lengths.append(rows + left)
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
