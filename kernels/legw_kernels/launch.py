"""Launching the kernels: which dtypes, how many programs, with which options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import rules, skeleton
from .scalars import Recipe

WARPS = 4
RULES: dict[str, Any] = {"sgd": rules.sgd}
DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _registers(param_dtype: torch.dtype) -> int:
    """The register limit: what the largest variant takes on sm_80."""
    return 128 if param_dtype == torch.float64 else 80


def options(param_dtype: torch.dtype, *, amd: bool = torch.version.hip is not None) -> dict[str, Any]:
    """Compiler options.

    Fusing a * b + c into one rounding would save nothing in a kernel that waits for memory, and would make its bits
    depend on the target; Triton's default for it differs between versions. Told of a register limit, ptxas does not
    spill in order to stay below some smaller number.
    """
    limit = {} if amd else {"maxnreg": _registers(param_dtype)}
    return {"num_warps": WARPS, "enable_fp_fusion": False, **limit}


@functools.cache
def _most_programs(device: torch.device, param_dtype: torch.dtype) -> int:
    """As many as are resident at once, so that equal shares end together; a handful in the interpreter."""
    if device.type != "cuda":
        return 4
    resident = 65536 // (32 * WARPS * _registers(param_dtype))
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def segment_row(p: Tensor, gradient: Tensor | None, first_tile: int, group: int) -> list[int]:
    """A parameter's row in the segment table, in the order of the skeleton's columns."""
    address, source = p.data_ptr(), 0 if gradient is None else gradient.data_ptr()
    return [address, source, p.numel(), first_tile, group, int(address % 16 == 0 and source % 16 == 0)]


def group_row(
    recipe: Recipe, lr: Tensor | None, milestones: tuple[int, int], counted: bool, hyper: Sequence[float]
) -> list[float]:
    """A param group's row in the group table, in the order of the skeleton's columns.

    lr: the device tensor to read the LR from, for the recipe kinds TENSOR32 and TENSOR64. milestones: begin and length
    in the milestone table. counted: whether an update advances the tensor's own count. hyper: weight decay, momentum,
    dampening, nesterov, sign.
    """
    address = 0 if lr is None else lr.data_ptr()
    if int(float(address)) != address:
        raise ValueError(f"lr is a tensor at address {address}, which float64 does not hold: clone it")
    return [*recipe, float(address), *milestones, counted, *hyper]


def step(
    rule: str,
    *,
    segments: Tensor,
    tiles: Tensor,
    groups: Tensor,
    milestones: Tensor,
    counts: Tensor,
    steps: Tensor,
    ticket: Tensor,
    state: Tensor | None,
    master: Tensor | None,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    advance: bool,
    tile: int,
) -> None:
    """Launch one optimizer step on the tensors' device and its current stream; the tables are the skeleton's.

    advance: whether this is the step's last launch on the device, the one that advances `counts`.
    """
    device, n_tiles = segments.device, tiles.numel()
    kernel = skeleton.step_kernel[(max(1, min(n_tiles, _most_programs(device, param_dtype))),)]
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel(
            segments, tiles, groups, milestones, counts, steps, ticket, state, master, n_tiles, steps.numel(),
            RULE=RULES[rule], PARAM=DTYPES[param_dtype], GRAD=DTYPES[grad_dtype],
            COMPUTE=tl.float64 if param_dtype == torch.float64 else tl.float32,
            ADVANCE=advance, BLOCK=tile, **options(param_dtype),
        )  # fmt: skip
