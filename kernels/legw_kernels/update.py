"""The pass that updates: the whole of a step of SGD, Adam and AdamW without clipping.

Order comes from the order of launches alone, but for the counts, which the last program to finish advances.
"""

import triton
import triton.language as tl

from .tables import (
    CHUNK_TILES,
    FIRST_CHUNK,
    FIRST_TILE,
    GROUP,
    GROUP_WIDTH,
    NUMEL,
    SEGMENT_WIDTH,
    STATES,
    begin,
    prepare,
    true_count,
)
from .tiles import load_state, load_tile, load_weight, store_state, store_tile


@triton.jit
def update_tile(
    tile, row, where, n_segments, h, used, state_a, state_b, state_c, master,
    ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, ADVANCED: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of one tensor.

    tile: among the tensor's own. row: its segment. where: its parameter's address, n_segments before its gradient's.
    """
    # Loaded for each tile anew: what does not change from tile to tile the compiler would keep in registers, and of an
    # address it would make a pointer for each element.
    address = tl.load(where)
    gradient = tl.load(where + n_segments)
    start = tile * BLOCK
    n = tl.load(row + NUMEL) - start
    wide = (n >= BLOCK) & ((address | gradient) % 16 == 0)
    at = tl.load(row + FIRST_TILE) * BLOCK + start + tl.arange(0, BLOCK)
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
def count_steps(segments, addresses, groups, steps, shown, n_segments):
    """Advance the own count of every tensor that was updated."""
    for base in range(0, n_segments, 128):
        k = base + tl.arange(0, 128)
        updated = tl.load(addresses + n_segments + k, mask=k < n_segments, other=0) > 0
        row = segments + k.to(tl.int64) * SEGMENT_WIDTH
        group = groups + tl.load(row + GROUP, mask=updated, other=0) * GROUP_WIDTH
        counted = updated & (tl.load(group + STATES, mask=updated, other=0.0) != 0)
        count = tl.load(steps + k, mask=counted, other=0)
        if shown is not None:
            count = true_count(count, tl.load(shown + k, mask=counted, other=0.0))
            tl.store(shown + k, (count + 1).to(tl.float32), mask=counted)
        tl.store(steps + k, count + 1, mask=counted)


@triton.jit(do_not_specialize=["n_chunks", "n_runs", "n_segments", "n_totals"])
def update_kernel(
    segments, addresses, chunks, groups, milestones, counts, steps, shown, ticket, state_a, state_b, state_c, master,
    partials, totals, ratios, grad_scale, found_inf, nonfinite, n_chunks, n_runs, n_segments, n_totals,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, MEASURE: tl.constexpr,
    ADVANCED: tl.constexpr, CLIPPED: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr, LAST: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One optimizer step over all chunks, last to first: what was measured last may still be in the cache.

    MEASURE: None without trust ratios. ADVANCED: the states are the next update's already. CLIPPED: what was measured
    for the ratios was clipped. LAST: no launch of this step follows on this device.
    """
    apply, finite, inverse, norm = begin(totals, n_totals, grad_scale, found_inf, GLOBAL, SKIP, COMPUTE)
    if apply:
        for back in range(tl.program_id(0), n_runs, tl.num_programs(0)):
            run = n_runs - 1 - tl.cast(back, tl.int64)
            low = run * n_chunks // n_runs
            stop = (run + 1) * n_chunks // n_runs
            while stop > low:
                segment = tl.load(chunks + stop - 1).to(tl.int64)
                row = segments + segment * SEGMENT_WIDTH
                where = addresses + segment
                first_chunk = tl.load(row + FIRST_CHUNK)
                first = tl.maximum(low, first_chunk)
                if tl.load(where + n_segments) > 0:
                    size = tl.load(row + CHUNK_TILES)
                    # In tiles of this tensor.
                    begins = (first - first_chunk) * size
                    ends = tl.minimum((stop - first_chunk) * size, (tl.load(row + NUMEL) + BLOCK - 1) // BLOCK)
                    # Once for all tiles: the LR alone is some sixty operations in float64.
                    h, used = prepare(
                        segment, row, inverse, norm, counts, groups, milestones, steps, shown, partials, n_chunks,
                        PREPARE, GLOBAL and not ADVANCED, True, MEASURE, CLIPPED, COMPUTE, BLOCK,
                    )  # fmt: skip
                    if MEASURE is not None:
                        if first == first_chunk:
                            tl.store(ratios + segment, h.ratio.to(tl.float64))
                    for i in range(1, ends - begins + 1):
                        update_tile(
                            ends - i, row, where, n_segments, h, used, state_a, state_b, state_c, master,
                            ADVANCE, DIRECTION, ADVANCED, PARAM, GRAD, COMPUTE, BLOCK,
                        )  # fmt: skip
                stop = first
    # Every warp has read the counts before this program takes its ticket; without the barrier one warp could take it
    # while another has not, and read a count that is already the next step's.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        if apply:
            count_steps(segments, addresses, groups, steps, shown, n_segments)
        if LAST:
            if apply:
                tl.store(counts, tl.load(counts) + 1)
            else:
                tl.store(counts + 1, tl.load(counts + 1) + 1)
            if GLOBAL:
                tl.store(nonfinite, 1.0 - finite.to(tl.float32))
