"""Loading and storing tiles: of parameters and gradients by address, of state from the flat buffers."""

import triton
import triton.language as tl


@triton.jit
def load_tile(address, start, n, wide, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from `address` + start: in 16-byte accesses if wide, else one by one and none past n.

    wide: a constant where the result is stored again, and the kernel branches around the whole tile. With a branch at
    the store the compiler brings each operand into the layout of masked stores right after its load, in full tiles
    too, through shared memory and barriers at which the tile's other loads wait.
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
# every rule maps zeros to zeros, so the padding stays zero (but for 0 / 0 with an epsilon of 0, which `measure` masks).


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
