"""The pass before an update that takes norms: of gradients to clip, of weights and updates for trust ratios."""

import triton
import triton.language as tl

from .norms import add_square, add_tile, chunk_norm, root, tile_norm
from .program import begin, chunk_count, prepare, tensor_norm, weight_row
from .tables import CHUNK_TILES, FIRST_CHUNK, FIRST_TILE, GRADIENT_NORM, NUMEL, SEGMENT_WIDTH, UPDATE_NORM, WEIGHT_NORM
from .tiles import load_state, load_tile, load_weight, store_state


@triton.jit
def tile_norms(
    tile, row, where, n_segments, h, used, apply, measures_weight, state_a, state_b, state_c, master,
    ADVANCE: tl.constexpr, DIVISOR: tl.constexpr, STORE: tl.constexpr, GRADIENTS: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of one tile of gradient, weight and update, 0 for what is not asked for; with STORE its advanced states."""
    address = tl.load(where)  # for each tile anew, as in `update_tile`
    gradient = tl.load(where + n_segments)
    start = tile * BLOCK
    n = tl.load(row + NUMEL) - start
    wide = (n >= BLOCK) & ((address | gradient) % 16 == 0)
    g_norm = tl.full([], 0.0, tl.float64)
    w_norm = g_norm
    x_norm = g_norm
    g = load_tile(gradient, start, n, wide, GRAD, BLOCK).to(COMPUTE)
    if GRADIENTS:
        g_norm = tile_norm(g)
    if DIVISOR is not None:
        at = tl.load(row + FIRST_TILE) * BLOCK + start + tl.arange(0, BLOCK)
        g = g * h.scale
        w = g
        if measures_weight | h.reads_weight:
            w = load_weight(load_tile(address, start, n, wide, PARAM, BLOCK), master, at, COMPUTE)
        if measures_weight:
            w_norm = tile_norm(w)
        if STORE:
            a = load_state(state_a, at, used & 1, g)
            b = load_state(state_b, at, used & 2, g)
            c = load_state(state_c, at, used & 4, g)
            a, b, c = ADVANCE(w, g, a, b, c, h)
            if apply:
                store_state(state_a, at, used & 1, a)
                store_state(state_b, at, used & 2, b)
                store_state(state_c, at, used & 4, c)
            # Past the tensor's end 0 / 0 is possible, of moments and an epsilon of 0.
            x_norm = tile_norm(tl.where(tl.arange(0, BLOCK) < n, DIVISOR(w, g, a, b, c, h), 0.0))
        else:
            a = load_state(state_a, at, (used & 1) * h.reads_state.to(tl.int32), g)
            x_norm = tile_norm(DIVISOR(w, g, a, g, g, h))
    return g_norm, w_norm, x_norm


@triton.jit
def chunk_norms(
    segment, row, where, first, stop, apply, inverse, norm, groups, milestones, counts, steps, shown,
    state_a, state_b, state_c, master, partials, turn, n_chunks, n_segments, small, middle, large,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIVISOR: tl.constexpr, STORE: tl.constexpr,
    GRADIENTS: tl.constexpr, GLOBAL: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of the chunks of one tensor from first to stop - 1; the sums of squares with their gradients' added."""
    h, used = prepare(
        segment, row, inverse, norm, counts, groups, milestones, steps, shown, partials, turn, n_chunks,
        PREPARE, GLOBAL, False, DIVISOR, GLOBAL, COMPUTE, BLOCK,
    )  # fmt: skip
    size = tl.load(row + CHUNK_TILES)
    tiles = (tl.load(row + NUMEL) + BLOCK - 1) // BLOCK
    begins = (first - tl.load(row + FIRST_CHUNK)) * size
    for k in range(stop - first):
        partial = partials + first + k
        weight_partial = partial + weight_row(turn, 0) * n_chunks
        measures_weight = tl.full([], True, tl.int1)
        if turn is not None:
            measures_weight = not (tl.load(weight_partial) >= 0)  # UNKNOWN, or NaN
        g_total = tl.full([], 0.0, tl.float64)
        w_total = g_total
        x_total = g_total
        for i in range(tl.minimum(size, tiles - begins)):
            g_norm, w_norm, x_norm = tile_norms(
                begins + i, row, where, n_segments, h, used, apply, measures_weight, state_a, state_b, state_c, master,
                ADVANCE, DIVISOR, STORE, GRADIENTS, PARAM, GRAD, COMPUTE, BLOCK,
            )  # fmt: skip
            g_total = add_tile(g_total, g_norm, COMPUTE)
            w_total = add_tile(w_total, w_norm, COMPUTE)
            x_total = add_tile(x_total, x_norm, COMPUTE)
        if GRADIENTS:
            g_total = chunk_norm(g_total, COMPUTE) * inverse.to(tl.float64)
            tl.store(partial, g_total)
            small, middle, large = add_square(small, middle, large, g_total, tl.float64 == COMPUTE)
        if DIVISOR is not None:
            tl.store(partial + UPDATE_NORM * n_chunks, chunk_norm(x_total, COMPUTE))
            if measures_weight:
                tl.store(weight_partial, chunk_norm(w_total, COMPUTE))
        begins += size
    return small, middle, large


@triton.jit
def clear_chunks(first, stop, partials, turn, n_chunks):
    """Norms of 0, of a tensor without a gradient; a weight's that is carried stays."""
    for chunk in range(first, stop):
        tl.store(partials + GRADIENT_NORM * n_chunks + chunk, 0.0)
        tl.store(partials + UPDATE_NORM * n_chunks + chunk, 0.0)
        if turn is None:
            tl.store(partials + WEIGHT_NORM * n_chunks + chunk, 0.0)


@triton.jit(do_not_specialize=["n_chunks", "n_runs", "n_segments", "n_totals", "first_total"])
def norm_kernel(
    segments, addresses, chunks, groups, milestones, counts, steps, shown, state_a, state_b, state_c, master, partials,
    turn, totals, grad_scale, found_inf, n_chunks, n_runs, n_segments, n_totals, first_total,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIVISOR: tl.constexpr, STORE: tl.constexpr,
    GRADIENTS: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of all chunks. DIVISOR: None for gradients only. GRADIENTS: whether theirs are not known yet."""
    apply, _, inverse, norm = begin(totals, n_totals, grad_scale, found_inf, GLOBAL, SKIP, COMPUTE)
    small = tl.full([], 0.0, tl.float64)  # the squares of all that this program measures
    middle = small
    large = small
    for run in range(tl.program_id(0), n_runs, tl.num_programs(0)):
        first = tl.cast(run, tl.int64) * n_chunks // n_runs
        high = (tl.cast(run, tl.int64) + 1) * n_chunks // n_runs
        while first < high:
            segment = tl.load(chunks + first).to(tl.int64)
            row = segments + segment * SEGMENT_WIDTH
            where = addresses + segment
            stop = tl.minimum(high, tl.load(row + FIRST_CHUNK) + chunk_count(row, BLOCK))
            gradient = tl.load(where + n_segments)
            if gradient > 0:
                small, middle, large = chunk_norms(
                    segment, row, where, first, stop, apply, inverse, norm, groups, milestones, counts, steps, shown,
                    state_a, state_b, state_c, master, partials, turn, n_chunks, n_segments, small, middle, large,
                    PREPARE, ADVANCE, DIVISOR, STORE, GRADIENTS, GLOBAL, PARAM, GRAD, COMPUTE, BLOCK,
                )  # fmt: skip
            if gradient == 0:
                clear_chunks(first, stop, partials, turn, n_chunks)
            first = stop
    if GRADIENTS:
        tl.store(totals + first_total + tl.program_id(0), root(small, middle, large, tl.float64 == COMPUTE))


@triton.jit(do_not_specialize=["n_chunks", "n_segments"])
def reduce_kernel(
    segments,
    partials,
    turn,
    norms,
    n_chunks,
    n_segments,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norms of one kind of all tensors, for whoever wants to see them."""
    kind = tl.cast(KIND, tl.int32)
    if KIND == WEIGHT_NORM:
        kind = weight_row(turn, 1)  # of before the last update
    for index in range(tl.program_id(0), n_segments, tl.num_programs(0)):
        segment = tl.cast(index, tl.int64)
        row = segments + segment * SEGMENT_WIDTH
        norm = tensor_norm(partials, n_chunks, row, kind, COMPUTE, BLOCK)
        if turn is not None:
            first = partials + kind * n_chunks + tl.load(row + FIRST_CHUNK)
            if tl.load(first, mask=tl.load(row + NUMEL) > 0, other=0.0) < 0:  # UNKNOWN
                norm = tl.full([], 0.0, tl.float64)
        tl.store(norms + segment, norm)
