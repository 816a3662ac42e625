"""The kernels: load a tile, call a rule, store what it returns. A launch serves every tensor of every param group.

    update_kernel    one optimizer step over all tiles; it is the whole of SGD, Adam and AdamW without clipping
    measure_kernel   norms of every tile: of gradients for clipping and AMP, of weights and updates for trust ratios;
                     two-stage rules advance their states in it
    reduce_kernel    norms of every tensor, from those of its tiles

Order comes from the order of launches alone, but for the last program of an update, which advances the counts.

Tables (see `launch` for their builders' side):
    segments  int64, a row per tensor: where it lives, where its gradient lives, how long it is, which group
    tiles     int32, one entry per tile: the tensor it belongs to
    groups    float64, a row per param group: where the LR comes from, then clipping, then the hyper-parameters
    counts    int64[2]: updates applied on this device, the t of the schedule; steps skipped
    steps     int64, one per tensor: its own counted updates. shown: float32, the same for optimizer.state["step"]
    ticket    int32[1], zero between launches
    partials  float64[3, tiles]: norms of each tile of the gradient, the weight, the measured update
    norms     float64[4, all tensors of the device]: the same of each tensor, without AMP's scale, and its trust ratio
"""

import triton
import triton.language as tl

from . import scalars
from .norms import norm_of, tile_norm

# Columns of a segment's row.
ADDRESS = tl.constexpr(0)  # of the parameter's first element
GRADIENT = tl.constexpr(1)  # of the gradient's first element; 0: no gradient this time; -1: in another launch
NUMEL = tl.constexpr(2)
FIRST_TILE = tl.constexpr(3)
GROUP = tl.constexpr(4)
FLAGS = tl.constexpr(5)  # 1: both addresses are multiples of 16; 2: exempt, neither adapted nor decayed
SEGMENT_WIDTH = tl.constexpr(6)

# Columns of a group's row: the recipe's fields in their order, then these.
LR_ADDRESS = tl.constexpr(10)  # of a device tensor that holds the LR
MILESTONES = tl.constexpr(11)  # this group's slice of the milestone table: begin,
MILESTONE_COUNT = tl.constexpr(12)  # and length
STATES = tl.constexpr(13)  # which states an update uses, a bit each; if any, it advances the tensor's own count
CLIP = tl.constexpr(14)  # the global norm to clip at; infinite: none
CLIP_DIVIDES = tl.constexpr(15)  # 1 for LAMB's clipping formula
HYPER = tl.constexpr(16)  # the fields of the rule's hyper-parameters in their order
GROUP_WIDTH = tl.constexpr(32)

# Rows of `partials` and `norms`.
GRADIENT_NORM = tl.constexpr(0)
WEIGHT_NORM = tl.constexpr(1)
UPDATE_NORM = tl.constexpr(2)
RATIO = tl.constexpr(3)

_Recipe = tl.constexpr(scalars.Recipe)
_TENSOR32 = tl.constexpr(scalars.TENSOR32)
_TENSOR64 = tl.constexpr(scalars.TENSOR64)
_CONSTANT = tl.constexpr(scalars.CONSTANT)
_MULTISTEP = tl.constexpr(scalars.MULTISTEP)
_sin_half_pi = scalars.on_device(scalars.sin_half_pi)
_decay_factor = scalars.on_device(scalars.decay_factor, sin_half_pi=_sin_half_pi)
_learning_rate = scalars.on_device(scalars.learning_rate, decay_factor=_decay_factor)
_clip_factor = scalars.on_device(scalars.clip_factor)


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


# State and masters are ours, tile-aligned and padded, so they need no mask: past a tensor's end, p and g load as 0, and
# every rule maps zeros to zeros, so the padding stays zero.


@triton.jit
def load_state(state, at, used, dummy):
    tile = dummy
    if state is not None:
        if used:
            tile = tl.load(state + at)
    return tile


@triton.jit
def store_state(state, at, used, tile):
    if state is not None:
        if used:
            tl.store(state + at, tile)


@triton.jit
def load_weight(p, master, at, COMPUTE: tl.constexpr):
    """A tile of weights in the compute dtype: the master, or the weight where someone else changed it."""
    w = p.to(COMPUTE)
    if master is not None:
        exact = tl.load(master + at)
        w = tl.where(exact.to(p.dtype) == p, exact, w)
    return w


@triton.jit
def true_count(count, there):
    """Counted updates; where the user wrote another number to the tensor's "step", that."""
    return tl.where(count.to(tl.float32) == there, count, there.to(tl.int64))


@triton.jit
def tensor_count(steps, shown, segment):
    count = tl.load(steps + segment)
    if shown is not None:
        count = true_count(count, tl.load(shown + segment))
    return count


@triton.jit
def begin(norms, n_norms, grad_scale, found_inf, GLOBAL: tl.constexpr, SKIP: tl.constexpr):
    """(whether to apply this step, 1 / AMP's scale, the global norm of the gradients): the same for all programs."""
    apply = n_norms >= 0
    norm = tl.full([], 0.0, tl.float64)
    inverse = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        inverse = (1.0 / tl.load(grad_scale)).to(tl.float64)
    if GLOBAL:
        norm = norm_of(norms, n_norms, 1024)
        if SKIP:
            apply = norm < float("inf")
    if found_inf is not None:
        apply = apply & (tl.load(found_inf) == 0)
    return apply, inverse, norm


@triton.jit
def _narrow(x, COMPUTE: tl.constexpr):
    """A float64 norm in the compute dtype, never infinite for being large."""
    if tl.float32 == COMPUTE:
        x = tl.where(x > 1e38, 1e38, x)
    return x.to(COMPUTE)


@triton.jit
def prepare(
    segment, row, flags, inverse, norm, t, groups, milestones, steps, shown, norms, own, n_norms,
    PREPARE: tl.constexpr, GLOBAL: tl.constexpr, UPDATES: tl.constexpr, TRUST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(the scalars of one tensor's update, the states it uses). UPDATES: rather than measures, with norms if TRUST."""
    group = groups + tl.load(row + GROUP) * GROUP_WIDTH
    lr = tl.full([], 0.0, tl.float64)
    if UPDATES:  # what is measured does not depend on it
        lr = group_lr(group, t, milestones)
    scale = inverse.to(COMPUTE)
    clip = scale * 0 + 1
    if GLOBAL:
        clip = _clip_factor(
            _narrow(norm, COMPUTE), tl.load(group + CLIP).to(COMPUTE), tl.load(group + CLIP_DIVIDES).to(COMPUTE)
        )
    g_norm = clip * 0
    w_norm = clip * 0
    x_norm = clip * 0
    if TRUST:
        norms += own + segment
        g_norm = _narrow(tl.load(norms), COMPUTE) * clip
        w_norm = _narrow(tl.load(norms + WEIGHT_NORM * n_norms), COMPUTE)
        x_norm = _narrow(tl.load(norms + UPDATE_NORM * n_norms), COMPUTE)
    h = PREPARE(
        group + HYPER, lr, tensor_count(steps, shown, segment).to(tl.float64), scale * clip, flags >> 1,
        g_norm, w_norm, x_norm, not UPDATES, COMPUTE,
    )  # fmt: skip
    return h, tl.load(group + STATES).to(tl.int32)


@triton.jit
def measure_tile(
    tile, segment, row, gradient, apply, inverse, norm, t, groups, milestones, steps, shown,
    state_a, state_b, state_c, master, partials, norms, own, n_norms, n_tiles,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, MEASURE: tl.constexpr, STORE: tl.constexpr,
    GRADIENTS: tl.constexpr, GLOBAL: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norms of one tile; with STORE its advanced states."""
    start = (tile - tl.load(row + FIRST_TILE)) * BLOCK
    n = tl.load(row + NUMEL) - start
    flags = tl.load(row + FLAGS)
    wide = (n >= BLOCK) & (flags & 1 != 0)
    if MEASURE is not None:
        h, used = prepare(
            segment, row, flags, inverse, norm, t, groups, milestones, steps, shown, norms, own, n_norms,
            PREPARE, GLOBAL, False, False, COMPUTE,
        )  # fmt: skip
    g = load_tile(gradient, start, n, wide, GRAD, BLOCK).to(COMPUTE)
    if GRADIENTS:
        tl.store(partials + tile, tile_norm(g))
    if MEASURE is not None:
        at = tile * BLOCK + tl.arange(0, BLOCK)
        g = g * h.scale
        w = load_weight(load_tile(tl.load(row + ADDRESS), start, n, wide, PARAM, BLOCK), master, at, COMPUTE)
        tl.store(partials + WEIGHT_NORM * n_tiles + tile, tile_norm(w))
        if STORE:
            a = load_state(state_a, at, used & 1, g)
            b = load_state(state_b, at, used & 2, g)
            c = load_state(state_c, at, used & 4, g)
            a, b, c = ADVANCE(w, g, a, b, c, h)
            if apply:
                store_state(state_a, at, used & 1, a)
                store_state(state_b, at, used & 2, b)
                store_state(state_c, at, used & 4, c)
            tl.store(partials + UPDATE_NORM * n_tiles + tile, tile_norm(MEASURE(w, g, a, b, c, h)))
        else:
            a = load_state(state_a, at, (used & 1) * h.reads_state.to(tl.int32), g)
            x = MEASURE(w, g, a, g, g, h)
            tl.store(partials + UPDATE_NORM * n_tiles + tile, tile_norm(x))


@triton.jit(do_not_specialize=["n_tiles", "own", "n_norms"])
def measure_kernel(
    segments, tiles, groups, milestones, counts, steps, shown, state_a, state_b, state_c, master, partials, norms,
    grad_scale, found_inf, n_tiles, own, n_norms,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, MEASURE: tl.constexpr, STORE: tl.constexpr,
    GRADIENTS: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of all tiles. MEASURE: None for gradients only. GRADIENTS: whether theirs are not known yet."""
    t = tl.load(counts)
    apply, inverse, norm = begin(norms, n_norms, grad_scale, found_inf, GLOBAL, SKIP)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        tile = tl.cast(tile, tl.int64)
        segment = tl.load(tiles + tile).to(tl.int64)
        row = segments + segment * SEGMENT_WIDTH
        gradient = tl.load(row + GRADIENT)
        if gradient > 0:
            measure_tile(
                tile, segment, row, gradient, apply, inverse, norm, t, groups, milestones, steps, shown,
                state_a, state_b, state_c, master, partials, norms, own, n_norms, n_tiles,
                PREPARE, ADVANCE, MEASURE, STORE, GRADIENTS, GLOBAL, PARAM, GRAD, COMPUTE, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_tiles", "n_segments", "own", "n_norms"])
def reduce_kernel(
    segments, partials, norms, grad_scale, n_tiles, n_segments, own, n_norms,
    GRADIENTS: tl.constexpr, UPDATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of all tensors, from those of their tiles; 0 for a tensor without a gradient."""
    kinds = 3 if UPDATES else 1
    for job in range(tl.program_id(0), n_segments * kinds, tl.num_programs(0)):
        kind = job % kinds
        segment = tl.cast(job // kinds, tl.int64)
        row = segments + segment * SEGMENT_WIDTH
        gradient = tl.load(row + GRADIENT)
        norm = tl.full([], 0.0, tl.float64)
        if gradient > 0:
            n = (tl.load(row + NUMEL) + TILE - 1) // TILE
            norm = norm_of(partials + kind * n_tiles + tl.load(row + FIRST_TILE), n, BLOCK)
            if grad_scale is not None:
                if kind == GRADIENT_NORM:
                    norm = norm / tl.load(grad_scale).to(tl.float64)
        if (gradient >= 0) & (GRADIENTS | (kind != GRADIENT_NORM)):
            tl.store(norms + kind * n_norms + own + segment, norm)


@triton.jit
def update_tile(
    tile, segment, row, gradient, inverse, norm, t, groups, milestones, steps, shown,
    state_a, state_b, state_c, master, norms, own, n_norms,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, ADVANCED: tl.constexpr,
    TRUST: tl.constexpr, GLOBAL: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of one tensor."""
    address = tl.load(row + ADDRESS)
    first_tile = tl.load(row + FIRST_TILE)
    start = (tile - first_tile) * BLOCK
    n = tl.load(row + NUMEL) - start
    flags = tl.load(row + FLAGS)
    wide = (n >= BLOCK) & (flags & 1 != 0)
    # Scalars first: with the tile already loaded, the float64 schedule would need half as many registers again.
    h, used = prepare(
        segment, row, flags, inverse, norm, t, groups, milestones, steps, shown, norms, own, n_norms,
        PREPARE, GLOBAL and not ADVANCED, True, TRUST, COMPUTE,
    )  # fmt: skip
    if TRUST:
        if tile == first_tile:
            tl.store(norms + RATIO * n_norms + own + segment, h.ratio.to(tl.float64))
    at = tile * BLOCK + tl.arange(0, BLOCK)
    p = load_tile(address, start, n, wide, PARAM, BLOCK)
    w = load_weight(p, master, at, COMPUTE)
    g = w
    if not ADVANCED:
        g = load_tile(gradient, start, n, wide, GRAD, BLOCK).to(COMPUTE) * h.scale
    a = load_state(state_a, at, used & 1, g)
    b = load_state(state_b, at, used & 2, g)
    c = load_state(state_c, at, used & 4, g)
    if not ADVANCED:
        a, b, c = ADVANCE(w, g, a, b, c, h)
    w = w - h.outer * DIRECTION(w, g, a, b, c, h)

    store_tile(address, start, n, wide, w.to(PARAM), PARAM, BLOCK)
    if master is not None:
        tl.store(master + at, w)
    if not ADVANCED:
        store_state(state_a, at, used & 1, a)
        store_state(state_b, at, used & 2, b)
        store_state(state_c, at, used & 4, c)


@triton.jit
def count_steps(segments, groups, steps, shown, n_segments):
    """Advance the own count of every tensor that was updated."""
    for base in range(0, n_segments, 128):
        k = base + tl.arange(0, 128)
        row = segments + k.to(tl.int64) * SEGMENT_WIDTH
        updated = tl.load(row + GRADIENT, mask=k < n_segments, other=0) > 0
        group = groups + tl.load(row + GROUP, mask=updated, other=0) * GROUP_WIDTH
        counted = updated & (tl.load(group + STATES, mask=updated, other=0.0) != 0)
        count = tl.load(steps + k, mask=counted, other=0)
        if shown is not None:
            count = true_count(count, tl.load(shown + k, mask=counted, other=0.0))
            tl.store(shown + k, (count + 1).to(tl.float32), mask=counted)
        tl.store(steps + k, count + 1, mask=counted)


@triton.jit(do_not_specialize=["n_tiles", "n_segments", "own", "n_norms"])
def update_kernel(
    segments, tiles, groups, milestones, counts, steps, shown, ticket, state_a, state_b, state_c, master, norms,
    grad_scale, found_inf, nonfinite, n_tiles, n_segments, own, n_norms,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, ADVANCED: tl.constexpr,
    TRUST: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr, LAST: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One optimizer step over all tiles; the last program to finish advances the counts.

    ADVANCED: the states are the next update's already. LAST: no launch of this step follows on this device.
    """
    t = tl.load(counts)
    apply, inverse, norm = begin(norms, n_norms, grad_scale, found_inf, GLOBAL, SKIP)
    if apply:
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            tile = tl.cast(tile, tl.int64)
            segment = tl.load(tiles + tile).to(tl.int64)
            row = segments + segment * SEGMENT_WIDTH
            gradient = tl.load(row + GRADIENT)
            if gradient > 0:
                update_tile(
                    tile, segment, row, gradient, inverse, norm, t, groups, milestones, steps, shown,
                    state_a, state_b, state_c, master, norms, own, n_norms,
                    PREPARE, ADVANCE, DIRECTION, ADVANCED, TRUST, GLOBAL, PARAM, GRAD, COMPUTE, BLOCK,
                )  # fmt: skip
    # Every warp has read the counts before this program takes its ticket; without the barrier one warp could take it
    # while another has not, and read a count that is already the next step's.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        if apply:
            count_steps(segments, groups, steps, shown, n_segments)
        if LAST:
            if apply:
                tl.store(counts, t + 1)
            else:
                tl.store(counts + 1, tl.load(counts + 1) + 1)
            if GLOBAL:
                tl.store(nonfinite, 1.0 - (norm < float("inf")).to(tl.float32))
