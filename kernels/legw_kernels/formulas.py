"""The scalar formulas, of the schedule and of trust ratios: one source for the host and the device.

Each formula here is plain Python in the subset that Triton's compiler also takes: `+ - * /`, comparisons, `min`, `max`,
`if`/`else`, NamedTuple fields, and `tl.exp`, `tl.log`, `tl.sqrt`, `tl.floor`. Called as it stands it works on floats,
because `tl` is Python's `math` here. `on_device` gives the same code object with `triton.language` for `tl`.

Convention for t, everywhere in this package: t is the number of updates already completed. The warm-up counts the
update being made, t + 1; the decay counts the updates already made, t.
"""

from __future__ import annotations

import math as tl
import types
from collections.abc import Callable
from typing import Any, NamedTuple

# What `ScheduleConstants.kind` says: where the LR comes from.
FIXED = 0  # a number in the table
TENSOR32 = 1  # a float32 tensor on the device, by address
TENSOR64 = 2  # a float64 tensor on the device, by address
CONSTANT = 3  # LEGW from here on, with this decay after the warm-up
MULTISTEP = 4
STAIRCASE = 5
EXPONENTIAL = 6
POLYNOMIAL = 7
COSINE = 8
EXPONENTIAL_THEN_COSINE = 9  # AutoWU: its warm-up, then a cosine


class ScheduleConstants(NamedTuple):
    """The constants of one schedule, float64 on both sides. All lengths are in updates.

    Quotients are taken once on the host: a float64 division costs a kernel a subroutine and the registers to call it.
    """

    kind: float = FIXED
    peak_lr: float = 0.0
    warmup_steps: float = 0.0  # W, may be fractional; 0: no warm-up
    slope: float = 0.0  # peak_lr / W; where the warm-up is exponential, its first LR
    start: float = 0.0  # the update the decay counts from
    end: float = 0.0  # T, for the decays that end
    pace: float = 0.0  # 1 / the length of the decay: of one period, or from start to end
    log_rate: float = 0.0  # log of the factor of one milestone or period; of one update of an exponential warm-up
    power: float = 1.0
    floor: float = 0.0  # end_lr / peak_lr


def sin_half_pi(x):
    """sin(pi/2 * x) for 0 <= x <= 1, to 2e-16 relative: Taylor to y^23, whose next term is below 1e-19.

    Not `tl.sin`: its float64 form reduces arguments of any size through a table in local memory, which
    costs every program a stack frame for a range that never occurs here.
    """
    y = 1.5707963267948966 * x
    z = y * y
    tail = 1.0 - z * (1.0 / 506.0)
    tail = 1.0 - z * (1.0 / 420.0) * tail
    tail = 1.0 - z * (1.0 / 342.0) * tail
    tail = 1.0 - z * (1.0 / 272.0) * tail
    tail = 1.0 - z * (1.0 / 210.0) * tail
    tail = 1.0 - z * (1.0 / 156.0) * tail
    tail = 1.0 - z * (1.0 / 110.0) * tail
    tail = 1.0 - z * (1.0 / 72.0) * tail
    tail = 1.0 - z * (1.0 / 42.0) * tail
    tail = 1.0 - z * (1.0 / 20.0) * tail
    tail = 1.0 - z * (1.0 / 6.0) * tail
    return y * tail


def decay_factor(t, passed, r):
    """The baseline's own decay at update t >= W, as a multiplier of the peak LR.

    t: float64, updates completed. passed: float64, milestones passed at t (only MULTISTEP reads it).
    """
    factors = 0.0 * t  # not 0.0: the compiler wants one type, t's float64, in every branch
    most = 700.0 + 0.0 * t  # a rate above 1 stops short of overflow
    if r.kind == MULTISTEP:
        factors = passed
    if r.kind == STAIRCASE:
        # The 1e-9 keeps a rounding error of the product from moving a boundary.
        factors = max(tl.floor((t - r.start) * r.pace + 1e-9) + 1.0, 0.0)
    if r.kind == EXPONENTIAL:
        factors = max((t - r.start) * r.pace, 0.0)
    value = tl.exp(min(factors * r.log_rate, most))  # 1 for a constant
    if r.kind >= POLYNOMIAL:
        # What is left of the decay, 1 - s, taken from the end so that nothing cancels near it.
        left = min(max((r.end - t) * r.pace, 0.0), 1.0)
        shape = 0.0 * t
        if r.kind == POLYNOMIAL:
            if left > 0.0:
                shape = tl.exp(r.power * tl.log(left))
        else:
            sine = sin_half_pi(left)
            shape = sine * sine
        value = r.floor + (1.0 - r.floor) * shape
    return value


def learning_rate(t, passed, r):
    """The LR of the update made after t completed ones: LEGW's is peak * min(1, (t + 1) / W) * (decay(t) once t >= W).

    AutoWU's warm-up is min_lr * (max_lr / min_lr)^(t / Tw) while t < W, which counts the updates already made.
    """
    lr = r.peak_lr
    if r.kind == EXPONENTIAL_THEN_COSINE:
        if t < r.warmup_steps:
            lr = r.slope * tl.exp(r.log_rate * t)
    else:
        if t + 1.0 < r.warmup_steps:
            lr = r.slope * (t + 1.0)
    if t >= r.warmup_steps:
        lr = r.peak_lr * decay_factor(t, passed, r)
    return lr


# Where LARS lets the LR enter: `lars_factors`.
TORCH = 0  # v = mu * v + ratio * d; w -= lr * v. Equal to NVIDIA's form, v scaled by lr_t / lr_(t-1), at every schedule
SCALED = 1  # v = mu * v + lr * ratio * d; w -= v
UNSCALED = 2  # v = mu * v + d; w -= lr * ratio * v
POPULAR = 3  # the same, with the ratio taken of the update instead of the gradient

# What LARS does where a norm is zero.
ONE = 0  # ratio 1
BY_DENOMINATOR = 1  # ratio 1 where the weight's norm or the whole denominator is zero, else the formula
PLAIN = 2  # ratio 1, no weight decay

LARGEST_RATIO = 1e30  # so that no ratio is infinite in float32, and an update never NaN for it


class MomentumHyper(NamedTuple):
    """One param group's hyper-parameters of SGD and LARS; flags are 0 or 1."""

    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: float = 0.0
    sign: float = 1.0  # -1 to maximize
    trust_coefficient: float = 1.0
    eps: float = 0.0
    form: float = TORCH
    norm_of_sum: float = 0.0  # the denominator is |g + weight_decay * w|, not |g| + weight_decay * |w|
    trust_clip: float = 0.0
    zero_norm: float = ONE
    adapt: float = 0.0


class AdamHyper(NamedTuple):
    """One param group's hyper-parameters of Adam, AdamW, LAMB and AdamP; flags are 0 or 1."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    log_beta1: float = 0.0
    log_beta2: float = 0.0
    eps: float = 1e-8
    amsgrad: float = 0.0
    decoupled: float = 0.0
    sign: float = 1.0  # -1 to maximize
    bias_correction: float = 1.0  # 0: none. 2: of the step size, DeepSpeed's
    adapt: float = 0.0  # 2: with the four that follow
    weight_low: float = 0.0  # what the weight's norm is clamped to
    weight_high: float = LARGEST_RATIO
    ratio_low: float = 0.0  # what the ratio is clamped to
    ratio_high: float = LARGEST_RATIO
    nesterov: float = 0.0
    delta: float = 0.0  # what the cosine of gradient and weight is compared with
    wd_ratio: float = 1.0  # of a projected tensor


def one_minus_power(log_beta, n):
    """1 - beta^n in float64, which loses nothing where beta^n is near 1. n: float64, 1 or more."""
    x = n * log_beta
    value = 1.0 - tl.exp(x)
    if x > -0.25:
        # -expm1(x) by Taylor to x^11, whose next term is below 1e-16 of the first.
        tail = 1.0 + x * (1.0 / 12.0)
        tail = 1.0 + x * (1.0 / 11.0) * tail
        tail = 1.0 + x * (1.0 / 10.0) * tail
        tail = 1.0 + x * (1.0 / 9.0) * tail
        tail = 1.0 + x * (1.0 / 8.0) * tail
        tail = 1.0 + x * (1.0 / 7.0) * tail
        tail = 1.0 + x * (1.0 / 6.0) * tail
        tail = 1.0 + x * (1.0 / 5.0) * tail
        tail = 1.0 + x * (1.0 / 4.0) * tail
        tail = 1.0 + x * (1.0 / 3.0) * tail
        tail = 1.0 + x * (1.0 / 2.0) * tail
        value = -x * tail
    return value


def clip_factor(norm, limit, divides):
    """What clipping multiplies gradients by: torch's min(1, c / (norm + 1e-6)), or LAMB's 1 / max(1, norm / c)."""
    factor = min(1.0, limit / (norm + 1e-6))
    if divides != 0:
        factor = 1.0 / max(1.0, norm / limit)
    return factor


def lars_ratio(lr, w_norm, x_norm, h):
    """(trust ratio, weight decay) of one tensor, by the axes in `MomentumHyper`.

    x_norm: the norm of the gradient; where norm_of_sum, of gradient and decay; where POPULAR, of the update.
    """
    denominator = x_norm + h.eps
    if h.norm_of_sum == 0:
        denominator = h.weight_decay * w_norm + denominator
    empty = (w_norm == 0) or (x_norm == 0)
    if h.zero_norm == BY_DENOMINATOR:
        empty = (w_norm == 0) or (denominator == 0)
    ratio = 0.0 * lr + 1.0
    decay = h.weight_decay
    if h.adapt != 0:
        clip = h.trust_clip != 0
        if empty:
            if h.zero_norm == PLAIN:
                decay = 0.0 * decay
                clip = h.trust_clip > 1  # never; one type for the compiler
        else:
            ratio = min(h.trust_coefficient * w_norm / denominator, LARGEST_RATIO)
        if clip:
            # min(ratio / lr, 1), without 0 / 0.
            ratio = ratio / lr if ratio < lr else 0.0 * lr + 1.0
    return ratio, decay


def lars_factors(lr, ratio, form):
    """What multiplies the decayed gradient as it enters the momentum, and what multiplies the update."""
    inner = ratio
    outer = lr
    if form == SCALED:
        inner = lr * ratio
        outer = 0.0 * lr + 1.0
    if form >= UNSCALED:
        inner = 0.0 * lr + 1.0
        outer = lr * ratio
    return inner, outer


def lamb_ratio(w_norm, u_norm, h):
    """LAMB's trust ratio of one tensor; 1 where a norm is zero."""
    ratio = 0.0 * w_norm + 1.0
    if ((h.adapt != 0) and (w_norm > 0)) and (u_norm > 0):
        ratio = min(max(w_norm, h.weight_low), h.weight_high) / u_norm
        ratio = min(max(ratio, h.ratio_low), h.ratio_high)
    return ratio


def bias_factors(lr, correction1, correction2, kind):
    """(of the first moment, of the root of the second, step size), from 1 - beta^n of both."""
    first = 1.0 / correction1
    root = 1.0 / tl.sqrt(correction2)
    step = lr
    if kind != 1:
        if kind == 2:
            step = lr * first / root
        first = 0.0 * lr + 1.0
        root = 0.0 * lr + 1.0
    return first, root, step


def on_device(formula: Callable[..., Any], **names: Any) -> Any:
    """A formula as a Triton device function: the same code, with `triton.language` for `tl`.

    names: the device functions of other formulas that this one calls.
    """
    import triton
    import triton.language

    bound = {
        k: triton.language.constexpr(v) if isinstance(v, int | float) else v for k, v in formula.__globals__.items()
    }
    bound.update(names, tl=triton.language)
    return triton.jit(types.FunctionType(formula.__code__, bound, formula.__name__))
