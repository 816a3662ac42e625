"""A step by Triton's kernels on the flat buffers of one device: the tables that they read, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from legw_kernels import launch, tables, tuning
from legw_kernels.arguments import Counters, Norms, States

from .. import capture
from ..buffers.bucket import MASTER, Bucket, compute_dtype
from ..buffers.gradients import GradientSet
from ..spec import Gradients, Group, OptimizerSpec
from .base import Backend, StepControl
from .device_table import DeviceTable
from .group_table import GroupTable
from .passes import Pass


class _Norms(NamedTuple):
    """The norms of one bucket."""

    partials: Tensor  # of each chunk; see `legw_kernels.tables`
    ratios: Tensor  # each tensor's trust ratio

    def clear(self) -> None:
        self.partials.zero_()
        self.forget_weights()

    def forget_weights(self) -> None:
        """Forget the weights' norms that the last update left."""
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


class _Planned(NamedTuple):
    """What a step launches on the gradients of one dtype in one bucket."""

    work: launch.Work
    bucket: int
    table: DeviceTable  # of addresses
    complete: bool  # whether every gradient of the bucket is there and of that dtype
    first_total: int  # where this work's part of `totals` begins


class TritonBackend(Backend):
    """A launch per pass, parameter dtype and gradient dtype; LR, norms and all counts stay on the device."""

    name = "triton"

    def __init__(
        self, spec: OptimizerSpec, buckets: Sequence[Bucket], steps_applied: int, *, carry_norms: bool = False
    ) -> None:
        self.device = device = buckets[0].device
        self._spec, self.buckets = spec, buckets
        self.step_counts = torch.tensor([steps_applied, 0], dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros(1, dtype=torch.float32, device=device)
        self._group_table = GroupTable(spec, device)
        self._segments = [
            torch.tensor(
                [launch.segment_row(s.tensor, s.first_tile, s.first_chunk, s.chunk_tiles, s.group) for s in b.segments],
                dtype=torch.int64,
                device="cpu",
            ).to(device)
            for b in buckets
        ]
        self._projections: list[launch.Rows | None] = [
            launch.Rows.of(b.tensors, b.tile, compute_dtype(b.dtype), device) if spec.projects else None
            for b in buckets
        ]
        # By bucket and gradient dtype: addresses, and the ticket of its launches.
        self._address_tables: dict[tuple[int, torch.dtype], tuple[DeviceTable, Tensor]] = {}
        self._norms: list[_Norms] = []  # of each bucket, once needed
        self._totals: Tensor | None = None
        self._turn = torch.zeros(1, dtype=torch.int32, device=device) if carry_norms else None
        self._n_totals = self._others = 0
        self._planned = list[_Planned]()  # for gradients like the last step's
        self._unmeasured = list[_Norms]()  # of buckets without a gradient, whose last norms must not be shown again
        self._planned_for: object = None  # what that was planned for
        self._launches = list[tuple[launch.Work, launch.Step]]()  # of this step

    @property
    def captured(self) -> bool:  # type: ignore[override]
        return any(table.captured for table, _ in self._address_tables.values())

    def begin(
        self, groups: Sequence[Group], found: GradientSet, control: StepControl, *, others: int, options: int
    ) -> None:  # fmt: skip
        if not self._group_table.made and capture.capturing(self.device):  # it cannot make pinned memory
            raise RuntimeError("optimizer.step() must run eagerly once before it is captured into a graph")
        if control.global_norm or self._spec.adapts:
            self._make_norms(others)
        group_table, milestones = self._group_table.write(groups, options)
        planned_for = found.generation, bool(self._norms), [len(bucket.state) for bucket in self.buckets]
        if planned_for != self._planned_for:
            self._planned_for = None
            self._planned = self._plan(found.by_bucket)
            self._planned_for = planned_for
        for norms in self._unmeasured:
            norms.clear()
        grad_scale = control.on(self.device, control.grad_scale)
        found_inf = control.on(self.device, control.found_inf)
        self._launches = []
        for work, bucket, table, complete, first_total in self._planned:
            addresses = _addresses(self.buckets[bucket], found.by_bucket[bucket], work.grad_dtype, complete=complete)
            written = table.write(addresses), group_table, milestones
            step = launch.Step(*written, grad_scale, found_inf, first_total, self._n_totals)
            self._launches.append((work, step))

    def _plan(self, by_bucket: Sequence[Gradients]) -> list[_Planned]:
        """The launches for gradients like these: one for each dtype among a bucket's."""
        dtypes = [{None if g is None else g.dtype for g in gradients} for gradients in by_bucket]
        pairs = [(i, dtype) for i, some in enumerate(dtypes) for dtype in sorted(filter(None, some), key=str)]
        self._unmeasured = [norms for i, norms in enumerate(self._norms) if not dtypes[i] - {None}]
        self._n_totals, planned = self._others, list[_Planned]()
        # A device without any gradient still advances its count, beside the others.
        for i, dtype in pairs or [(0, self.buckets[0].dtype)]:
            table, ticket = self._address_table(i, dtype)
            work = self._work(i, dtype, ticket)
            planned.append(_Planned(work, i, table, dtypes[i] == {dtype}, self._n_totals))
            self._n_totals += launch.programs(work.chunks, work.param_dtype)
        return planned

    def _work(self, index: int, dtype: torch.dtype, ticket: Tensor) -> launch.Work:
        bucket, norms = self.buckets[index], self._norms[index] if self._norms else None
        states = [bucket.state.get(name) for name in self._spec.states]
        return launch.Work(
            rule=self._spec.name,
            param_dtype=bucket.dtype,
            grad_dtype=dtype,
            tile=bucket.tile,
            segments=self._segments[index],
            chunks=bucket.chunks,
            counters=Counters(self.step_counts, bucket.tensor_steps, bucket.torch_steps, ticket),
            states=States(**dict(zip("abc", states, strict=False)), master=bucket.state.get(MASTER)),
            norms=Norms(norms and norms.partials, self._turn, self._totals, norms and norms.ratios),
            nonfinite=self.nonfinite,
            rows=self._projections[index],
        )

    def run(self, what: Pass, groups: Sequence[Group], control: StepControl) -> None:
        for i, (work, step) in enumerate(self._launches, 1):
            if what.kind == "norms":
                launch.take_norms(
                    work,
                    step,
                    updates="updates" in what.of,
                    gradients="gradients" in what.of,
                    clips=what.clipped,
                    skips=what.clipped and control.skips,
                )
            elif what.kind == "projection":
                launch.project(work, step, clips=control.clips, skips=control.skips)
            else:
                launch.update(
                    work,
                    step,
                    clips=control.clips,
                    skips=control.skips,
                    clipped=what.clipped,
                    last=i == len(self._launches),
                    advances=control.counts_step,
                )

    def end(self) -> None:
        self._launches = []

    def global_norm(self) -> Tensor:
        assert self._totals is not None
        norm: Tensor = torch.linalg.vector_norm(self._totals[self._others : self._n_totals])
        return norm

    def take_norms(self, others: Sequence[Tensor]) -> None:
        assert self._totals is not None
        for i, other in enumerate(others):
            self._totals[i].copy_(other, non_blocking=True)

    def norms(self, kind: str) -> list[Tensor] | None:
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

    def write_groups(self, groups: Sequence[Group]) -> None:
        self._group_table.write(groups)

    def weights_changed(self) -> None:
        for norms in self._norms:
            norms.forget_weights()

    def _make_norms(self, others: int) -> None:
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

    def _address_table(self, bucket: int, dtype: torch.dtype) -> tuple[DeviceTable, Tensor]:
        key = bucket, dtype
        if key not in self._address_tables:
            if capture.capturing(self.device):  # before a ticket is made: its zero would only be recorded
                raise RuntimeError(f"{dtype} gradients are new: run optimizer.step() eagerly once before capturing it")
            table = DeviceTable(2 * len(self.buckets[bucket].segments), torch.int64, self.device)
            self._address_tables[key] = table, torch.zeros(1, dtype=torch.int32, device=self.device)
        return self._address_tables[key]
