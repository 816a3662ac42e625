"""The kernel: load a tile, call a rule, store what it returns. One launch updates every tensor of every param group.

Tables (see `launch` for their builders' side):
    segments  int64, a row per tensor: where it lives, where its gradient lives, how long it is, which group
    tiles     int32, one entry per tile: the tensor it belongs to
    groups    float64, a row per param group: where the LR comes from, then the hyper-parameters
    counts    int64[1], updates applied on this device: the t of the schedule
    steps     int64, one per tensor: its own counted updates
    ticket    int32[1], zero between launches
"""

import triton
import triton.language as tl

from . import scalars
from .rules import Hyper

# Columns of a segment's row.
ADDRESS = tl.constexpr(0)  # of the parameter's first element
GRADIENT = tl.constexpr(1)  # of the gradient's first element; 0: no gradient this time
NUMEL = tl.constexpr(2)
FIRST_TILE = tl.constexpr(3)
GROUP = tl.constexpr(4)
ALIGNED = tl.constexpr(5)  # 1 if both addresses are multiples of 16
SEGMENT_WIDTH = tl.constexpr(6)

# Columns of a group's row: the recipe's fields in their order, then these.
LR_ADDRESS = tl.constexpr(10)  # of a device tensor that holds the LR
MILESTONES = tl.constexpr(11)  # this group's slice of the milestone table: begin,
MILESTONE_COUNT = tl.constexpr(12)  # and length
COUNTED = tl.constexpr(13)  # 1 if an update advances the tensor's own count
HYPER = tl.constexpr(14)  # weight_decay, momentum, dampening, nesterov, sign
GROUP_WIDTH = tl.constexpr(19)

_Recipe = tl.constexpr(scalars.Recipe)
_Hyper = tl.constexpr(Hyper)
_TENSOR32 = tl.constexpr(scalars.TENSOR32)
_TENSOR64 = tl.constexpr(scalars.TENSOR64)
_CONSTANT = tl.constexpr(scalars.CONSTANT)
_MULTISTEP = tl.constexpr(scalars.MULTISTEP)
_sin_half_pi = scalars.on_device(scalars.sin_half_pi)
_decay_factor = scalars.on_device(scalars.decay_factor, sin_half_pi=_sin_half_pi)
_learning_rate = scalars.on_device(scalars.learning_rate, decay_factor=_decay_factor)


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
            _Recipe(
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
def load_tile(address, start, n, wide, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from `address` + start: in 16-byte accesses if wide, else one by one and none past n.

    The pointer is made anew in each branch: the alignment hint sticks to the value it is given to.
    """
    i = tl.arange(0, BLOCK)
    if wide:
        pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + tl.multiple_of(start, BLOCK)
        tile = tl.load(pointer + i)
    else:
        pointer = address.to(tl.pointer_type(dtype)) + start
        tile = tl.load(pointer + i, mask=i < n, other=0.0)
    return tile


@triton.jit
def store_tile(address, start, n, wide, tile, dtype: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if wide:
        pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + tl.multiple_of(start, BLOCK)
        tl.store(pointer + i, tile)
    else:
        pointer = address.to(tl.pointer_type(dtype)) + start
        tl.store(pointer + i, tile, mask=i < n)


@triton.jit
def update_tile(
    tile, segment, row, gradient, t, groups, milestones, steps, state, master,
    RULE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of one tensor."""
    address = tl.load(row + ADDRESS)
    start = (tile - tl.load(row + FIRST_TILE)) * BLOCK
    n = tl.load(row + NUMEL) - start
    wide = (n >= BLOCK) & (tl.load(row + ALIGNED) != 0)
    group = groups + tl.load(row + GROUP) * GROUP_WIDTH
    # Scalars first: with the tile already loaded, the float64 schedule would need half as many registers again.
    h = _Hyper(
        group_lr(group, t, milestones).to(COMPUTE),
        tl.load(group + HYPER).to(COMPUTE),
        tl.load(group + HYPER + 1).to(COMPUTE),
        (1.0 - tl.load(group + HYPER + 2)).to(COMPUTE),
        tl.load(group + HYPER + 3).to(COMPUTE),
        tl.load(group + HYPER + 4).to(COMPUTE),
    )
    p = load_tile(address, start, n, wide, PARAM, BLOCK)
    g = load_tile(gradient, start, n, wide, GRAD, BLOCK).to(COMPUTE)
    # State and masters are ours, tile-aligned and padded, so they need no mask: past n, p and g load as 0, and every
    # rule maps zeros to zeros, so the padding stays zero.
    at = tile * BLOCK + tl.arange(0, BLOCK)
    m = g
    if state is not None:
        if h.momentum != 0:
            m = tl.load(state + at)
    if master is not None:
        w = tl.load(master + at)
        # A weight that is not its rounded master was changed from outside: the weight counts.
        w = tl.where(w.to(PARAM) == p, w, p.to(COMPUTE))
    else:
        w = p.to(COMPUTE)
    w, m = RULE(w, g, m, h, tl.load(steps + segment) == 0)

    store_tile(address, start, n, wide, w.to(PARAM), PARAM, BLOCK)
    if state is not None:
        if h.momentum != 0:
            tl.store(state + at, m)
    if master is not None:
        tl.store(master + at, w)


@triton.jit
def count_steps(segments, groups, steps, n_segments):
    """Advance the own count of every tensor that was updated."""
    for base in range(0, n_segments, 128):
        k = base + tl.arange(0, 128)
        row = segments + k.to(tl.int64) * SEGMENT_WIDTH
        updated = tl.load(row + GRADIENT, mask=k < n_segments, other=0) != 0
        group = groups + tl.load(row + GROUP, mask=updated, other=0) * GROUP_WIDTH
        counted = updated & (tl.load(group + COUNTED, mask=updated, other=0.0) != 0)
        tl.store(steps + k, tl.load(steps + k, mask=counted, other=0) + 1, mask=counted)


@triton.jit(do_not_specialize=["n_tiles", "n_segments"])
def step_kernel(
    segments, tiles, groups, milestones, counts, steps, ticket, state, master, n_tiles, n_segments,
    RULE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One optimizer step over all tiles; the last program to finish advances the counts."""
    t = tl.load(counts)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tile = tl.cast(tile, tl.int64)
        segment = tl.load(tiles + tile).to(tl.int64)
        row = segments + segment * SEGMENT_WIDTH
        gradient = tl.load(row + GRADIENT)
        if gradient != 0:
            update_tile(
                tile, segment, row, gradient, t, groups, milestones, steps, state, master,
                RULE, PARAM, GRAD, COMPUTE, BLOCK,
            )  # fmt: skip
    # Every warp has read the counts before this program takes its ticket; without the barrier one warp could take it
    # while another has not, and read a count that is already the next step's.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        count_steps(segments, groups, steps, n_segments)
        if ADVANCE:
            tl.store(counts, t + 1)
