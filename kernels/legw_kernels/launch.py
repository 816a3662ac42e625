"""Launching the kernels: rows of their tables, how many programs, and what is given to each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tables, tuning
from .arguments import Amp, Counters, Norms, Projection, States, Tables
from .formulas import ScheduleConstants
from .norm_pass import norm_kernel, reduce_kernel
from .projection_pass import factors_kernel, sums_kernel
from .rules.registry import RULES
from .update_pass import update_kernel


@functools.cache
def most_programs(device: torch.device, param_dtype: torch.dtype, states: int) -> int:
    """As many as are resident at once, so that equal shares end together; a handful in the interpreter."""
    if device.type != "cuda":
        return 4
    resident = 65536 // (32 * tuning.warps(param_dtype) * tuning.registers(param_dtype, states))
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def segment_row(p: Tensor, first_tile: int, first_chunk: int, chunk_tiles: int, group: int) -> list[int]:
    """A parameter's row in the segment table, in the order of its columns."""
    return [p.numel(), first_tile, first_chunk, chunk_tiles, group, int(p.ndim <= 1)]


def group_row(
    recipe: ScheduleConstants,
    lr: Tensor | None,
    milestones: tuple[int, int],
    states: int,
    clip: tuple[float, bool],
    exempt_vectors: bool,
    hyper: Sequence[float],
) -> list[float]:
    """A param group's row in the group table, in the order of its columns.

    lr: the device tensor to read the LR from, for the recipe kinds TENSOR32 and TENSOR64. milestones: begin and length
    in the milestone table. states: a bit for each state that an update uses. clip: the global norm to clip at, and
    whether by LAMB's formula. hyper: the rule's hyper-parameters.
    """
    address = 0 if lr is None else lr.data_ptr()
    if int(float(address)) != address:
        raise ValueError(f"lr is a tensor at address {address}, which float64 does not hold: clone it")
    row = [*recipe, float(address), *milestones, states, *clip, exempt_vectors, *hyper]
    return row + [0.0] * (tables.GROUP_WIDTH - len(row))


@dataclass
class Rows:
    """The rows of a bucket's tensors; see `rows`."""

    table: Tensor
    pieces: Tensor
    sums: Tensor
    factors: Tensor

    @classmethod
    def of(cls, params: Sequence[Tensor], tile: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """dtype: of the factors, the compute dtype. A tensor of one dimension or none is one row, not projected."""
        height, width = tuning.piece_shape(tile)
        counts = [len(p) if p.ndim > 1 and p.numel() else 1 for p in params]
        factors = torch.zeros(sum(counts) + tile, dtype=dtype, device=device)
        table, pieces, n_sums, address = list[list[int]](), list[int](), 0, factors.data_ptr()
        for i, (p, count) in enumerate(zip(params, counts, strict=True)):
            length, span = p.numel() // count, tuning.TILES_OF_A_SPAN * width
            while span * tuning.MOST_SPANS < length:
                span *= 2
            spans = -(-length // span) if p.ndim > 1 else 0
            table.append([count, length, address, len(pieces), n_sums, span, spans])
            pieces += [i] * (spans * -(-count // height))
            n_sums += spans * count
            address += count * factors.element_size()
        return cls(
            torch.tensor(table, dtype=torch.int64, device="cpu").to(device),
            torch.tensor(pieces, dtype=torch.int32, device="cpu").to(device),
            torch.zeros(4, max(1, n_sums), dtype=torch.float64, device=device),
            factors,
        )


@dataclass(frozen=True)
class Work:
    """What the launches on one (parameter dtype, gradient dtype) share, in every step.

    nonfinite: float32[1], where the update writes whether the global norm was not finite. norms: empty where none are
    needed. rows: where the rule projects.
    """

    rule: str
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    tile: int
    segments: Tensor
    chunks: Tensor
    counters: Counters
    states: States
    norms: Norms
    nonfinite: Tensor
    rows: Rows | None = None

    @functools.cached_property
    def dtypes(self) -> dict[str, Any]:
        return dict(
            PARAM=tuning.TRITON_TYPES[self.param_dtype],
            GRAD=tuning.TRITON_TYPES[self.grad_dtype],
            COMPUTE=tuning.compute_type(self.param_dtype),
            BLOCK=self.tile,
        )

    @functools.cached_property
    def projection(self) -> Projection:
        return Projection() if self.rows is None else Projection(self.rows.table, self.rows.pieces, self.rows.sums)

    def tables(self, step: Step) -> Tables:
        return Tables(self.segments, step.addresses, self.chunks, step.groups, step.milestones)

    def amp(self, step: Step) -> Amp:
        return Amp(step.grad_scale, step.found_inf, self.nonfinite)


class Step(NamedTuple):
    """What changes from step to step: tables, which a capture has of its own, and what decides over the step."""

    addresses: Tensor
    groups: Tensor
    milestones: Tensor
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    first_total: int = 0  # where this work's part of `totals` begins
    n_totals: int = 0


def programs(chunks: Tensor, param_dtype: torch.dtype, states: int = 0) -> int:
    """How many programs a launch over these chunks gets; one that measures writes as many entries of `totals`."""
    return max(1, min(chunks.numel(), most_programs(chunks.device, param_dtype, states)))


def _runs(n_chunks: int, programs: int) -> int:
    """Into how many equal parts to divide the chunks: a few for each program, none of too many chunks."""
    return programs * max(1, -(-n_chunks // (programs * tuning.CHUNKS_OF_A_RUN)))


def launch(kernel: Any, device: torch.device, grid: int, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device's current stream. Everything launched goes through here."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(grid,)](*args, **constants)


def take_norms(work: Work, step: Step, *, updates: bool, gradients: bool, clips: bool, skips: bool) -> None:
    """Norms of every chunk.

    updates: also those of weights and updates, for trust ratios. gradients: those of the gradients, if they are not
    known yet. clips, skips: whether the global norm, known by now, clips the gradients or may skip the step.
    """
    rule, n_chunks = RULES[work.rule], work.chunks.numel()
    grid = programs(work.chunks, work.param_dtype)
    launch(
        norm_kernel, work.chunks.device, grid,
        work.tables(step), work.counters, work.states, work.norms, work.amp(step),
        n_chunks, _runs(n_chunks, grid), work.counters.tensor_steps.numel(), step.n_totals, step.first_total,
        PREPARE=rule.prepare, ADVANCE=rule.advance, DIVISOR=rule.divisor if updates else None, STORE=rule.two_stage,
        GRADIENTS=gradients, GLOBAL=clips or skips, SKIP=skips, **work.dtypes, **tuning.options(work.param_dtype),
    )  # fmt: skip


def project(work: Work, step: Step, *, clips: bool, skips: bool) -> None:
    """Each row's factor. clips, skips: as in `take_norms`."""
    rule, rows = RULES[work.rule], work.rows
    assert rows is not None
    height, width = tuning.piece_shape(work.tile)
    n_sums, n_segments, device = rows.sums.shape[1], work.counters.tensor_steps.numel(), work.chunks.device
    if n_pieces := rows.pieces.numel():
        launch(
            sums_kernel, device, programs(rows.pieces, work.param_dtype),
            work.tables(step), work.counters, work.states, work.norms, work.projection, work.amp(step),
            n_pieces, n_sums, n_segments, step.n_totals,
            PREPARE=rule.prepare, ADVANCE=rule.advance, DIRECTION=rule.direction, GLOBAL=clips or skips, SKIP=skips,
            ROWS=height, COLUMNS=width, **work.dtypes, **tuning.options(work.param_dtype),
        )  # fmt: skip
    launch(
        factors_kernel, device, max(1, min(n_segments, most_programs(device, work.param_dtype, 0))),
        work.tables(step), work.projection, n_sums, n_segments,
        COMPUTE=tuning.compute_type(work.param_dtype), **tuning.options(work.param_dtype),
    )  # fmt: skip


def update(work: Work, step: Step, *, clips: bool, skips: bool, clipped: bool, last: bool, advances: bool) -> None:
    """The update itself.

    clipped: whether the norms for trust ratios were taken of clipped gradients. last: whether it is the step's last
    launch on the device. advances: whether that launch advances the step counts.
    """
    rule, n_chunks = RULES[work.rule], work.chunks.numel()
    states = sum(state is not None for state in work.states[:3]) + rule.projects
    grid = programs(work.chunks, work.param_dtype, states)
    launch(
        update_kernel, work.chunks.device, grid,
        work.tables(step), work.counters, work.states, work.norms, work.projection, work.amp(step),
        n_chunks, _runs(n_chunks, grid), work.counters.tensor_steps.numel(), step.n_totals,
        PREPARE=rule.prepare, ADVANCE=rule.advance, DIRECTION=rule.direction, DIVISOR=rule.divisor,
        MOMENTS_DONE=rule.two_stage, CLIPPED=clipped, GLOBAL=clips or skips, SKIP=skips, LAST=last,
        COUNTS_STEP=advances, **work.dtypes, **tuning.options(work.param_dtype, states),
    )  # fmt: skip


def tensor_norms(
    segments: Tensor, partials: Tensor, turn: Tensor | None, kind: int, param_dtype: torch.dtype, tile: int
) -> Tensor:
    """float64, one per tensor: the norms of one kind, a row of `partials`."""
    n = segments.numel() // tables.SEGMENT_WIDTH
    norms = torch.empty(n, dtype=torch.float64, device=segments.device)
    grid = max(1, min(n, most_programs(segments.device, torch.float32, 0)))
    launch(
        reduce_kernel, segments.device, grid, Tables(segments), Norms(partials, turn), norms, partials.shape[1], n,
        KIND=kind, COMPUTE=tuning.compute_type(param_dtype), BLOCK=tile, **tuning.options(torch.float32),
    )  # fmt: skip
    return norms
