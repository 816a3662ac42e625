"""The rules of SGD and LARS: momentum, and LARS's trust ratio. `registry` says what a rule is."""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import formulas
from ..constants import columns, never

_MomentumHyper = tl.constexpr(formulas.MomentumHyper)
_lars_ratio = formulas.on_device(formulas.lars_ratio)
_lars_factors = formulas.on_device(formulas.lars_factors)
_POPULAR = tl.constexpr(formulas.POPULAR)

# fmt: off
(
    _M_WEIGHT_DECAY, _M_MOMENTUM, _M_DAMPENING, _M_NESTEROV, _M_SIGN, _M_TRUST_COEFFICIENT, _M_EPS, _M_FORM,
    _M_NORM_OF_SUM, _M_TRUST_CLIP, _M_ZERO_NORM, _M_ADAPT,
) = columns(formulas.MomentumHyper, *formulas.MomentumHyper._fields)
# fmt: on


class _Momentum(NamedTuple):
    scale: float
    outer: float
    ratio: float
    reads_state: bool  # whether `measure` needs the states,
    reads_weight: bool  # and the weight
    inner: float
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: float
    first: bool
    norm_of_sum: float


_MomentumScalars = tl.constexpr(_Momentum)


@triton.jit
def sgd_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS: tl.constexpr, COMPUTE: tl.constexpr):
    one = (lr * 0 + 1).to(COMPUTE)
    return _MomentumScalars(
        scale * tl.load(hyper + _M_SIGN).to(COMPUTE),
        lr.to(COMPUTE),
        one,
        never(count),
        never(count),
        one,
        tl.load(hyper + _M_WEIGHT_DECAY).to(COMPUTE),
        tl.load(hyper + _M_MOMENTUM).to(COMPUTE),
        (1.0 - tl.load(hyper + _M_DAMPENING)).to(COMPUTE),
        tl.load(hyper + _M_NESTEROV).to(COMPUTE),
        count == 0,
        0 * one,
    )


@triton.jit
def lars_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS: tl.constexpr, COMPUTE: tl.constexpr):
    rate = lr.to(COMPUTE)
    ratio = 0 * rate + 1
    inner = ratio
    outer = rate
    decay = tl.load(hyper + _M_WEIGHT_DECAY).to(COMPUTE)
    form = tl.load(hyper + _M_FORM)
    norm_of_sum = tl.load(hyper + _M_NORM_OF_SUM)
    if not IN_NORM_PASS:
        zero = 0 * decay
        h = _MomentumHyper(
            decay, zero, zero, zero, zero,
            tl.load(hyper + _M_TRUST_COEFFICIENT).to(COMPUTE),
            tl.load(hyper + _M_EPS).to(COMPUTE),
            form,
            norm_of_sum,
            tl.load(hyper + _M_TRUST_CLIP),
            tl.load(hyper + _M_ZERO_NORM),
            tl.load(hyper + _M_ADAPT) * (1 - exempt),
        )  # fmt: skip
        ratio, decay = _lars_ratio(rate, w_norm, x_norm, h)
        inner, outer = _lars_factors(rate, ratio, form)
    return _MomentumScalars(
        scale * tl.load(hyper + _M_SIGN).to(COMPUTE),
        outer,
        ratio,
        form == _POPULAR,
        norm_of_sum != 0,
        inner,
        decay * (1 - exempt).to(COMPUTE),
        tl.load(hyper + _M_MOMENTUM).to(COMPUTE),
        (1.0 - tl.load(hyper + _M_DAMPENING)).to(COMPUTE),
        tl.load(hyper + _M_NESTEROV).to(COMPUTE),
        count == 0,
        norm_of_sum.to(COMPUTE),
    )


@triton.jit
def _decayed(p, g, h):
    # A decay of zero must not turn an infinite weight into NaN.
    return tl.where(h.weight_decay != 0, g + h.weight_decay * p, g)


@triton.jit
def momentum_advance(p, g, a, b, c, h):
    """torch.optim.SGD's momentum_buffer, of the gradient that the trust ratio has scaled."""
    d = h.inner * _decayed(p, g, h)
    return tl.where(h.first, d, h.momentum * a + h.one_minus_dampening * d), b, c


@triton.jit
def momentum_direction(p, g, a, b, c, h):
    d = h.inner * _decayed(p, g, h)
    u = tl.where(h.nesterov != 0, d + h.momentum * a, a)
    return tl.where(h.momentum != 0, u, d)


@triton.jit
def lars_divisor(p, g, a, b, c, h):
    x = g
    if h.norm_of_sum != 0:
        x = _decayed(p, g, h)
        if h.reads_state:
            a, b, c = momentum_advance(p, g, a, b, c, h)
            x = momentum_direction(p, g, a, b, c, h)
    return x
