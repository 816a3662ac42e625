"""A step by ATen's kernels on the flat buffers of one device; counts, norms and LR on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from legw_kernels import scalars

from .control import Control
from .flat import MASTER, Bucket, compute_dtype
from .rule import Gradients, Group, Rule, Tensors, group_lr, norm, norms
from .table import capturing


@dataclass
class Alike:
    """Segments of one bucket that ATen updates together, and the lists of their tensors.

    count: their earlier updates, less those of the bucket's first segment. rows: their places in the bucket's tables,
    columns: in those of the device.
    """

    bucket: Bucket
    group: int
    count: int
    chosen: list[int]
    rows: slice | Tensor
    columns: slice | Tensor
    params: list[Tensor]
    _states: dict[str, list[Tensor]] = field(default_factory=dict)

    def state(self, name: str) -> list[Tensor]:
        if name not in self._states:
            self._states[name] = [self.bucket.segments[i].state[name] for i in self.chosen]
        return self._states[name]


def _group_alike(bucket: Bucket, own: int, counts: Sequence[int | None]) -> list[Alike]:
    """The segments of a bucket by group and count; those without one are left out. own: the bucket's first column."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (segment, count) in enumerate(zip(bucket.segments, counts, strict=True)):
        if count is not None:
            alike.setdefault((segment.group, count), []).append(i)
    found = []
    for (group, count), chosen in alike.items():
        first, after = chosen[0], chosen[-1] + 1
        rows: slice | Tensor = slice(first, after)
        columns: slice | Tensor = slice(own + first, own + after)
        if after - first != len(chosen):
            rows = torch.tensor(chosen, device="cpu")
            columns = rows + own
        params = [bucket.segments[i].param for i in chosen]
        found.append(Alike(bucket, group, count, chosen, rows, columns, params))
    return found


class AtenBackend:
    """ATen's fused kernels over lists of the same tensors; counts, norms and LR on the host."""

    name = "aten"
    captured = False

    def __init__(self, rule: Rule, buckets: Sequence[Bucket], groups: Sequence[Group], steps_applied: int) -> None:
        self.device = buckets[0].device
        self._rule, self.buckets = rule, buckets
        self.counts = torch.tensor([steps_applied, 0], dtype=torch.int64, device="cpu")
        self._norms: Tensor | None = None
        self.nonfinite = torch.zeros(1, device="cpu")
        self._norm = 0.0
        self._first_columns = list(accumulate((len(bucket.segments) for bucket in buckets), initial=0))
        # By bucket: how counts and gradients lay at the last step, and what was made of that. Steps are mostly alike.
        self._alike: list[tuple[list[int | None], list[Alike]]] = [([], []) for _ in buckets]

    def begin(self, groups: Sequence[Group], gradients: Sequence[Gradients], control: Control, others: int) -> None:
        """Take the gradients of one step: one list per bucket. others: how many other devices take part."""
        if capturing(self.device):
            raise RuntimeError(
                "backend='aten' cannot be captured: its LR and counts are on the host; use backend='triton'"
            )
        self._gradients = gradients
        if self._norms is None and (control.global_norm or self._rule.adapts):
            self._norms = torch.zeros(3, self._first_columns[-1], dtype=torch.float64, device="cpu")

    def write_groups(self, groups: Sequence[Group]) -> None:
        """Nothing: every step reads the groups."""

    def measure(self, control: Control, *, updates: bool, gradients: bool, clips: bool) -> None:
        """Norms of the gradients; those of weights and updates are taken as the tensors are updated."""
        if gradients:
            assert self._norms is not None
            found = iter(norms([g for some in self._gradients for g in some if g is not None]))
            every = [0.0 if g is None else next(found) for some in self._gradients for g in some]
            self._norms[0] = torch.tensor(every, dtype=torch.float64, device="cpu") * control.inverse_scale
            self._norm = norm(self._norms[0])

    def global_norm(self) -> Tensor:
        return torch.tensor(self._norm, dtype=torch.float64, device="cpu")

    def norms(self, kind: str) -> list[Tensor] | None:
        """One kind of norm of each tensor, bucket by bucket; None before any were taken."""
        if self._norms is None:
            return None
        return list(self._norms[("gradient", "weight", "ratio").index(kind)].clone().unbind())

    def take_norms(self, others: Sequence[Tensor]) -> None:
        self._norm = math.hypot(self._norm, *map(float, others))

    def update(self, groups: Sequence[Group], control: Control, *, advance: bool) -> None:
        """The update. advance: whether this step counts as applied."""
        apply = control.found_inf is None or float(control.found_inf) == 0
        if control.global_norm:
            self.nonfinite.fill_(float(not math.isfinite(self._norm)))
            apply = apply and not (control.skips and self.nonfinite)
        if apply:
            self._update_all(groups, control)
        self.counts[0 if apply else 1] += advance

    def _update_all(self, groups: Sequence[Group], control: Control) -> None:
        t, inverse = int(self.counts[0]), control.inverse_scale
        lrs = [group_lr(group, t) for group in groups]
        clips = [1.0] * len(groups)
        if control.clips:
            clips = [scalars.clip_factor(self._norm, *self._rule.clip(group)) for group in groups]
        for index, (bucket, some) in enumerate(zip(self.buckets, self._gradients, strict=True)):
            counts = bucket.exact_steps()
            pattern = [None if g is None else count - counts[0] for g, count in zip(some, counts, strict=True)]
            if pattern != self._alike[index][0]:
                self._alike[index] = pattern, _group_alike(bucket, self._first_columns[index], pattern)
            for alike in self._alike[index][1]:
                i, count = alike.group, alike.count + counts[0]
                self._update(alike, some, lrs[i], groups[i], count, inverse, clips[i])

    def _update(
        self, alike: Alike, some: Gradients, lr: float, group: Group, count: int, inverse: float, clip: float
    ) -> None:
        bucket, params, compute = alike.bucket, alike.params, compute_dtype(alike.bucket.dtype)
        used = self._rule.used_states(group)
        states = [alike.state(name) if name in used else [] for name in self._rule.states]
        weights = params
        if bucket.dtype != compute:
            weights = [self._synced_master(bucket, i) for i in alike.chosen]
        chosen = [some[i] for i in alike.chosen]
        gradients = [g if g.dtype == compute else g.to(compute) for g in chosen if g is not None]
        tensors = Tensors(weights, gradients, states)
        if self._norms is not None:
            tensors.g_norms = (self._norms[0, alike.columns] * clip).tolist()
        self._rule.aten(tensors, lr, count, inverse * clip, group)
        if self._norms is not None and tensors.ratios:
            self._norms[1, alike.columns] = torch.tensor(tensors.w_norms, dtype=torch.float64)
            self._norms[2, alike.columns] = torch.tensor(tensors.ratios, dtype=torch.float64)
        if bucket.dtype != compute:
            torch._foreach_copy_(params, weights)
        if used:
            bucket.steps[alike.rows] = count + 1
            if bucket.shown_steps is not None:
                bucket.shown_steps[alike.rows] = count + 1

    @staticmethod
    def _synced_master(bucket: Bucket, i: int) -> Tensor:
        """The segment's master; where the weight is not its rounding, it was changed from outside, and it counts."""
        p, master = bucket.segments[i].param, bucket.segments[i].state.get(MASTER)
        if master is None:
            return p.float()
        return torch.where(master.to(p.dtype) == p, master, p, out=master)
