"""The two ways to run a step on the same flat buffers: Triton's kernels or ATen's fused ones. An object per device."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from legw_kernels.scalars import FIXED, TENSOR32, TENSOR64, Recipe

from .flat import MASTER, Bucket, compute_dtype
from .rule import Group, Rule
from .table import Table, capturing

Gradients = Sequence[Tensor | None]  # one per segment of a bucket, in the parameter's layout
_LR_KINDS = {torch.float32: TENSOR32, torch.float64: TENSOR64}


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device's tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def explain_backend(device: torch.device, wanted: str | None = None) -> tuple[str, str]:
    """The backend a device's parameters get, and why; a ValueError where the wanted one cannot run there."""
    if wanted not in (None, "triton", "aten"):
        raise ValueError(f"backend must be 'triton', 'aten' or None, got {wanted!r}")
    if wanted == "aten":
        return "aten", "asked for"
    if not has_triton():
        problem = "triton is not installed"
    elif interpreted():
        return "triton", "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    elif device.type != "cuda":
        problem = f"Triton's kernels need a GPU, not {device.type!r} tensors, unless TRITON_INTERPRET=1 is set"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        problem = "the kernels need compute capability 8.0 or higher"
    else:
        return "triton", "a GPU that Triton compiles for"
    if wanted == "triton":
        raise ValueError(f"backend='triton' cannot run on {device}: {problem}")
    return "aten", problem


class TritonBackend:
    """One launch per (parameter dtype, gradient dtype) and step; the LR and all counts stay on the device."""

    name = "triton"

    def __init__(self, rule: Rule, buckets: Sequence[Bucket], groups: Sequence[Group], steps_applied: int) -> None:
        self.device = device = buckets[0].device
        self._rule, self.buckets = rule, buckets
        self.counts = torch.tensor([steps_applied], dtype=torch.int64, device=device)
        self._milestones, milestones = [], list[int]()
        for group in groups:
            passed = group["schedule"].milestones if group["schedule"] else ()
            self._milestones.append((len(milestones), len(passed)))
            milestones += passed
        self._milestone_table = torch.tensor(milestones or [0], dtype=torch.int64, device=device)
        self._group_table: Table | None = None
        self._segment_tables: dict[tuple[int, torch.dtype], tuple[Table, Tensor]] = {}

    def step(self, groups: Sequence[Group], gradients: Sequence[Gradients], *, advance: bool) -> None:
        """gradients: one list per bucket. advance: whether this step counts as applied."""
        from legw_kernels import launch

        if self._group_table is None and capturing(self.device):  # pinned memory cannot be made in a capture
            raise RuntimeError("optimizer.step() must run eagerly once before it is captured into a graph")
        group_table = self._write_groups(groups)
        launches = [
            (i, dtype)
            for i, some in enumerate(gradients)
            for dtype in sorted({g.dtype for g in some if g is not None}, key=str)
        ]
        # A device without any gradient still advances its count, beside the others.
        launches = launches or [(0, self.buckets[0].dtype)]
        for i, dtype in launches:
            bucket = self.buckets[i]
            rows = list[int]()
            for segment, g in zip(bucket.segments, gradients[i], strict=True):
                g = g if g is not None and g.dtype == dtype else None
                rows += launch.segment_row(segment.param, g, segment.first_tile, segment.group)
            table, ticket = self._segment_table(i, dtype, len(rows))
            launch.step(
                self._rule.name,
                segments=table.write(rows),
                tiles=bucket.tiles,
                groups=group_table,
                milestones=self._milestone_table,
                counts=self.counts,
                steps=bucket.steps,
                ticket=ticket,
                state=bucket.state.get(self._rule.states[0]),
                master=bucket.state.get(MASTER),
                param_dtype=bucket.dtype,
                grad_dtype=dtype,
                advance=advance and (i, dtype) == launches[-1],
                tile=bucket.tile,
            )

    @property
    def captured(self) -> bool:
        """Whether a graph may still replay one of this object's steps."""
        return any(table.captured for table, _ in self._segment_tables.values())

    def _segment_table(self, bucket: int, dtype: torch.dtype, numel: int) -> tuple[Table, Tensor]:
        key = bucket, dtype
        if key not in self._segment_tables:
            device = self.counts.device
            if capturing(device):  # before a ticket is made: its zero would only be recorded
                raise RuntimeError(f"{dtype} gradients are new: run optimizer.step() eagerly once before capturing it")
            table = Table(numel, torch.int64, device)
            self._segment_tables[key] = table, torch.zeros(1, dtype=torch.int32, device=device)
        return self._segment_tables[key]

    def _write_groups(self, groups: Sequence[Group]) -> Tensor:
        from legw_kernels import launch

        rows = list[float]()
        for group, milestones in zip(groups, self._milestones, strict=True):
            lr, schedule = group["lr"], group["schedule"]
            tensor = lr if isinstance(lr, Tensor) and schedule is None and lr.device == self.counts.device else None
            if schedule is not None:
                recipe = schedule.recipe
            elif tensor is not None and tensor.dtype in _LR_KINDS:
                recipe = Recipe(_LR_KINDS[tensor.dtype])
            else:
                recipe = Recipe(FIXED, float(lr))
            rows += launch.group_row(
                recipe, tensor, milestones, bool(self._rule.used_states(group)), self._rule.hyper(group)
            )
        if self._group_table is None:
            self._group_table = Table(len(rows), torch.float64, self.counts.device, shared=True)
        return self._group_table.write(rows)


class AtenBackend:
    """ATen's fused kernels over lists of the same tensors; counts and LR on the host."""

    name = "aten"
    captured = False

    def __init__(self, rule: Rule, buckets: Sequence[Bucket], groups: Sequence[Group], steps_applied: int) -> None:
        self.device = buckets[0].device
        self._rule, self.buckets = rule, buckets
        self.counts = torch.tensor([steps_applied], dtype=torch.int64, device="cpu")

    def step(self, groups: Sequence[Group], gradients: Sequence[Gradients], *, advance: bool) -> None:
        """gradients: one list per bucket. advance: whether this step counts as applied."""
        if capturing(self.device):
            raise RuntimeError(
                "backend='aten' cannot be captured: its LR and counts are on the host; use backend='triton'"
            )
        t = int(self.counts)
        for bucket, some in zip(self.buckets, gradients, strict=True):
            alike: dict[tuple[int, bool], list[int]] = {}  # (group, whether it is the first update) -> segments
            for i, (segment, g, count) in enumerate(zip(bucket.segments, some, bucket.steps.tolist(), strict=True)):
                if g is not None:
                    alike.setdefault((segment.group, count == 0), []).append(i)
            for (index, first), chosen in alike.items():
                group = groups[index]
                lr = group["schedule"](t) if group["schedule"] else float(group["lr"])
                self._update(bucket, chosen, [some[i] for i in chosen], lr, group, first)  # type: ignore[misc]
        if advance:
            self.counts += 1

    def _update(
        self, bucket: Bucket, chosen: list[int], gradients: list[Tensor], lr: float, group: Group, first: bool
    ) -> None:
        params = [bucket.segments[i].param for i in chosen]
        used = self._rule.used_states(group)
        states = [[bucket.segments[i].state[name] for i in chosen] for name in used]
        compute = compute_dtype(bucket.dtype)
        weights: list[Tensor] = params
        if bucket.dtype != compute:
            weights = [self._synced_master(bucket, i) for i in chosen]
        gradients = [g if g.dtype == compute else g.to(compute) for g in gradients]
        self._rule.aten(weights, gradients, states, lr, group, first)
        if bucket.dtype != compute:
            torch._foreach_copy_(params, weights)
        if used:
            bucket.steps[chosen if len(chosen) < len(bucket.segments) else slice(None)] += 1

    @staticmethod
    def _synced_master(bucket: Bucket, i: int) -> Tensor:
        """The segment's master; where the weight is not its rounding, it was changed from outside, and it counts."""
        p, master = bucket.segments[i].param, bucket.segments[i].state.get(MASTER)
        if master is None:
            return p.float()
        return torch.where(master.to(p.dtype) == p, master, p, out=master)


BACKENDS = {backend.name: backend for backend in (TritonBackend, AtenBackend)}
