"""L2 norms in float64, by tile, by chunk, by tensor and over all: no atomics, one order of summation, no overflow.

A tile's norm is taken in the compute dtype; where its squares overflow or vanish, they are taken again of the values
over the largest one, so that a norm is finite wherever all values are. From there on everything is float64, and the
norm of norms is the norm: their squares are summed in three ranges (Blue 1978), which neither overflow nor vanish.
"""

import triton
import triton.language as tl

_UP = tl.constexpr(2.0**600)
_DOWN = tl.constexpr(2.0**-600)


@triton.jit
def _usable(squares):
    """Whether a sum of squares lost nothing to overflow or underflow."""
    if squares.dtype == tl.float64:
        usable = (squares > 1e-280) & (squares < 1e300)
    else:
        usable = (squares > 1e-26) & (squares < 1e38)
    return usable | (squares != squares)


@triton.jit
def tile_norm(x):
    """float64 norm of one tile."""
    squares = tl.sum(x * x, 0)
    largest = squares * 0 + 1
    if not _usable(squares):
        largest = tl.max(tl.abs(x), 0)
        # Of zeros and of infinite values the plain sum is right.
        if (largest > 0) & (largest < float("inf")):
            x = x / largest
            squares = tl.sum(x * x, 0)
        else:
            largest = squares * 0 + 1
            squares = tl.sum(x * x, 0)
    root = tl.sqrt_rn(squares) if squares.dtype == tl.float32 else tl.sqrt(squares)
    return root.to(tl.float64) * largest.to(tl.float64)


@triton.jit
def add_square(small, middle, large, x, RANGES: tl.constexpr):
    """Add x^2 to the sum of its range, small and large values scaled; without RANGES all are middling."""
    if RANGES:
        is_small = x < 1e-100
        is_large = x > 1e100
        y = tl.where(is_small, x * _UP, tl.where(is_large, x * _DOWN, x))
        y = y * y
        small += tl.where(is_small, y, 0.0)
        middle += tl.where(is_small | is_large, 0.0, y)
        large += tl.where(is_large, y, 0.0)
    else:
        middle += x * x
    return small, middle, large


@triton.jit
def root(small, middle, large, RANGES: tl.constexpr):
    """The norm that three sums of `add_square` make."""
    norm = tl.sqrt(middle)
    if RANGES:
        norm = tl.where(middle == 0, tl.sqrt(small) * _DOWN, tl.sqrt(middle + small * _DOWN * _DOWN))
        norm = tl.where(large > 0, tl.sqrt(large + middle * _DOWN * _DOWN) * _UP, norm)
    return norm


@triton.jit
def norm_of(pointer, n, BLOCK: tl.constexpr, RANGES: tl.constexpr):
    """The norm of n float64 norms at pointer. RANGES: some may be of float64 values, whose squares may overflow."""
    i = tl.arange(0, BLOCK)
    small = tl.zeros([BLOCK], tl.float64)
    middle = tl.zeros([BLOCK], tl.float64)
    large = tl.zeros([BLOCK], tl.float64)
    for base in range(0, n, BLOCK):
        x = tl.load(pointer + base + i, mask=base + i < n, other=0.0)
        small, middle, large = add_square(small, middle, large, x, RANGES)
    return root(tl.sum(small, 0), tl.sum(middle, 0), tl.sum(large, 0), RANGES)
