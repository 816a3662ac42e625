"""Launching the kernels: which dtypes, how many programs, with which options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import skeleton
from .rules import RULES
from .scalars import Recipe

HYPER, SEGMENT_WIDTH = skeleton.HYPER.value, skeleton.SEGMENT_WIDTH.value
WARPS = 4
REDUCE_BLOCK = 1024  # norms that a program of the reduction adds at a time
DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _registers(param_dtype: torch.dtype, large: bool) -> int:
    """The register limit: what the largest variant takes. So 6 programs fit on an SM, 5 large ones; in float64 3 and 2.

    large: kernels that take norms, and rules of several states.
    """
    if param_dtype == torch.float64:
        return 192 if large else 160
    return 96 if large else 80


def options(
    param_dtype: torch.dtype, *, large: bool = False, amd: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """Compiler options.

    Fusing a * b + c into one rounding would save nothing in a kernel that waits for memory, and would make its bits
    depend on the target; Triton's default for it differs between versions. Told of a register limit, ptxas does not
    spill in order to stay below some smaller number.
    """
    limit = {} if amd else {"maxnreg": _registers(param_dtype, large)}
    return {"num_warps": WARPS, "enable_fp_fusion": False, **limit}


@functools.cache
def _most_programs(device: torch.device, param_dtype: torch.dtype, large: bool) -> int:
    """As many as are resident at once, so that equal shares end together; a handful in the interpreter."""
    if device.type != "cuda":
        return 4
    resident = 65536 // (32 * WARPS * _registers(param_dtype, large))
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def segment_row(p: Tensor, gradient: int, first_tile: int, group: int, exempt: bool) -> list[int]:
    """A parameter's row in the segment table, in the order of the skeleton's columns.

    gradient: its address; 0: there is none this time; -1: another launch sees to it.
    """
    address = p.data_ptr()
    aligned = address % 16 == 0 and gradient % 16 == 0
    return [address, gradient, p.numel(), first_tile, group, int(aligned) + 2 * int(exempt)]


def group_row(
    recipe: Recipe,
    lr: Tensor | None,
    milestones: tuple[int, int],
    states: int,
    clip: tuple[float, bool],
    hyper: Sequence[float],
) -> list[float]:
    """A param group's row in the group table, in the order of the skeleton's columns.

    lr: the device tensor to read the LR from, for the recipe kinds TENSOR32 and TENSOR64. milestones: begin and length
    in the milestone table. states: a bit for each state that an update uses. clip: the global norm to clip at, and
    whether by LAMB's formula. hyper: the rule's hyper-parameters.
    """
    address = 0 if lr is None else lr.data_ptr()
    if int(float(address)) != address:
        raise ValueError(f"lr is a tensor at address {address}, which float64 does not hold: clone it")
    row = [*recipe, float(address), *milestones, states, *clip, *hyper]
    return row + [0.0] * (skeleton.GROUP_WIDTH.value - len(row))


@dataclass
class Work:
    """What the launches of one step on one (parameter dtype, gradient dtype) share; the tables are the skeleton's.

    own: where this bucket's tensors begin in `norms`. partials, norms: needed where norms are.
    """

    rule: str
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    tile: int
    segments: Tensor
    tiles: Tensor
    groups: Tensor
    milestones: Tensor
    counts: Tensor
    steps: Tensor
    shown: Tensor | None
    ticket: Tensor
    states: tuple[Tensor | None, Tensor | None, Tensor | None]
    master: Tensor | None
    partials: Tensor | None
    norms: Tensor | None
    own: int
    grad_scale: Tensor | None
    found_inf: Tensor | None
    nonfinite: Tensor

    @property
    def dtypes(self) -> dict[str, Any]:
        compute = tl.float64 if self.param_dtype == torch.float64 else tl.float32
        return dict(PARAM=DTYPES[self.param_dtype], GRAD=DTYPES[self.grad_dtype], COMPUTE=compute, BLOCK=self.tile)

    @property
    def n_norms(self) -> int:
        return 0 if self.norms is None else self.norms.shape[1]


def launch(kernel: Any, work: Work, jobs: int, *args: Any, **constants: Any) -> None:
    """Run a kernel on the tensors' device and its current stream. Everything launched goes through here."""
    device, large = work.segments.device, kernel is not skeleton.update_kernel or work.states[1] is not None
    programs = max(1, min(jobs, _most_programs(device, work.param_dtype, large)))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(programs,)](*args, **constants, **options(work.param_dtype, large=large))


def measure(work: Work, *, updates: bool, gradients: bool, clips: bool, skips: bool) -> None:
    """Norms of every tile, then of every tensor.

    updates: also those of weights and updates, for trust ratios. gradients: those of the gradients, if they are not
    known yet. clips, skips: whether the global norm, known by now, clips the gradients or may skip the step.
    """
    rule, n_tiles = RULES[work.rule], work.tiles.numel()
    launch(
        skeleton.measure_kernel, work, n_tiles,
        work.segments, work.tiles, work.groups, work.milestones, work.counts, work.steps, work.shown,
        *work.states, work.master, work.partials, work.norms, work.grad_scale, work.found_inf,
        n_tiles, work.own, work.n_norms,
        PREPARE=rule.prepare, ADVANCE=rule.advance, MEASURE=rule.measure if updates else None, STORE=rule.two_stage,
        GRADIENTS=gradients, GLOBAL=clips or skips, SKIP=skips, **work.dtypes,
    )  # fmt: skip
    kinds = 3 if updates else 1
    launch(
        skeleton.reduce_kernel, work, kinds * work.steps.numel(),
        work.segments, work.partials, work.norms, work.grad_scale, n_tiles, work.steps.numel(), work.own, work.n_norms,
        GRADIENTS=gradients, UPDATES=updates, TILE=work.tile, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip


def update(work: Work, *, clips: bool, skips: bool, last: bool) -> None:
    """The update itself. last: whether it is the step's last launch on the device, which advances `counts`."""
    rule, n_tiles = RULES[work.rule], work.tiles.numel()
    launch(
        skeleton.update_kernel, work, n_tiles,
        work.segments, work.tiles, work.groups, work.milestones, work.counts, work.steps, work.shown, work.ticket,
        *work.states, work.master, work.norms, work.grad_scale, work.found_inf, work.nonfinite,
        n_tiles, work.steps.numel(), work.own, work.n_norms,
        PREPARE=rule.prepare, ADVANCE=rule.advance, DIRECTION=rule.direction, ADVANCED=rule.two_stage,
        TRUST=rule.has_trust_ratio, GLOBAL=clips or skips, SKIP=skips, LAST=last, **work.dtypes,
    )  # fmt: skip
