"""L2 norms in float64, by tile, by tensor and over all: no atomics, one order of summation, no overflow.

A tile's norm is taken in the compute dtype; from there on everything is float64, and the norm of norms is the norm.
Where squares overflow or vanish, they are taken again of the values over the largest one, so that a norm is finite
wherever all values are.
"""

import triton
import triton.language as tl


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
def norm_of(pointer, n, BLOCK: tl.constexpr):
    """The norm of n float64 norms at pointer."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for base in range(0, n, BLOCK):
        x = tl.load(pointer + base + i, mask=base + i < n, other=0.0)
        total += x * x
    squares = tl.sum(total, 0)
    scale = squares * 0 + 1
    if not _usable(squares):
        peaks = tl.zeros([BLOCK], tl.float64)
        for base in range(0, n, BLOCK):
            peaks = tl.maximum(peaks, tl.load(pointer + base + i, mask=base + i < n, other=0.0))
        largest = tl.max(peaks, 0)
        if (largest > 0) & (largest < float("inf")):
            scale = largest
            total = tl.zeros([BLOCK], tl.float64)
            for base in range(0, n, BLOCK):
                x = tl.load(pointer + base + i, mask=base + i < n, other=0.0) / largest
                total += x * x
            squares = tl.sum(total, 0)
    return tl.sqrt(squares) * scale
