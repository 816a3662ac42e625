"""Update rules: pure functions of one tile, given to the skeleton as `tl.constexpr`.

A rule takes the parameter, its gradient and its state as tiles of the compute dtype (float32, or float64 for float64
parameters), the group's `Hyper`, and whether this is the tensor's first counted update. It returns what to store.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Hyper(NamedTuple):
    """One param group's hyper-parameters, as scalars of the compute dtype."""

    lr: float
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: float  # 0 or 1
    sign: float  # -1 to maximize


@triton.jit
def sgd(p, g, m, h, first):
    """torch.optim.SGD's update: (parameter, momentum_buffer). With momentum 0, m is not used and must not be stored."""
    g = g * h.sign
    # A decay of zero must not turn an infinite weight into NaN.
    g = tl.where(h.weight_decay != 0, g + h.weight_decay * p, g)
    m = tl.where(first, g, h.momentum * m + h.one_minus_dampening * g)
    d = tl.where(h.nesterov != 0, g + h.momentum * m, m)
    d = tl.where(h.momentum != 0, d, g)
    return p - h.lr * d, m
