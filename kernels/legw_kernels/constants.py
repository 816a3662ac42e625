"""Constants of the device code. Triton lets a kernel read a global only if it is a `tl.constexpr`."""

from typing import Any

import triton
import triton.language as tl

from . import tables

# The columns and rows of `tables`.
NUMEL = tl.constexpr(tables.NUMEL)
FIRST_TILE = tl.constexpr(tables.FIRST_TILE)
FIRST_CHUNK = tl.constexpr(tables.FIRST_CHUNK)
CHUNK_TILES = tl.constexpr(tables.CHUNK_TILES)
GROUP = tl.constexpr(tables.GROUP)
IS_VECTOR = tl.constexpr(tables.IS_VECTOR)
SEGMENT_WIDTH = tl.constexpr(tables.SEGMENT_WIDTH)
LR_ADDRESS = tl.constexpr(tables.LR_ADDRESS)
MILESTONES = tl.constexpr(tables.MILESTONES)
MILESTONE_COUNT = tl.constexpr(tables.MILESTONE_COUNT)
STATES = tl.constexpr(tables.STATES)
CLIP = tl.constexpr(tables.CLIP)
CLIP_DIVIDES = tl.constexpr(tables.CLIP_DIVIDES)
EXEMPT_VECTORS = tl.constexpr(tables.EXEMPT_VECTORS)
HYPER = tl.constexpr(tables.HYPER)
GROUP_WIDTH = tl.constexpr(tables.GROUP_WIDTH)
GRADIENT_NORM = tl.constexpr(tables.GRADIENT_NORM)
UPDATE_NORM = tl.constexpr(tables.UPDATE_NORM)
WEIGHT_NORM = tl.constexpr(tables.WEIGHT_NORM)

NORMS_BLOCK = tl.constexpr(256)  # norms that are added up at a time


def columns(hyper: Any, *fields: str) -> list[tl.constexpr]:
    """The columns of hyper-parameters in a group's row, from its first on."""
    return [tl.constexpr(hyper._fields.index(field)) for field in fields]


# A literal False becomes a constant of the compiler's own, which has no `.to` and no common type with a comparison that
# takes its place in another branch or rule. So it is a comparison too, of a count, which is never negative.
@triton.jit
def never(count):
    """False."""
    return count < 0


@triton.jit
def always(count):
    """True."""
    return count >= 0
