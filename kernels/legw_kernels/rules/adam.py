"""The rules of Adam, AdamW, AdamP and LAMB: two moments, and LAMB's trust ratio. `registry` says what a rule is."""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import formulas
from ..constants import always, columns, never

_AdamHyper = tl.constexpr(formulas.AdamHyper)
_one_minus_power = formulas.on_device(formulas.one_minus_power)
_lamb_ratio = formulas.on_device(formulas.lamb_ratio)
_bias_factors = formulas.on_device(formulas.bias_factors)
_LARGEST_RATIO = tl.constexpr(formulas.LARGEST_RATIO)

# fmt: off
(
    _A_WEIGHT_DECAY, _A_BETA1, _A_BETA2, _A_LOG_BETA1, _A_LOG_BETA2, _A_EPS, _A_AMSGRAD, _A_DECOUPLED, _A_SIGN,
    _A_BIAS_CORRECTION, _A_ADAPT, _A_WEIGHT_LOW, _A_WEIGHT_HIGH, _A_RATIO_LOW, _A_RATIO_HIGH, _A_NESTEROV,
) = columns(
    formulas.AdamHyper,
    "weight_decay", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "amsgrad", "decoupled", "sign",
    "bias_correction", "adapt", "weight_low", "weight_high", "ratio_low", "ratio_high", "nesterov",
)
# fmt: on


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


_AdamScalars = tl.constexpr(_Adam)


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
        never(count),
        always(count),
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
def adam_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS: tl.constexpr, COMPUTE: tl.constexpr):
    return _adam_prepare(
        hyper, lr, count, scale, (lr * 0 + 1).to(COMPUTE), tl.load(hyper + _A_AMSGRAD).to(COMPUTE), True, COMPUTE
    )


@triton.jit
def adamp_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS: tl.constexpr, COMPUTE: tl.constexpr):
    return _adam_prepare(
        hyper, lr, count, scale, (lr * 0 + 1).to(COMPUTE), tl.load(hyper + _A_NESTEROV).to(COMPUTE), True, COMPUTE
    )


@triton.jit
def lamb_prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS: tl.constexpr, COMPUTE: tl.constexpr):
    zero = 0 * w_norm
    ratio = zero + 1
    if not IN_NORM_PASS:
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
    return _adam_prepare(hyper, lr, count, scale, ratio, zero, IN_NORM_PASS, COMPUTE)


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
