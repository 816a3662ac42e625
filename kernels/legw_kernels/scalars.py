"""The schedule's formulas: one source for the host and the device.

Each formula here is plain Python in the subset that Triton's compiler also takes: `+ - * /`, comparisons, `min`, `max`,
`if`/`else`, NamedTuple fields, and `tl.exp`, `tl.log`, `tl.floor`. Called as it stands it works on floats, because
`tl` is Python's `math` here. `on_device` gives the same code object with `triton.language` for `tl`.

Convention for t, everywhere in this package: t is the number of updates already completed. The warm-up counts the
update being made, t + 1; the decay counts the updates already made, t.
"""

from __future__ import annotations

import math as tl
import types
from collections.abc import Callable
from typing import Any, NamedTuple

# What `Recipe.kind` says: where the LR comes from.
FIXED = 0  # a number in the table
TENSOR32 = 1  # a float32 tensor on the device, by address
TENSOR64 = 2  # a float64 tensor on the device, by address
CONSTANT = 3  # LEGW from here on, with this decay after the warm-up
MULTISTEP = 4
STAIRCASE = 5
EXPONENTIAL = 6
POLYNOMIAL = 7
COSINE = 8


class Recipe(NamedTuple):
    """The constants of one schedule, float64 on both sides. All lengths are in updates.

    Quotients are taken once on the host: a float64 division costs a kernel a subroutine and the registers to call it.
    """

    kind: float = FIXED
    peak_lr: float = 0.0
    warmup_steps: float = 0.0  # W, may be fractional; 0: no warm-up
    slope: float = 0.0  # peak_lr / W
    start: float = 0.0  # the update the decay counts from
    end: float = 0.0  # T, for the decays that end
    pace: float = 0.0  # 1 / the length of the decay: of one period, or from start to end
    log_rate: float = 0.0  # log of the factor of one milestone or period
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
    if r.kind == POLYNOMIAL or r.kind == COSINE:
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
    """LEGW's LR of the update made after t completed ones: peak * min(1, (t + 1) / W) * (decay(t) once t >= W)."""
    lr = r.peak_lr
    if t + 1.0 < r.warmup_steps:
        lr = r.slope * (t + 1.0)
    if t >= r.warmup_steps:
        lr = r.peak_lr * decay_factor(t, passed, r)
    return lr


def on_device(formula: Callable[..., Any], **names: Any) -> Any:
    """A formula as a Triton device function: the same code, with `triton.language` for `tl`.

    names: the device functions of other formulas that this one calls.
    """
    import triton
    import triton.language

    bound = {k: triton.language.constexpr(v) if isinstance(v, int) else v for k, v in formula.__globals__.items()}
    bound.update(names, tl=triton.language)
    return triton.jit(types.FunctionType(formula.__code__, bound, formula.__name__))
