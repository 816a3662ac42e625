"""A step by ATen's kernels on the flat buffers of one device; counts, norms and LR on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from legw_kernels import formulas

from .. import capture
from ..buffers.bucket import MASTER, Bucket, compute_dtype
from ..buffers.gradients import GradientSet
from ..spec import Gradients, Group, OptimizerSpec, group_lr, hyper_floats
from ..torch_private import foreach_copy_
from .aten_math import AtenBatch, Joined, norms
from .base import Backend, StepControl
from .passes import Pass

_BATCH = 1 << 21  # elements: few enough that intermediate results stay in a cache, and enough for few calls


@dataclass
class SegmentBatch:
    """Segments that ATen updates together: of one bucket, group and update count. Holds the lists of their tensors."""

    bucket: Bucket
    group: int  # index into param_groups
    count: int  # earlier updates of the segments
    chosen: list[int]  # the segments' indices in the bucket
    first_column: int  # the bucket's first index in the device's norms
    converts: bool = False  # a gradient has another dtype than the arithmetic
    _generation: int = -1  # of the gradients for which `converts` is known
    _states: dict[tuple[str, bool], list[Tensor]] = field(default_factory=dict)  # results of `state`

    def __post_init__(self) -> None:
        first, after = self.chosen[0], self.chosen[-1] + 1
        self.adjacent = after - first == len(self.chosen)
        self.rows = slice(first, after) if self.adjacent else self.chosen
        self.params = [self.bucket.segments[i].tensor for i in self.chosen]
        tile, segments = self.bucket.tile, [self.bucket.segments[i] for i in self.chosen]
        self._starts = [segment.first_tile * tile for segment in segments]
        self.elements = sum(map(self.bucket.padded, segments))
        self.joined = self._joined()
        self.scratch: list[Joined] = []  # memory for copies of the gradients and for updates, if the spec is two-stage

    def _joined(self) -> Joined | None:
        """The weights to update (masters if there are any), if they follow one another in one of our buffers."""
        weights, buffer = self.params, self.bucket.weights
        if MASTER in self.bucket.state:
            weights, buffer = self.state(MASTER), self.bucket.state[MASTER]
        if buffer is None or not self.adjacent or buffer.dtype != compute_dtype(buffer.dtype):
            return None
        places = [(w.data_ptr() - buffer.data_ptr()) // buffer.element_size() for w in weights]
        if any(place - places[0] != start - self._starts[0] for place, start in zip(places, self._starts, strict=True)):
            return None
        if not 0 <= places[0] <= buffer.numel() - self.elements:
            return None
        return Joined(buffer[places[0] :][: self.elements], weights, self.bucket.tile)

    def state(self, name: str, *, whole: bool = False) -> list[Tensor]:
        """One kind of state of the segments. whole: as a single tensor."""
        if (name, whole) not in self._states:
            every = [self.bucket.segments[i].state[name] for i in self.chosen]
            if whole:
                every = [self.bucket.state[name][self._starts[0] :][: self.elements]]
            self._states[name, whole] = every
        return self._states[name, whole]

    def gradients(self, some: Gradients, generation: int) -> list[Tensor]:
        """The gradients of these segments, out of the bucket's. generation: see `GradientSet`."""
        own: list[Any] = list(some[self.rows] if isinstance(self.rows, slice) else map(some.__getitem__, self.rows))
        if generation != self._generation:
            self.converts = any(g.dtype != compute_dtype(self.bucket.dtype) for g in own)
            self._generation = generation
        return own

    def put(self, row: list[float], values: list[float]) -> None:
        """Write a value for each of these segments into a row of the device's norms."""
        for i, value in zip(self.chosen, values, strict=True):
            row[self.first_column + i] = value


def batches(bucket: Bucket, first_column: int, counts: Sequence[int | None], most: float) -> list[SegmentBatch]:
    """Split the segments of a bucket by group and update count. Segments whose count is None are left out.

    most: the elements in a batch; a larger tensor gets a batch of its own.
    """
    lists: dict[tuple[int, int], list[list[int]]] = {}
    room: dict[tuple[int, int], float] = {}
    for i, (segment, count) in enumerate(zip(bucket.segments, counts, strict=True)):
        if count is not None:
            key, size = (segment.group, count), bucket.padded(segment)
            if room.get(key, -1) < size:
                lists.setdefault(key, []).append([])
                room[key] = max(most, size)
            lists[key][-1].append(i)
            room[key] -= size
    return [SegmentBatch(bucket, *key, chosen, first_column) for key, of_key in lists.items() for chosen in of_key]


def _counts_of(made: Sequence[SegmentBatch], n: int) -> list[int | None]:
    """The update counts of n segments, by the batches that they are in; None for those in no batch."""
    counts: list[int | None] = [None] * n
    for batch in made:
        for i in batch.chosen:
            counts[i] = batch.count
    return counts


class AtenBackend(Backend):
    """Runs steps by ATen's fused kernels over lists of tensors. Counts, norms and LR are on the host."""

    name = "aten"
    counts_on_host = True

    def __init__(self, spec: OptimizerSpec, buckets: Sequence[Bucket], steps_applied: int) -> None:
        self.device = buckets[0].device
        self._spec, self.buckets = spec, buckets
        self.step_counts = torch.tensor([steps_applied, 0], dtype=torch.int64, device="cpu")
        self._step_counts = self.step_counts.numpy()  # the same memory, ten times as fast to access
        self.nonfinite = torch.zeros(1, dtype=torch.float32, device="cpu")
        self._first_columns = list(accumulate((len(bucket.segments) for bucket in buckets), initial=0))
        self._gradients: Sequence[Gradients] = ()  # by bucket, in the step that has begun
        self._generation = -1  # of these gradients: see `GradientSet`
        self._options = -1  # the options' generation when `_hypers` was made
        self._hypers: dict[int, Any] = {}  # hyper-parameters as floats, by group
        self._norms: dict[str, list[float]] = {}  # norms or ratios of each tensor, by kind; empty before the first
        self._norm = 0.0  # the norm of all gradients
        self._takes_norms_later = False  # the update computes the gradients' norms, batch by batch
        # By bucket: (batches, the key they were made for, the last generation of gradients that they fit).
        self._batches: list[tuple[list[SegmentBatch], object, int]] = [([], (), -1) for _ in buckets]
        self._scratch: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def begin(
        self, groups: Sequence[Group], found: GradientSet, control: StepControl, *, others: int, options: int
    ) -> None:  # fmt: skip
        if capture.capturing(self.device):
            raise RuntimeError(
                "backend='aten' cannot be captured: its LR and counts are on the host; use backend='triton'"
            )
        self._gradients, self._generation = found.by_bucket, found.generation
        if options != self._options:
            self._options, self._hypers = options, {}
        if not self._norms and (control.global_norm or self._spec.adapts):
            self._norms = {kind: [0.0] * self._first_columns[-1] for kind in ("gradient", "weight", "ratio")}

    def end(self) -> None:
        self._gradients = ()  # so that zero_grad can free them

    def run(self, what: Pass, groups: Sequence[Group], control: StepControl) -> None:
        """Run a pass. A norm pass computes norms of gradients only: the update computes the others on the way."""
        if what.kind == "norms" and "gradients" in what.of:
            self._take_gradient_norms(control)
        if what.kind == "update":
            self._update_or_skip(groups, control)

    def _take_gradient_norms(self, control: StepControl) -> None:
        # If nothing can skip the step, the update computes them, batch by batch.
        self._takes_norms_later = not control.global_norm and control.found_inf is None
        if self._takes_norms_later:
            self._norms["gradient"] = [0.0] * self._first_columns[-1]
            return
        every = [g for some in self._gradients for g in some]
        found, scale = iter(norms([g for g in every if g is not None])), control.inverse_scale
        taken = [0.0 if g is None else next(found) * scale for g in every]
        self._norms["gradient"], self._norm = taken, math.hypot(*taken)

    def global_norm(self) -> Tensor:
        return torch.tensor(self._norm, dtype=torch.float64, device="cpu")

    def take_norms(self, others: Sequence[Tensor]) -> None:
        self._norm = math.hypot(self._norm, *map(float, others))

    def norms(self, kind: str) -> list[Tensor] | None:
        return list(torch.tensor(self._norms[kind], dtype=torch.float64).unbind()) if self._norms else None

    def _update_or_skip(self, groups: Sequence[Group], control: StepControl) -> None:
        apply = control.found_inf is None or float(control.found_inf) == 0
        apply = apply and math.isfinite(control.inverse_scale)
        if control.global_norm:
            self.nonfinite.fill_(float(not math.isfinite(self._norm)))
            apply = apply and not (control.skips and self.nonfinite)
        if apply:
            self._update_all(groups, control)
        self._step_counts[0 if apply else 1] += control.counts_step

    def _update_all(self, groups: Sequence[Group], control: StepControl) -> None:
        t, inverse = int(self._step_counts[0]), control.inverse_scale
        if self._spec.adapts:
            self._norms["weight"] = [0.0] * self._first_columns[-1]
        lrs = [group_lr(group, t) for group in groups]
        clips = [1.0] * len(groups)
        if control.clips:
            clips = [formulas.clip_factor(self._norm, *self._spec.clip(group)) for group in groups]
        # Without intermediate results one call is fastest.
        sums = any(map(self._spec.needs_clipped, groups))
        whole = not (sums or control.clips or control.grad_scale is not None)
        for index, (bucket, some) in enumerate(zip(self.buckets, self._gradients, strict=True)):
            most = math.inf if whole and bucket.dtype == compute_dtype(bucket.dtype) else _BATCH
            for batch in self._batches_of(index, bucket, some, most):
                i = batch.group
                self._update(batch, some, lrs[i], groups[i], inverse, clips[i])

    def _batches_of(self, index: int, bucket: Bucket, some: Gradients, most: float) -> list[SegmentBatch]:
        """The batches of one bucket: those of the last update, if they still fit."""
        made, made_for, generation = self._batches[index]
        key = most, bucket.addresses
        if generation == self._generation and made_for == key and bucket.steps_are_ours():
            return made
        counts = [None if g is None else count for g, count in zip(some, bucket.exact_steps(), strict=True)]
        if made_for != key or counts != _counts_of(made, len(counts)):
            made = batches(bucket, self._first_columns[index], counts, most)
            if self._spec.two_stage:
                self._give_scratch(bucket, made)
        self._batches[index] = made, key, self._generation
        return made

    def _update(
        self, batch: SegmentBatch, some: Gradients, lr: float, group: Group, inverse: float, clip: float
    ) -> None:
        bucket, compute = batch.bucket, compute_dtype(batch.bucket.dtype)
        used = self._spec.used_states(group)
        whole = self._spec.two_stage and batch.adjacent
        states = [batch.state(name, whole=whole) if name in used else [] for name in self._spec.states]
        weights = batch.params
        if bucket.dtype != compute:
            weights = [self._synced_master(bucket, i) for i in batch.chosen]
        gradients = batch.gradients(some, self._generation)
        if batch.converts and not self._spec.two_stage:
            gradients = [g if g.dtype == compute else g.to(compute) for g in gradients]
        tensors = AtenBatch(weights, gradients, states, batch.count, inverse * clip, batch.joined, whole=whole)
        if batch.scratch:
            tensors.gathered, tensors.scratch = batch.scratch
            foreach_copy_(tensors.gathered.views, gradients)
            tensors.gathered.clear_padding()
        if self._spec.adapts:
            tensors.exempts_vectors = self._spec.exempts_vectors(group)
            self._take_norms(batch, tensors, inverse, clip)
        if (hyper := self._hypers.get(batch.group)) is None:
            hyper = self._hypers[batch.group] = hyper_floats(self._spec.hyper(group))
        self._spec.aten(tensors, hyper, lr)
        if self._spec.adapts:
            batch.put(self._norms["ratio"], tensors.ratios)
        if bucket.dtype != compute:
            foreach_copy_(batch.params, weights)
        if used:
            batch.count += 1
            bucket.set_steps_of(batch.rows, batch.count)

    def _take_norms(self, batch: SegmentBatch, tensors: AtenBatch, inverse: float, clip: float) -> None:
        """Fill in the batch's norms of weights and gradients."""
        if self._takes_norms_later:
            found = norms(tensors.grads) if tensors.gathered is None else tensors.gathered.norms()
            batch.put(self._norms["gradient"], [x * inverse for x in found])
        tensors.g_norms = [self._norms["gradient"][batch.first_column + i] * clip for i in batch.chosen]
        tensors.w_norms = norms(tensors.params) if tensors.joined is None else tensors.joined.norms()
        batch.put(self._norms["weight"], tensors.w_norms)

    @torch.inference_mode(False)
    def _give_scratch(self, bucket: Bucket, made: list[SegmentBatch]) -> None:
        """Give batches memory for copies of gradients and for updates. All batches of a dtype share it.

        The memory is kept between steps, because new pages would take several times as long as the work on them.
        """
        dtype, size = compute_dtype(bucket.dtype), max((batch.elements for batch in made), default=0)
        held = self._scratch.get(dtype, ())
        if not held or held[0].numel() < size:
            held = self._scratch[dtype] = tuple(torch.empty(size, dtype=dtype, device=self.device) for _ in range(2))
        for batch in made:
            batch.scratch = [Joined.like(batch.params, buffer, bucket.tile) for buffer in held]

    @staticmethod
    def _synced_master(bucket: Bucket, i: int) -> Tensor:
        """The segment's master. Where the weight is not its rounding, other code changed the weight: it is taken."""
        p, master = bucket.segments[i].tensor, bucket.segments[i].state.get(MASTER)
        if master is None:
            return p.float()
        return torch.where(master.to(p.dtype) == p, master, p, out=master)
