"""A step by ATen's kernels on the flat buffers of one device; counts, norms and LR on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from legw_kernels import scalars

from .control import Control
from .flat import MASTER, Bucket, compute_dtype
from .rule import Gradients, Group, Rule, Tensors, group_lr, norm
from .table import capturing


class AtenBackend:
    """ATen's fused kernels over lists of the same tensors; counts, norms and LR on the host."""

    name = "aten"
    captured = False

    def __init__(
        self,
        rule: Rule,
        buckets: Sequence[Bucket],
        groups: Sequence[Group],
        steps_applied: int,
        *,
        carry_norms: bool = False,
    ) -> None:
        self.device = buckets[0].device
        self._rule, self.buckets = rule, buckets
        self.counts = torch.tensor([steps_applied, 0], dtype=torch.int64, device="cpu")
        self._norms: Tensor | None = None
        self.nonfinite = torch.zeros(1, device="cpu")
        self._norm = 0.0

    def begin(self, groups: Sequence[Group], gradients: Sequence[Gradients], control: Control, others: int) -> None:
        """Take the gradients of one step: one list per bucket. others: how many other devices take part."""
        if capturing(self.device):
            raise RuntimeError(
                "backend='aten' cannot be captured: its LR and counts are on the host; use backend='triton'"
            )
        self._gradients = gradients
        if self._norms is None and (control.global_norm or self._rule.adapts):
            self._norms = torch.zeros(3, sum(len(b.segments) for b in self.buckets), dtype=torch.float64, device="cpu")

    def write_groups(self, groups: Sequence[Group]) -> None:
        """Nothing: every step reads the groups."""

    def measure(self, control: Control, *, updates: bool, gradients: bool, clips: bool) -> None:
        """Norms of the gradients; those of weights and updates are taken as the tensors are updated."""
        if gradients:
            assert self._norms is not None
            scale = control.inverse_scale
            norms = [0.0 if g is None else norm(g) * scale for some in self._gradients for g in some]
            self._norms[0] = torch.tensor(norms, dtype=torch.float64, device="cpu")
            self._norm = norm(self._norms[0])

    def global_norm(self) -> Tensor:
        return torch.tensor(self._norm, dtype=torch.float64, device="cpu")

    def weights_changed(self) -> None:
        """Nothing: every step takes the norms of the weights."""

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
        t, own = int(self.counts[0]), 0
        inverse, clips = control.inverse_scale, [1.0] * len(groups)
        if control.clips:
            clips = [scalars.clip_factor(self._norm, *self._rule.clip(group)) for group in groups]
        for bucket, some in zip(self.buckets, self._gradients, strict=True):
            alike: dict[tuple[int, int], list[int]] = {}  # (group, earlier updates) -> segments
            for i, (segment, g, count) in enumerate(zip(bucket.segments, some, bucket.exact_steps(), strict=True)):
                if g is not None:
                    alike.setdefault((segment.group, count), []).append(i)
            for (index, count), chosen in alike.items():
                group = groups[index]
                lr = group_lr(group, t)
                self._update(bucket, own, chosen, [some[i] for i in chosen], lr, group, count, inverse, clips[index])
            own += len(bucket.segments)

    def _update(
        self, bucket: Bucket, own: int, chosen: list[int], gradients: list[Any], lr: float, group: Group, count: int,
        inverse: float, clip: float,
    ) -> None:  # fmt: skip
        params = [bucket.segments[i].param for i in chosen]
        used = self._rule.used_states(group)
        states = [
            [bucket.segments[i].state[name] for i in chosen] if name in used else [] for name in self._rule.states
        ]
        compute = compute_dtype(bucket.dtype)
        weights: list[Tensor] = params
        if bucket.dtype != compute:
            weights = [self._synced_master(bucket, i) for i in chosen]
        gradients = [g if g.dtype == compute else g.to(compute) for g in gradients]
        tensors = Tensors(weights, gradients, states, [self._rule.exempt(group, p) for p in params])
        columns = [own + i for i in chosen]
        if self._norms is not None:
            tensors.g_norms = (self._norms[0, columns] * clip).tolist()
        self._rule.aten(tensors, lr, count, inverse * clip, group)
        if self._norms is not None and tensors.ratios:
            self._norms[1, columns] = torch.tensor(tensors.w_norms, dtype=torch.float64)
            self._norms[2, columns] = torch.tensor(tensors.ratios, dtype=torch.float64)
        if bucket.dtype != compute:
            torch._foreach_copy_(params, weights)
        if used:
            rows = chosen if len(chosen) < len(bucket.segments) else slice(None)
            bucket.steps[rows] = count + 1
            if bucket.shown_steps is not None:
                bucket.shown_steps[rows] = count + 1

    @staticmethod
    def _synced_master(bucket: Bucket, i: int) -> Tensor:
        """The segment's master; where the weight is not its rounding, it was changed from outside, and it counts."""
        p, master = bucket.segments[i].param, bucket.segments[i].state.get(MASTER)
        if master is None:
            return p.float()
        return torch.where(master.to(p.dtype) == p, master, p, out=master)
