"""A step by Triton's kernels on the flat buffers of one device: tables for the launches, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from legw_kernels.formulas import FIXED, TENSOR32, TENSOR64, ScheduleConstants

from .. import capture
from ..buffers.bucket import MASTER, Bucket, compute_dtype
from ..spec import Gradients, Group, Rule
from .base import Control
from .device_table import Table

if TYPE_CHECKING:
    from legw_kernels.launch import Rows, Step, Work


_LR_KINDS = {torch.float32: TENSOR32, torch.float64: TENSOR64}


class _Norms(NamedTuple):
    """Of one bucket: norms of each chunk, and each tensor's trust ratio."""

    partials: Tensor
    ratios: Tensor

    def clear(self) -> None:
        self.partials.zero_()
        self.forget_weights()

    def forget_weights(self) -> None:
        """Of what the last update left."""
        from legw_kernels import tables

        if len(self.partials) > tables.WEIGHT_NORM + 1:
            self.partials[tables.WEIGHT_NORM :].fill_(tables.UNKNOWN)


def _addresses(bucket: Bucket, gradients: Gradients, dtype: torch.dtype, *, complete: bool) -> list[int]:
    """The address table, for the gradients of one dtype. complete: whether every one is there and of that dtype."""
    if complete:
        own = list(map(Tensor.data_ptr, gradients))  # type: ignore[arg-type]
    else:
        own = [0 if g is None else g.data_ptr() if g.dtype == dtype else -1 for g in gradients]
    if 0 in own:  # an empty tensor's address, which is counted all the same: no tile of it is ever read
        own = [16 if a == 0 and g is not None else a for a, g in zip(own, gradients, strict=True)]
    return bucket.addresses + own


class TritonBackend:
    """A launch per (parameter dtype, gradient dtype), more with norms; LR, norms and all counts stay on the device."""

    name = "triton"

    def __init__(
        self,
        rule: Rule,
        buckets: Sequence[Bucket],
        groups: Sequence[Group],
        steps_applied: int,
        *,
        carry_norms: bool = False,
    ) -> None:
        from legw_kernels import launch

        self.device = device = buckets[0].device
        self._rule, self.buckets = rule, buckets
        self.step_counts = torch.tensor([steps_applied, 0], dtype=torch.int64, device=device)
        self._tables: tuple[Table, Table] | None = None  # of the groups, and of their schedules' milestones
        self._segments = [
            torch.tensor(
                [launch.segment_row(s.param, s.first_tile, s.first_chunk, s.chunk_tiles, s.group) for s in b.segments],
                dtype=torch.int64,
                device="cpu",
            ).to(device)
            for b in buckets
        ]
        self._rows: list[Rows | None] = [
            launch.Rows.of(b.params, b.tile, compute_dtype(b.dtype), device) if rule.projects else None for b in buckets
        ]
        self._address_tables: dict[tuple[int, torch.dtype], tuple[Table, Tensor]] = {}
        self._norms: list[_Norms] = []  # of each bucket, once needed
        self._totals: Tensor | None = None
        self._turn = torch.zeros(1, dtype=torch.int32, device=device) if carry_norms else None
        self._n_totals = self._others = 0
        self.nonfinite = torch.zeros(1, dtype=torch.float32, device=device)
        self._works: list[tuple[Work, Step]] = []  # of the present step
        self._made: dict[object, Work] = {}
        # By bucket: the dtypes of gradients, None among them where some are missing; and the looks that they are of.
        self._dtypes: tuple[list[set[torch.dtype | None]], object] = ([], None)

    def begin(
        self,
        groups: Sequence[Group],
        gradients: Sequence[Gradients],
        control: Control,
        others: int,
        looks: object,
    ) -> None:
        """Write the tables of one step. gradients: one list per bucket.

        others: how many other devices take part. looks: stands for what the gradients look like; see `Layout`.
        """
        if self._tables is None and capture.capturing(self.device):  # pinned memory cannot be made in a capture
            raise RuntimeError("optimizer.step() must run eagerly once before it is captured into a graph")
        if control.global_norm or self._rule.adapts:
            self._make_norms(others)
        tables = self.write_groups(groups)
        if looks is not self._dtypes[1]:
            self._dtypes = [{None if g is None else g.dtype for g in some} for some in gradients], looks
        found = self._dtypes[0]
        pairs = [(i, dtype) for i, dtypes in enumerate(found) for dtype in sorted(filter(None, dtypes), key=str)]
        for i in set(range(len(self._norms))) - {i for i, _ in pairs}:  # or their last norms would be shown again
            self._norms[i].clear()
        self._n_totals, self._works = self._others, []
        # A device without any gradient still advances its count, beside the others.
        for i, dtype in pairs or [(0, self.buckets[0].dtype)]:
            self._works.append(self._work(i, dtype, tables, gradients[i], control, complete=found[i] == {dtype}))
        self._works = [(work, step._replace(n_totals=self._n_totals)) for work, step in self._works]

    def _work(
        self,
        index: int,
        dtype: torch.dtype,
        tables: tuple[Tensor, Tensor],
        gradients: Gradients,
        control: Control,
        *,
        complete: bool,
    ) -> tuple[Work, Step]:
        from legw_kernels import launch

        bucket = self.buckets[index]
        table, _ = self._address_table(index, dtype)
        # What a bucket has is never replaced, but states and norms may be added.
        key = index, dtype, len(bucket.state), bucket.torch_steps is None, len(self._norms)
        if key not in self._made:
            self._made[key] = self._make_work(index, dtype)
        step = launch.Step(
            table.write(_addresses(bucket, gradients, dtype, complete=complete)),
            *tables,
            grad_scale=control.on(self.device, control.grad_scale),
            found_inf=control.on(self.device, control.found_inf),
            first_total=self._n_totals,
        )
        self._n_totals += launch.programs(bucket.chunks, bucket.dtype)
        return self._made[key], step

    def _make_work(self, index: int, dtype: torch.dtype) -> Work:
        from legw_kernels import arguments, launch

        bucket, norms = self.buckets[index], self._norms[index] if self._norms else None
        _, ticket = self._address_table(index, dtype)
        states = [bucket.state.get(name) for name in self._rule.states]
        return launch.Work(
            rule=self._rule.name,
            param_dtype=bucket.dtype,
            grad_dtype=dtype,
            tile=bucket.tile,
            segments=self._segments[index],
            chunks=bucket.chunks,
            counters=arguments.Counters(self.step_counts, bucket.tensor_steps, bucket.torch_steps, ticket),
            states=arguments.States(**dict(zip("abc", states, strict=False)), master=bucket.state.get(MASTER)),
            norms=arguments.Norms(norms and norms.partials, self._turn, self._totals, norms and norms.ratios),
            nonfinite=self.nonfinite,
            rows=self._rows[index],
        )

    def measure(self, control: Control, *, updates: bool, gradients: bool, clips: bool) -> None:
        """Norms by tensor; see `launch.take_norms`."""
        from legw_kernels import launch

        for work, step in self._works:
            launch.take_norms(
                work, step, updates=updates, gradients=gradients, clips=clips, skips=clips and control.skips
            )

    def update(self, groups: Sequence[Group], control: Control, *, clipped: bool, advance: bool) -> None:
        """The update. clipped: whether what was measured for ratios was. advance: whether this step counts."""
        from legw_kernels import launch

        for i, (work, step) in enumerate(self._works, 1):
            if work.rows is not None:
                launch.project(work, step, clips=control.clips, skips=control.skips)
            launch.update(
                work,
                step,
                clips=control.clips,
                skips=control.skips,
                clipped=clipped,
                last=i == len(self._works),
                advances=advance,
            )
        self._works = []

    def global_norm(self) -> Tensor:
        """Of this device's gradients, float64, on the device."""
        assert self._totals is not None
        norm: Tensor = torch.linalg.vector_norm(self._totals[self._others : self._n_totals])
        return norm

    def take_norms(self, others: Sequence[Tensor]) -> None:
        """The global norms of the other devices."""
        assert self._totals is not None
        for i, other in enumerate(others):
            self._totals[i].copy_(other, non_blocking=True)

    def norms(self, kind: str) -> list[Tensor] | None:
        """One kind of norm of each tensor, bucket by bucket; None before any were taken."""
        from legw_kernels import launch, tables

        if not self._norms:
            return None
        rows = {"gradient": tables.GRADIENT_NORM, "weight": tables.WEIGHT_NORM}
        found = list[Tensor]()
        for bucket, segments, norms in zip(self.buckets, self._segments, self._norms, strict=True):
            if kind == "ratio":
                found += norms.ratios.clone().unbind()
            else:
                args = norms.partials, self._turn, rows[kind], bucket.dtype, bucket.tile
                found += launch.tensor_norms(segments, *args).unbind()
        return found

    def weights_changed(self) -> None:
        """Measure the weights' norms anew in the next step, where they are carried over from the last."""
        for norms in self._norms:
            norms.forget_weights()

    @property
    def captured(self) -> bool:
        """Whether a graph may still replay one of this object's steps."""
        return any(table.captured for table, _ in self._address_tables.values())

    def _make_norms(self, others: int) -> None:
        from legw_kernels import launch, tuning

        if self._norms:
            return
        if capture.capturing(self.device):
            raise RuntimeError("norms are new to this optimizer: run optimizer.step() eagerly once before capturing it")
        self._others, size, rows = others, others, 3 if self._turn is None else 4
        for bucket in self.buckets:
            partials = torch.zeros(rows, max(1, bucket.chunks.numel()), dtype=torch.float64, device=self.device)
            ratios = torch.zeros(len(bucket.segments), dtype=torch.float64, device=self.device)
            self._norms.append(_Norms(partials, ratios))
            self._norms[-1].clear()
            # A launch for each dtype that its gradients may have.
            size += len(tuning.TRITON_TYPES) * launch.programs(bucket.chunks, bucket.dtype)
        self._totals = torch.zeros(size, dtype=torch.float64, device=self.device)

    def _address_table(self, bucket: int, dtype: torch.dtype) -> tuple[Table, Tensor]:
        key = bucket, dtype
        if key not in self._address_tables:
            device = self.step_counts.device
            if capture.capturing(device):  # before a ticket is made: its zero would only be recorded
                raise RuntimeError(f"{dtype} gradients are new: run optimizer.step() eagerly once before capturing it")
            table = Table(2 * len(self.buckets[bucket].segments), torch.int64, device)
            self._address_tables[key] = table, torch.zeros(1, dtype=torch.int32, device=device)
        return self._address_tables[key]

    def write_groups(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """The tables of param groups and of milestones, with the groups' values as they are now."""
        from legw_kernels import launch, tables

        rows, on_device, milestones = list[float](), list[tuple[int, Tensor]](), list[int]()
        for group in groups:
            lr, schedule = group["lr"], group["schedule"]
            tensor = (
                lr if isinstance(lr, Tensor) and schedule is None and lr.device == self.step_counts.device else None
            )
            own = schedule.milestones if schedule is not None else ()
            place = len(milestones), len(own)
            milestones += own
            if schedule is not None:
                recipe = schedule.recipe
                if (scale := group.get("lr_scale", 1.0)) != 1:
                    recipe = recipe._replace(peak_lr=scale * recipe.peak_lr, slope=scale * recipe.slope)
            elif tensor is not None and tensor.dtype in _LR_KINDS:
                recipe = ScheduleConstants(_LR_KINDS[tensor.dtype])
            else:
                recipe = ScheduleConstants(FIXED, float(lr))
            used, hyper = self._rule.used_states(group), list[float]()
            x: Tensor | float
            for x in self._rule.hyper(group):
                if isinstance(x, Tensor):
                    on_device.append((len(rows) + tables.HYPER + len(hyper), x))
                hyper.append(0.0 if isinstance(x, Tensor) else x)
            states = sum(1 << self._rule.states.index(name) for name in used)
            clip, vectors = self._rule.clip(group), self._rule.exempts_vectors(group)
            rows += launch.group_row(recipe, tensor, place, states, clip, vectors, hyper)
        if self._tables is None:
            device = self.step_counts.device
            # Sizes hold as long as this object does: another schedule makes another, a change of the batch keeps them.
            self._tables = (
                Table(len(rows), torch.float64, device, shared=True),
                Table(max(1, len(milestones)), torch.int64, device, shared=True),
            )
        table, milestone_table = self._tables[0].write(rows), self._tables[1].write(milestones or [0])
        for i, x in on_device:
            table[i].copy_(x.reshape(()))
        return table, milestone_table
