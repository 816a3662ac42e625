"""Update rules: pure functions of one tile, given to the kernels as `tl.constexpr`.

A rule is a few functions, and two optimizers share what is the same in them. Tiles are of the compute dtype (float32,
or float64 for float64 parameters); a, b, c are tiles of the rule's states in their order, dummies where unused.

    prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES) -> h
        the scalars of one tensor at this update, as a NamedTuple. `h.scale` multiplies its gradient first, the update
        is w - h.outer * direction. hyper: address of the group's hyper-parameters. scale: of clipping and AMP.
        count: float64, the tensor's earlier updates. While MEASURES, LR and norms are 0, and what needs them is not
        worked out: every scalar of a row costs a tile 8 bytes.
    advance(p, g, a, b, c, h) -> (a, b, c)       the states of the next update
    direction(p, g, a, b, c, h) -> u             the update, from the advanced states
    measure(p, g, a, b, c, h) -> x               what the trust ratio divides by the norm of
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import scalars

_MomentumHyper = tl.constexpr(scalars.MomentumHyper)
_AdamHyper = tl.constexpr(scalars.AdamHyper)
_one_minus_power = scalars.on_device(scalars.one_minus_power)
_lars_ratio = scalars.on_device(scalars.lars_ratio)
_lars_factors = scalars.on_device(scalars.lars_factors)
_lamb_ratio = scalars.on_device(scalars.lamb_ratio)
_bias_factors = scalars.on_device(scalars.bias_factors)
_POPULAR = tl.constexpr(scalars.POPULAR)
_LARGEST_RATIO = tl.constexpr(scalars.LARGEST_RATIO)


def columns(hyper: Any, *fields: str) -> list[tl.constexpr]:
    """The columns of hyper-parameters in a group's row, from its first on."""
    return [tl.constexpr(hyper._fields.index(field)) for field in fields]


# fmt: off
(
    _M_WEIGHT_DECAY, _M_MOMENTUM, _M_DAMPENING, _M_NESTEROV, _M_SIGN, _M_TRUST_COEFFICIENT, _M_EPS, _M_FORM,
    _M_NORM_OF_SUM, _M_TRUST_CLIP, _M_ZERO_NORM, _M_ADAPT,
) = columns(scalars.MomentumHyper, *scalars.MomentumHyper._fields)
(
    _A_WEIGHT_DECAY, _A_BETA1, _A_BETA2, _A_LOG_BETA1, _A_LOG_BETA2, _A_EPS, _A_AMSGRAD, _A_DECOUPLED, _A_SIGN,
    _A_BIAS_CORRECTION, _A_ADAPT, _A_WEIGHT_LOW, _A_WEIGHT_HIGH, _A_RATIO_LOW, _A_RATIO_HIGH, _A_NESTEROV,
) = columns(
    scalars.AdamHyper,
    "weight_decay", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "amsgrad", "decoupled", "sign",
    "bias_correction", "adapt", "weight_low", "weight_high", "ratio_low", "ratio_high", "nesterov",
)
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


class _Adam(NamedTuple):
    scale: float
    outer: float
    ratio: float
    reads_state: bool
    reads_weight: bool
    coupled_decay: float
    decay: float
    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    first_factor: float
    root_factor: float
    eps: float
    flag: float  # amsgrad; AdamP: nesterov


_MomentumScalars = tl.constexpr(_Momentum)
_AdamScalars = tl.constexpr(_Adam)


@triton.jit
def sgd_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES: tl.constexpr, COMPUTE: tl.constexpr):
    one = (lr * 0 + 1).to(COMPUTE)
    return _MomentumScalars(
        scale * tl.load(hyper + _M_SIGN).to(COMPUTE),
        lr.to(COMPUTE),
        one,
        count < 0,
        count < 0,
        one,
        tl.load(hyper + _M_WEIGHT_DECAY).to(COMPUTE),
        tl.load(hyper + _M_MOMENTUM).to(COMPUTE),
        (1.0 - tl.load(hyper + _M_DAMPENING)).to(COMPUTE),
        tl.load(hyper + _M_NESTEROV).to(COMPUTE),
        count == 0,
        0 * one,
    )


@triton.jit
def lars_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES: tl.constexpr, COMPUTE: tl.constexpr):
    rate = lr.to(COMPUTE)
    ratio = 0 * rate + 1
    inner = ratio
    outer = rate
    decay = tl.load(hyper + _M_WEIGHT_DECAY).to(COMPUTE)
    form = tl.load(hyper + _M_FORM)
    norm_of_sum = tl.load(hyper + _M_NORM_OF_SUM)
    if not MEASURES:
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
def lars_measure(p, g, a, b, c, h):
    x = g
    if h.norm_of_sum != 0:
        x = _decayed(p, g, h)
        if h.reads_state:
            a, b, c = momentum_advance(p, g, a, b, c, h)
            x = momentum_direction(p, g, a, b, c, h)
    return x


@triton.jit
def _adam_prepare(hyper, lr, count, scale, ratio, flag, MOMENTS: tl.constexpr, COMPUTE: tl.constexpr):
    n = count + 1.0
    first, root, step = _bias_factors(
        lr.to(COMPUTE),
        _one_minus_power(tl.load(hyper + _A_LOG_BETA1), n).to(COMPUTE),
        _one_minus_power(tl.load(hyper + _A_LOG_BETA2), n).to(COMPUTE),
        tl.load(hyper + _A_BIAS_CORRECTION),
    )
    beta1 = tl.full([], 0.0, tl.float64)
    beta2 = tl.full([], 0.0, tl.float64)
    if MOMENTS:
        beta1 = tl.load(hyper + _A_BETA1)
        beta2 = tl.load(hyper + _A_BETA2)
        scale *= tl.load(hyper + _A_SIGN).to(COMPUTE)
    decay = tl.load(hyper + _A_WEIGHT_DECAY).to(COMPUTE)
    decoupled = tl.load(hyper + _A_DECOUPLED).to(COMPUTE)
    return _AdamScalars(
        scale,
        step * ratio,
        ratio,
        count < 0,
        count >= 0,
        decay * (1 - decoupled),
        decay * decoupled,
        beta1.to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        first,
        root,
        tl.load(hyper + _A_EPS).to(COMPUTE),
        flag,
    )


@triton.jit
def adam_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES: tl.constexpr, COMPUTE: tl.constexpr):
    return _adam_prepare(
        hyper, lr, count, scale, (lr * 0 + 1).to(COMPUTE), tl.load(hyper + _A_AMSGRAD).to(COMPUTE), True, COMPUTE
    )


@triton.jit
def adamp_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES: tl.constexpr, COMPUTE: tl.constexpr):
    return _adam_prepare(
        hyper, lr, count, scale, (lr * 0 + 1).to(COMPUTE), tl.load(hyper + _A_NESTEROV).to(COMPUTE), True, COMPUTE
    )


@triton.jit
def lamb_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, MEASURES: tl.constexpr, COMPUTE: tl.constexpr):
    zero = 0 * w_norm
    ratio = zero + 1
    if not MEASURES:
        adapt = tl.load(hyper + _A_ADAPT)
        weight_low = zero
        weight_high = zero + _LARGEST_RATIO
        ratio_low = zero
        ratio_high = weight_high
        if adapt > 1:
            weight_low = tl.load(hyper + _A_WEIGHT_LOW).to(COMPUTE)
            weight_high = tl.load(hyper + _A_WEIGHT_HIGH).to(COMPUTE)
            ratio_low = tl.load(hyper + _A_RATIO_LOW).to(COMPUTE)
            ratio_high = tl.load(hyper + _A_RATIO_HIGH).to(COMPUTE)
        h = _AdamHyper(
            zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
            adapt, weight_low, weight_high, ratio_low, ratio_high, zero, zero, zero,
        )  # fmt: skip
        ratio = _lamb_ratio(w_norm, x_norm, h)
    return _adam_prepare(hyper, lr, count, scale, ratio, zero, MEASURES, COMPUTE)


@triton.jit
def adam_advance(p, g, a, b, c, h):
    """torch.optim.Adam's exp_avg, exp_avg_sq and max_exp_avg_sq."""
    g = tl.where(h.coupled_decay != 0, g + h.coupled_decay * p, g)
    a = h.beta1 * a + h.one_minus_beta1 * g
    b = h.beta2 * b + h.one_minus_beta2 * (g * g)
    return a, b, tl.maximum(c, b)


@triton.jit
def _over_root(m, v, h):
    root = tl.sqrt_rn(v) if v.dtype == tl.float32 else tl.sqrt(v)
    return (h.first_factor * m) / (h.root_factor * root + h.eps)


@triton.jit
def adam_direction(p, g, a, b, c, h):
    u = _over_root(a, tl.where(h.flag != 0, c, b), h)
    return tl.where(h.decay != 0, u + h.decay * p, u)


@triton.jit
def adamp_direction(p, g, a, b, c, h):
    """Without decay and projection, both of which are a multiple of the weight: `rows.row_factors`."""
    return _over_root(tl.where(h.flag != 0, h.beta1 * a + h.one_minus_beta1 * g, a), b, h)


class DeviceRule(NamedTuple):
    """One optimizer's functions, as described above. two_stage: the states advance while the update is measured.

    projects: each row's multiple of the weight is added to the direction; see `rows`.
    """

    prepare: Any
    advance: Any
    direction: Any
    measure: Any = None
    two_stage: bool = False
    projects: bool = False


RULES = {
    "sgd": DeviceRule(sgd_prepare, momentum_advance, momentum_direction),
    "lars": DeviceRule(lars_prepare, momentum_advance, momentum_direction, lars_measure),
    "adam": DeviceRule(adam_prepare, adam_advance, adam_direction),
    "adamp": DeviceRule(adamp_prepare, adam_advance, adamp_direction, projects=True),
    "lamb": DeviceRule(lamb_prepare, adam_advance, adam_direction, adam_direction, two_stage=True),
}
