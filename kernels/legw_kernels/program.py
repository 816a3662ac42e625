"""What a program reads before its tiles: the decision over the step, the LR, the scalars of an update."""

import triton
import triton.language as tl

from . import formulas
from .constants import (
    CHUNK_TILES,
    CLIP,
    CLIP_DIVIDES,
    EXEMPT_VECTORS,
    FIRST_CHUNK,
    GROUP,
    GROUP_WIDTH,
    HYPER,
    IS_VECTOR,
    LR_ADDRESS,
    MILESTONE_COUNT,
    MILESTONES,
    NORMS_BLOCK,
    NUMEL,
    STATES,
    UPDATE_NORM,
    WEIGHT_NORM,
    always,
)
from .norms import norm_of

_ScheduleConstants = tl.constexpr(formulas.ScheduleConstants)
_TENSOR32 = tl.constexpr(formulas.TENSOR32)
_TENSOR64 = tl.constexpr(formulas.TENSOR64)
_CONSTANT = tl.constexpr(formulas.CONSTANT)
_MULTISTEP = tl.constexpr(formulas.MULTISTEP)
_sin_half_pi = formulas.on_device(formulas.sin_half_pi)
_decay_factor = formulas.on_device(formulas.decay_factor, sin_half_pi=_sin_half_pi)
_learning_rate = formulas.on_device(formulas.learning_rate, decay_factor=_decay_factor)
_clip_factor = formulas.on_device(formulas.clip_factor)


@triton.jit
def group_lr(row, t, milestones):
    """float64 LR of a group at its t-th update."""
    kind = tl.load(row)
    lr = tl.load(row + 1)
    if kind >= _CONSTANT:
        passed = 0 * t
        if kind == _MULTISTEP:
            begin = milestones + tl.load(row + MILESTONES).to(tl.int64)
            for i in range(tl.load(row + MILESTONE_COUNT).to(tl.int32)):
                passed += (tl.load(begin + i) <= t).to(tl.int64)
        lr = _learning_rate(
            t.to(tl.float64),
            passed.to(tl.float64),
            _ScheduleConstants(
                kind, lr, tl.load(row + 2), tl.load(row + 3), tl.load(row + 4),
                tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9),
            ),
        )  # fmt: skip
    if kind == _TENSOR32:
        lr = tl.load(_lr_pointer(row, tl.float32)).to(tl.float64)
    if kind == _TENSOR64:
        lr = tl.load(_lr_pointer(row, tl.float64))
    return lr


@triton.jit
def _lr_pointer(row, dtype: tl.constexpr):
    return tl.load(row + LR_ADDRESS).to(tl.int64).to(tl.pointer_type(dtype))


@triton.jit
def true_count(count, there):
    """Counted updates; where the user wrote another number to the tensor's "step", that."""
    return tl.where(count.to(tl.float32) == there, count, there.to(tl.int64))


@triton.jit
def tensor_count(counters, segment):
    count = tl.load(counters.tensor_steps + segment)
    if counters.torch_steps is not None:
        count = true_count(count, tl.load(counters.torch_steps + segment))
    return count


@triton.jit
def _narrow(x, COMPUTE: tl.constexpr):
    """A float64 norm in the compute dtype, never infinite for being large."""
    if tl.float32 == COMPUTE:
        x = tl.where(x > 1e38, 1e38, x)
    return x.to(COMPUTE)


@triton.jit
def begin(norms, amp, n_totals, GLOBAL: tl.constexpr, SKIP: tl.constexpr, COMPUTE: tl.constexpr):
    """(whether to apply this step, whether the global norm is finite, 1 / AMP's scale, that norm): for all programs."""
    finite = always(n_totals)
    norm = tl.full([], 0.0, tl.float64)
    inverse = tl.full([], 1.0, tl.float32)
    if amp.grad_scale is not None:
        inverse = 1.0 / tl.load(amp.grad_scale)
    if GLOBAL:
        norm = norm_of(norms.totals, n_totals, NORMS_BLOCK, True)
        finite = norm < float("inf")
    apply = always(n_totals)
    if SKIP:
        apply = finite
    if amp.grad_scale is not None:
        apply = apply & (tl.abs(inverse) < float("inf"))  # a scale of 0 has lost the gradients
    if amp.found_inf is not None:
        apply = apply & (tl.load(amp.found_inf) == 0)
    return apply, finite, inverse.to(COMPUTE), _narrow(norm, COMPUTE)


@triton.jit
def weight_row(turn, next: tl.constexpr):
    """The row of `partials` with the norms of the weights; next: for those after this update."""
    kind = WEIGHT_NORM
    if turn is not None:
        kind = WEIGHT_NORM + (tl.load(turn) ^ next)
    return kind


@triton.jit
def chunk_count(row, TILE: tl.constexpr):
    """How many chunks a tensor has."""
    size = tl.load(row + CHUNK_TILES) * TILE
    return (tl.load(row + NUMEL) + size - 1) // size


@triton.jit
def tensor_norm(partials, n_chunks, row, kind, COMPUTE: tl.constexpr, TILE: tl.constexpr):
    """The norm of one tensor, from those of its chunks."""
    first = partials + kind * n_chunks + tl.load(row + FIRST_CHUNK)
    return norm_of(first, chunk_count(row, TILE), NORMS_BLOCK, tl.float64 == COMPUTE)


@triton.jit
def prepare(
    segment, row, inverse, norm, tables, counters, norms, n_chunks,
    PREPARE: tl.constexpr, GLOBAL: tl.constexpr, UPDATES: tl.constexpr, DIVISOR: tl.constexpr, CLIPPED: tl.constexpr,
    COMPUTE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(the scalars of one tensor's update, the states it uses). UPDATES: else it measures. CLIPPED: what was."""
    group = tables.groups + tl.load(row + GROUP) * GROUP_WIDTH
    lr = tl.full([], 0.0, tl.float64)
    if UPDATES:  # what is measured does not depend on it
        lr = group_lr(group, tl.load(counters.step_counts), tables.milestones)
    clip = inverse * 0 + 1
    if GLOBAL:
        clip = _clip_factor(norm, tl.load(group + CLIP).to(COMPUTE), tl.load(group + CLIP_DIVIDES).to(COMPUTE))
    w_norm = clip * 0
    x_norm = clip * 0
    if UPDATES:
        if DIVISOR is not None:
            kind = weight_row(norms.turn, 0)
            w_norm = _narrow(tensor_norm(norms.partials, n_chunks, row, kind, COMPUTE, TILE), COMPUTE)
            x_norm = _narrow(tensor_norm(norms.partials, n_chunks, row, UPDATE_NORM, COMPUTE, TILE), COMPUTE)
            if not CLIPPED:
                x_norm *= clip
    exempt = tl.load(row + IS_VECTOR).to(tl.float64) * tl.load(group + EXEMPT_VECTORS)
    h = PREPARE(
        group + HYPER, lr, tensor_count(counters, segment).to(tl.float64), inverse * clip, exempt,
        w_norm, x_norm, not UPDATES, COMPUTE,
    )  # fmt: skip
    return h, tl.load(group + STATES).to(tl.int32)
