"""The published variants of LARS and LAMB, by name. The classes `LARS` and `LAMB` give the formulas.

An axis is an option in which variants differ. A variant has a value for each axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checks import check_flag, check_number, check_range

Axes = dict[str, Any]


# Every other variant says how it differs from the paper.
_LARS_PAPER: Axes = dict(
    trust_coefficient=0.001,
    eps=0,
    denominator="sum_of_norms",
    form="scaled",
    trust_clip=False,
    not_adapted="nothing",
    zero_norm="denominator",
)
_LARS_TORCH = _LARS_PAPER | dict(eps=1e-8, form="torch")  # common to most torch implementations

LARS: dict[str, Axes] = {
    "paper": _LARS_PAPER,
    "tensorflow": _LARS_PAPER | dict(zero_norm="one"),
    "simclr": _LARS_PAPER | dict(denominator="norm_of_sum", zero_norm="one"),
    "simclr-popular": _LARS_PAPER | dict(denominator="norm_of_sum", form="popular", zero_norm="one"),
    "nvidia": _LARS_PAPER | dict(form="corrected", zero_norm="one"),
    "apex-larc": _LARS_TORCH | dict(trust_coefficient=0.02, trust_clip=True, zero_norm="plain"),
    "rocm": _LARS_PAPER | dict(zero_norm="one"),
    "torchlars": _LARS_TORCH | dict(zero_norm="one"),
    "timm": _LARS_TORCH | dict(not_adapted="no_decay", zero_norm="one"),
    "bolts": _LARS_TORCH | dict(not_adapted="no_decay", zero_norm="plain"),
    "moco": _LARS_PAPER | dict(denominator="norm_of_sum", form="torch", not_adapted="vectors", zero_norm="one"),
    "optax": _LARS_PAPER | dict(denominator="norm_of_sum", zero_norm="one"),
}
PLAIN_MOMENTUM_ONLY = ("nvidia", "rocm")  # variants that define neither nesterov nor dampening

_LAMB_PAPER: Axes = dict(
    bias_correction=True,
    max_grad_norm=None,
    trust_clamp=None,
    not_adapted="nothing",
    eps=1e-6,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    weight_norm_clamp=None,
)
_LAMB_CLIPPED = _LAMB_PAPER | dict(max_grad_norm=1.0, not_adapted="no_decay")

LAMB: dict[str, Axes] = {
    "paper": _LAMB_PAPER,
    "author-tf": _LAMB_CLIPPED | dict(bias_correction=False),
    "apex": _LAMB_CLIPPED,
    "timm": _LAMB_CLIPPED,
    "deepspeed": _LAMB_PAPER | dict(bias_correction="step_size", trust_clamp=(0.01, 10.0), eps=1e-8, weight_decay=0.0),
    "optax": _LAMB_PAPER | dict(weight_decay=0.0),
}

DIVIDING = ("author-tf", "apex", "timm")  # variants whose clipping is g / max(1, norm / c)
CHOICES: dict[str, tuple[Any, ...]] = {
    "form": ("scaled", "corrected", "torch", "unscaled", "popular"),
    "denominator": ("sum_of_norms", "norm_of_sum"),
    "zero_norm": ("one", "denominator", "plain"),
    "bias_correction": (True, False, "step_size"),
}
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "trust_coefficient": check_number,
    "trust_clip": check_flag,
    "trust_clamp": check_range,
    "weight_norm_clamp": check_range,
}


def check(table: dict[str, Axes], group: Axes, not_adapted: tuple[str, ...]) -> None:
    """Raise for an unknown variant or a value that its axis does not have."""
    variant, choices = group["variant"], CHOICES | {"not_adapted": not_adapted}
    if not (isinstance(variant, str) and variant in table):
        raise ValueError(f"variant must be one of {', '.join(map(repr, table))}, got {variant!r}")
    for axis in table[variant]:
        value = group.get(axis)
        if value is None:
            continue
        if axis in CHECKS:
            CHECKS[axis](axis, value)
        elif axis in choices and not (isinstance(value, str | int) and value in choices[axis]):
            raise ValueError(f"{axis} must be one of {', '.join(map(repr, choices[axis]))} or None, got {value!r}")


def axes(table: dict[str, Axes], group: Axes) -> Axes:
    """The value of each axis for a group: the group's own if it is set, else its variant's."""
    own = {name: group.get(name) for name in table[group["variant"]]}
    return {name: value if own[name] is None else own[name] for name, value in table[group["variant"]].items()}
