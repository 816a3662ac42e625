"""AdamP's projection: sums over the rows of a tensor, and the multiple of each row's weight that an update adds.

A tensor of more than one dimension is a matrix, a row for each index of its first dimension, contiguous in memory. Rows
of any length lie across the tiles of the other passes, so they are measured in pieces of their own: some rows by a
span of columns. Each piece leaves four sums of each of its rows; a second launch adds them up, decides for each tensor
whether its update is projected, by rows or as a whole, and writes each row's factor. All in one order, without atomics.

Decay and projection are both a multiple of the weight, so that with u the update of Adam

    w -= lr * (u + factor * w),    factor = weight_decay * wd_ratio - <w, u> / (|w| + eps)^2, or weight_decay

rows       int64, a row per tensor: its rows and their length, the address of the first one's factor; where its pieces
           begin in `pieces`, its sums in `sums`; the columns of a span; the spans of a row, 0: not projected
pieces     int32, one entry per piece: the tensor it belongs to
sums       float64[4, sums]: of each span of each row <g, w>, <g, g>, <w, w>, <w, u>; a tensor's, span by span
factors    of the compute dtype, one per row, then room for a tile
"""

import triton
import triton.language as tl

from . import formulas
from .program import begin, prepare
from .tables import FIRST_TILE, GROUP, GROUP_WIDTH, HYPER, NORMS_BLOCK, SEGMENT_WIDTH, columns
from .tiles import load_weight

# Columns of a row of `rows`.
ROW_COUNT = tl.constexpr(0)
ROW_LENGTH = tl.constexpr(1)
FACTORS = tl.constexpr(2)
FIRST_PIECE = tl.constexpr(3)
FIRST_SUM = tl.constexpr(4)
SPAN = tl.constexpr(5)
SPAN_COUNT = tl.constexpr(6)
ROWS_WIDTH = tl.constexpr(7)

_WEIGHT_DECAY, _EPS, _DELTA, _WD_RATIO = columns(formulas.AdamHyper, "weight_decay", "eps", "delta", "wd_ratio")


@triton.jit
def _factors(row, COMPUTE: tl.constexpr):
    return tl.load(row + FACTORS).to(tl.pointer_type(COMPUTE))


@triton.jit
def row_factors(row, start, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """The factors of the BLOCK elements from start; of those past the tensor's end any."""
    i = tl.arange(0, BLOCK)
    length = tl.load(row + ROW_LENGTH)
    first = start // length
    pointer = _factors(row, COMPUTE) + first
    # Elements left in the first row, of which no more than BLOCK matter: offsets are of 32 bits.
    left = tl.minimum((first + 1) * length - start, BLOCK).to(tl.int32)
    if length >= BLOCK:  # at most two rows
        f = tl.where(i < left, tl.load(pointer), tl.load(pointer + 1))
    else:
        # Unsigned, which takes fewer registers; of the first row it is of no meaning.
        k = ((i - left).to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
        f = tl.load(pointer + tl.where(i < left, 0, k + 1))
    return f


@triton.jit(do_not_specialize=["n_pieces", "n_sums", "n_segments", "n_totals"])
def sums_kernel(
    segments, addresses, groups, milestones, counts, steps, shown, state_a, state_b, master, totals,
    grad_scale, found_inf, rows, pieces, sums, n_pieces, n_sums, n_segments, n_totals,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, GLOBAL: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The four sums of every row of every piece; nothing else is written."""
    _, _, inverse, norm = begin(totals, n_totals, grad_scale, found_inf, GLOBAL, SKIP, COMPUTE)
    for piece in range(tl.program_id(0), n_pieces, tl.num_programs(0)):
        segment = tl.load(pieces + piece).to(tl.int64)
        row = segments + segment * SEGMENT_WIDTH
        address = tl.load(addresses + segment)
        gradient = tl.load(addresses + n_segments + segment)
        if gradient > 0:
            h, _used = prepare(
                segment, row, inverse, norm, counts, groups, milestones, steps, shown, None, None, 0,
                PREPARE, GLOBAL, False, None, False, COMPUTE, BLOCK,
            )  # fmt: skip
            own = rows + segment * ROWS_WIDTH
            length = tl.load(own + ROW_LENGTH)
            n_rows = tl.load(own + ROW_COUNT)
            spans = tl.load(own + SPAN_COUNT)
            index = piece - tl.load(own + FIRST_PIECE)
            span = index % spans
            k = index // spans * ROWS + tl.arange(0, ROWS)
            low = span * tl.load(own + SPAN)
            high = tl.minimum(low + tl.load(own + SPAN), length)
            state = tl.load(row + FIRST_TILE) * BLOCK
            gw = tl.zeros([ROWS, COLUMNS], COMPUTE)
            gg = tl.zeros([ROWS, COLUMNS], COMPUTE)
            ww = tl.zeros([ROWS, COLUMNS], COMPUTE)
            wu = tl.zeros([ROWS, COLUMNS], COMPUTE)
            for begins in range(low, high, COLUMNS):
                column = begins + tl.arange(0, COLUMNS)
                at = k[:, None] * length + column[None, :]
                there = (k < n_rows)[:, None] & (column < high)[None, :]
                p = tl.load(address.to(tl.pointer_type(PARAM)) + at, mask=there, other=0.0)
                g = tl.load(gradient.to(tl.pointer_type(GRAD)) + at, mask=there, other=0.0).to(COMPUTE) * h.scale
                at = tl.where(there, state + at, state)  # `load_weight` has no mask: the tensor's first, then dropped
                w = tl.where(there, load_weight(p, master, at, COMPUTE), 0.0)
                a = tl.load(state_a + at, mask=there, other=0.0)
                b = tl.load(state_b + at, mask=there, other=0.0)
                a, b, _largest = ADVANCE(w, g, a, b, b, h)
                # Elsewhere 0 / 0 is possible, of moments and an epsilon of 0.
                u = tl.where(there, DIRECTION(w, g, a, b, b, h), 0.0)
                gw += g * w
                gg += g * g
                ww += w * w
                wu += w * u
            to = sums + tl.load(own + FIRST_SUM) + span * n_rows + k
            tl.store(to, tl.sum(gw, 1).to(tl.float64), mask=k < n_rows)
            tl.store(to + n_sums, tl.sum(gg, 1).to(tl.float64), mask=k < n_rows)
            tl.store(to + 2 * n_sums, tl.sum(ww, 1).to(tl.float64), mask=k < n_rows)
            tl.store(to + 3 * n_sums, tl.sum(wu, 1).to(tl.float64), mask=k < n_rows)


@triton.jit
def _row_sums(own, sums, n_sums, k, n_rows):
    """The four sums of the rows k, over their spans."""
    gw = tl.zeros([NORMS_BLOCK], tl.float64)
    gg = tl.zeros([NORMS_BLOCK], tl.float64)
    ww = tl.zeros([NORMS_BLOCK], tl.float64)
    wu = tl.zeros([NORMS_BLOCK], tl.float64)
    for span in range(tl.load(own + SPAN_COUNT)):
        at = sums + tl.load(own + FIRST_SUM) + span * n_rows + k
        gw += tl.load(at, mask=k < n_rows, other=0.0)
        gg += tl.load(at + n_sums, mask=k < n_rows, other=0.0)
        ww += tl.load(at + 2 * n_sums, mask=k < n_rows, other=0.0)
        wu += tl.load(at + 3 * n_sums, mask=k < n_rows, other=0.0)
    return gw, gg, ww, wu


@triton.jit
def _is_tangent(gw, gg, ww, eps, delta, length):
    """Whether the cosine of gradient and weight is below delta / sqrt(length); not if it is NaN."""
    cosine = tl.abs(gw) / (tl.maximum(tl.sqrt(gg), eps) * tl.maximum(tl.sqrt(ww), eps))
    return cosine < delta / tl.sqrt(length.to(tl.float64))


@triton.jit
def _radial(ww, wu, eps):
    """How much of the weight is in the update."""
    norm = tl.sqrt(ww) + eps
    return wu / (norm * norm)


@triton.jit(do_not_specialize=["n_sums", "n_segments"])
def factors_kernel(
    segments, addresses, groups, rows, sums, n_sums, n_segments, COMPUTE: tl.constexpr
):  # fmt: skip
    """The factor of every row of every tensor with a gradient."""
    for index in range(tl.program_id(0), n_segments, tl.num_programs(0)):
        segment = tl.cast(index, tl.int64)
        if tl.load(addresses + n_segments + segment) > 0:
            hyper = groups + tl.load(segments + segment * SEGMENT_WIDTH + GROUP) * GROUP_WIDTH + HYPER
            decay = tl.load(hyper + _WEIGHT_DECAY)
            eps = tl.load(hyper + _EPS)
            delta = tl.load(hyper + _DELTA)
            own = rows + segment * ROWS_WIDTH
            n_rows = tl.load(own + ROW_COUNT)
            length = tl.load(own + ROW_LENGTH)
            by_row = tl.load(own + SPAN_COUNT) > 0
            whole = by_row
            others = tl.full([], 0.0, tl.float64)  # rows along which the gradient points
            gw = tl.full([], 0.0, tl.float64)
            gg = gw
            ww = gw
            wu = gw
            if by_row:
                for base in range(0, n_rows, NORMS_BLOCK):
                    k = base + tl.arange(0, NORMS_BLOCK)
                    row_gw, row_gg, row_ww, row_wu = _row_sums(own, sums, n_sums, k, n_rows)
                    tangent = _is_tangent(row_gw, row_gg, row_ww, eps, delta, length)
                    others += tl.sum(tl.where((k < n_rows) & (tangent == 0), 1.0, 0.0), 0)
                    gw += tl.sum(row_gw, 0)
                    gg += tl.sum(row_gg, 0)
                    ww += tl.sum(row_ww, 0)
                    wu += tl.sum(row_wu, 0)
                by_row = others == 0
                whole = _is_tangent(gw, gg, ww, eps, delta, n_rows * length)
            if by_row | whole:
                decay *= tl.load(hyper + _WD_RATIO)
            for base in range(0, n_rows, NORMS_BLOCK):
                k = base + tl.arange(0, NORMS_BLOCK)
                factor = tl.zeros([NORMS_BLOCK], tl.float64) + decay
                if by_row:
                    _, _, row_ww, row_wu = _row_sums(own, sums, n_sums, k, n_rows)
                    factor -= _radial(row_ww, row_wu, eps)
                elif whole:
                    factor -= _radial(ww, wu, eps)
                tl.store(_factors(own, COMPUTE) + k, factor.to(COMPUTE), mask=k < n_rows)
