"""The pass that updates: the whole of a step of SGD, Adam and AdamW without clipping.

Order comes from the order of launches alone, but for the counts, which the last program to finish advances.
"""

import triton
import triton.language as tl

from .constants import CHUNK_TILES, FIRST_CHUNK, FIRST_TILE, GROUP, GROUP_WIDTH, NUMEL, SEGMENT_WIDTH, STATES
from .norms import add_tile, chunk_norm, tile_norm
from .program import begin, prepare, true_count, weight_row
from .projection_pass import ROWS_WIDTH, row_factors
from .tiles import load_state, load_tile, load_weight, store_state, store_tile


@triton.jit
def _store_states(states, at, used, a, b, c):
    store_state(states.a, at, used & 1, a)
    store_state(states.b, at, used & 2, b)
    store_state(states.c, at, used & 4, c)


@triton.jit
def _update_tile(
    start, n, address, gradient, row, own_rows, h, used, states,
    ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, MOMENTS_DONE: tl.constexpr, CARRY: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, WIDE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """`update_tile` for one kind of tile. WIDE: full, its weights aligned. WIDE_GRADIENT: its gradients too.

    start: its first element, among the tensor's own. n: its elements.
    """
    at = tl.load(row + FIRST_TILE) * BLOCK + start + tl.arange(0, BLOCK)
    p = load_tile(address, start, n, WIDE, PARAM, BLOCK)
    w = load_weight(p, states.master, at, COMPUTE)
    g = w
    if not MOMENTS_DONE:
        g = load_tile(gradient, start, n, WIDE_GRADIENT, GRAD, BLOCK).to(COMPUTE) * h.scale
    a = load_state(states.a, at, used & 1, g)
    b = load_state(states.b, at, used & 2, g)
    c = load_state(states.c, at, used & 4, g)
    if not MOMENTS_DONE:
        a, b, c = ADVANCE(w, g, a, b, c, h)
    u = DIRECTION(w, g, a, b, c, h)
    if own_rows is not None:
        # Before the factors come: the registers do not hold both. Elsewhere last, which other rules' registers need.
        _store_states(states, at, used, a, b, c)
        f = row_factors(own_rows, start, COMPUTE, BLOCK)
        u = tl.where(f != 0, u + f * w, u)  # an infinite weight must not become NaN
    w = w - h.outer * u

    p = w.to(PARAM)
    store_tile(address, start, n, WIDE, p, PARAM, BLOCK)
    if states.master is not None:
        tl.store(states.master + at, w)
    if not MOMENTS_DONE and own_rows is None:
        _store_states(states, at, used, a, b, c)
    norm = tl.full([], 0.0, tl.float64)
    if CARRY:
        norm = tile_norm(w if states.master is not None else p.to(COMPUTE))
    return norm


@triton.jit
def update_tile(
    tile, row, where, own_rows, n_segments, h, used, states,
    ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, MOMENTS_DONE: tl.constexpr, CARRY: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of one tensor; with CARRY the norm of its weights then, else 0.

    tile: among the tensor's own. row: its segment. where: its parameter's address, n_segments before its gradient's.
    own_rows: where the rule projects, its row in `rows`.
    """
    # Loaded for each tile anew: what does not change from tile to tile the compiler would keep in registers, and of an
    # address it would make a pointer for each element.
    start = tile * BLOCK
    n = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
    address = tl.load(where)
    gradient = address
    # Branches around the whole tile: see `load_tile`. Gradients are often less aligned than weights, being parts of a
    # bucket or a shard.
    wide = (n >= BLOCK) & (address % 16 == 0)
    wide_gradient = wide
    if not MOMENTS_DONE:  # else none is read
        gradient = tl.load(where + n_segments)
        wide_gradient = wide & (gradient % 16 == 0)
    if wide_gradient:
        norm = _update_tile(
            start, n, address, gradient, row, own_rows, h, used, states,
            ADVANCE, DIRECTION, MOMENTS_DONE, CARRY, PARAM, GRAD, COMPUTE, BLOCK, True, True,
        )  # fmt: skip
    elif wide & (not MOMENTS_DONE):
        norm = _update_tile(
            start, n, address, gradient, row, own_rows, h, used, states,
            ADVANCE, DIRECTION, MOMENTS_DONE, CARRY, PARAM, GRAD, COMPUTE, BLOCK, True, False,
        )  # fmt: skip
    else:
        norm = _update_tile(
            start, n, address, gradient, row, own_rows, h, used, states,
            ADVANCE, DIRECTION, MOMENTS_DONE, CARRY, PARAM, GRAD, COMPUTE, BLOCK, False, False,
        )  # fmt: skip
    return norm


@triton.jit
def count_tensor_steps(tables, counters, n_segments):
    """Advance the own count of every tensor that was updated."""
    for base in range(0, n_segments, 128):
        k = base + tl.arange(0, 128)
        updated = tl.load(tables.addresses + n_segments + k, mask=k < n_segments, other=0) > 0
        row = tables.segments + k.to(tl.int64) * SEGMENT_WIDTH
        group = tables.groups + tl.load(row + GROUP, mask=updated, other=0) * GROUP_WIDTH
        counted = updated & (tl.load(group + STATES, mask=updated, other=0.0) != 0)
        count = tl.load(counters.tensor_steps + k, mask=counted, other=0)
        if counters.torch_steps is not None:
            count = true_count(count, tl.load(counters.torch_steps + k, mask=counted, other=0.0))
            tl.store(counters.torch_steps + k, (count + 1).to(tl.float32), mask=counted)
        tl.store(counters.tensor_steps + k, count + 1, mask=counted)


@triton.jit
def update_chunks(
    segment, row, where, first, stop, inverse, norm, tables, counters, states, norms, rows, n_chunks, n_segments,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, DIVISOR: tl.constexpr,
    MOMENTS_DONE: tl.constexpr, CLIPPED: tl.constexpr, GLOBAL: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the chunks of one tensor from stop - 1 down to first."""
    # Once for all tiles: the LR alone is some sixty operations in float64.
    h, used = prepare(
        segment, row, inverse, norm, tables, counters, norms, n_chunks,
        PREPARE, GLOBAL and not MOMENTS_DONE, True, DIVISOR, CLIPPED, COMPUTE, BLOCK,
    )  # fmt: skip
    own_rows = None
    if rows is not None:
        own_rows = rows + segment * ROWS_WIDTH
    first_chunk = tl.load(row + FIRST_CHUNK)
    size = tl.load(row + CHUNK_TILES)
    tiles = (tl.load(row + NUMEL) + BLOCK - 1) // BLOCK
    if DIVISOR is not None:
        if first == first_chunk:
            tl.store(norms.ratios + segment, h.ratio.to(tl.float64))
    for back in range(1, stop - first + 1):
        chunk = stop - back
        begins = (chunk - first_chunk) * size
        ends = tl.minimum(begins + size, tiles)
        total = tl.full([], 0.0, tl.float64)
        for i in range(1, ends - begins + 1):
            after = update_tile(
                ends - i, row, where, own_rows, n_segments, h, used, states,
                ADVANCE, DIRECTION, MOMENTS_DONE, norms.turn is not None, PARAM, GRAD, COMPUTE, BLOCK,
            )  # fmt: skip
            total = add_tile(total, after, COMPUTE)
        if norms.turn is not None:
            tl.store(norms.partials + weight_row(norms.turn, 1) * n_chunks + chunk, chunk_norm(total, COMPUTE))


@triton.jit
def carry_over(first, stop, norms, n_chunks):
    """Take the norms of weights along that this step leaves as they are."""
    for chunk in range(first, stop):
        norm = tl.load(norms.partials + weight_row(norms.turn, 0) * n_chunks + chunk)
        tl.store(norms.partials + weight_row(norms.turn, 1) * n_chunks + chunk, norm)


@triton.jit
def finish_step(step_counts, turn, apply, COUNTS_STEP: tl.constexpr):
    """What the last program of a step on this device does."""
    if apply:
        if COUNTS_STEP:
            tl.store(step_counts, tl.load(step_counts) + 1)
        if turn is not None:
            tl.store(turn, tl.load(turn) ^ 1)
    elif COUNTS_STEP:
        tl.store(step_counts + 1, tl.load(step_counts + 1) + 1)


@triton.jit(do_not_specialize=["n_chunks", "n_runs", "n_segments", "n_totals"])
def update_kernel(
    tables, counters, states, norms, projection, amp, n_chunks, n_runs, n_segments, n_totals,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, DIVISOR: tl.constexpr,
    MOMENTS_DONE: tl.constexpr, CLIPPED: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr, LAST: tl.constexpr,
    COUNTS_STEP: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One optimizer step over all chunks, last to first: what was measured last may still be in the cache.

    DIVISOR: None without trust ratios. MOMENTS_DONE: the states are the next update's already. CLIPPED: the norms for
    the ratios were taken of clipped gradients. LAST: no launch of this step follows on this device. COUNTS_STEP: the
    step counts as applied.
    """
    apply, finite, inverse, norm = begin(norms, amp, n_totals, GLOBAL, SKIP, COMPUTE)
    if apply:
        for job in range(tl.program_id(0), n_runs, tl.num_programs(0)):
            run = n_runs - 1 - tl.cast(job, tl.int64)
            low = run * n_chunks // n_runs
            stop = (run + 1) * n_chunks // n_runs
            while stop > low:
                segment = tl.load(tables.chunks + stop - 1).to(tl.int64)
                row = tables.segments + segment * SEGMENT_WIDTH
                where = tables.addresses + segment
                first = tl.maximum(low, tl.load(row + FIRST_CHUNK))
                gradient = tl.load(where + n_segments)
                if gradient > 0:
                    update_chunks(
                        segment, row, where, first, stop, inverse, norm, tables, counters, states, norms,
                        projection.rows, n_chunks, n_segments,
                        PREPARE, ADVANCE, DIRECTION, DIVISOR, MOMENTS_DONE, CLIPPED, GLOBAL,
                        PARAM, GRAD, COMPUTE, BLOCK,
                    )  # fmt: skip
                if norms.turn is not None:
                    if gradient == 0:
                        carry_over(first, stop, norms, n_chunks)
                stop = first
    # Every warp has read the counts before this program takes its ticket; without the barrier one warp could take it
    # while another has not, and read a count that is already the next step's.
    tl.debug_barrier()
    if tl.atomic_add(counters.ticket, 1) == tl.num_programs(0) - 1:
        tl.store(counters.ticket, 0)
        if apply:
            count_tensor_steps(tables, counters, n_segments)
        if LAST:
            finish_step(counters.step_counts, norms.turn, apply, COUNTS_STEP)
            if GLOBAL:
                tl.store(amp.nonfinite, 1.0 - finite.to(tl.float32))
