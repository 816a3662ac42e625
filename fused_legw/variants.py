"""The LARS and LAMB that people mean, by name: rows of axes. Sources and formulas: `LARS` and `LAMB`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checks import check_flag, check_number, check_range

Axes = dict[str, Any]


def _lars(
    trust_coefficient: float,
    eps: float,
    denominator: str,
    form: str,
    trust_clip: bool,
    not_adapted: str,
    zero_norm: str,
) -> Axes:
    return dict(
        trust_coefficient=trust_coefficient,
        eps=eps,
        denominator=denominator,
        form=form,
        trust_clip=trust_clip,
        not_adapted=not_adapted,
        zero_norm=zero_norm,
    )


LARS: dict[str, Axes] = {
    "paper": _lars(0.001, 0, "sum_of_norms", "scaled", False, "nothing", "denominator"),
    "tensorflow": _lars(0.001, 0, "sum_of_norms", "scaled", False, "nothing", "one"),
    "simclr": _lars(0.001, 0, "norm_of_sum", "scaled", False, "nothing", "one"),
    "simclr-popular": _lars(0.001, 0, "norm_of_sum", "popular", False, "nothing", "one"),
    "nvidia": _lars(0.001, 0, "sum_of_norms", "corrected", False, "nothing", "one"),
    "apex-larc": _lars(0.02, 1e-8, "sum_of_norms", "torch", True, "nothing", "plain"),
    "rocm": _lars(0.001, 0, "sum_of_norms", "scaled", False, "nothing", "one"),
    "torchlars": _lars(0.001, 1e-8, "sum_of_norms", "torch", False, "nothing", "one"),
    "timm": _lars(0.001, 1e-8, "sum_of_norms", "torch", False, "no_decay", "one"),
    "bolts": _lars(0.001, 1e-8, "sum_of_norms", "torch", False, "no_decay", "plain"),
    "moco": _lars(0.001, 0, "norm_of_sum", "torch", False, "vectors", "one"),
    "optax": _lars(0.001, 0, "norm_of_sum", "scaled", False, "nothing", "one"),
}
PLAIN_MOMENTUM_ONLY = ("nvidia", "rocm")  # variants that define neither nesterov nor dampening


def _lamb(
    bias_correction: bool | str, max_grad_norm: float | None, trust_clamp: tuple[float, float] | None,
    not_adapted: str, eps: float, weight_decay: float,
) -> Axes:  # fmt: skip
    return dict(
        bias_correction=bias_correction,
        max_grad_norm=max_grad_norm,
        trust_clamp=trust_clamp,
        not_adapted=not_adapted,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        weight_norm_clamp=None,
    )


LAMB: dict[str, Axes] = {
    "paper": _lamb(True, None, None, "nothing", 1e-6, 0.01),
    "author-tf": _lamb(False, 1.0, None, "no_decay", 1e-6, 0.01),
    "apex": _lamb(True, 1.0, None, "no_decay", 1e-6, 0.01),
    "timm": _lamb(True, 1.0, None, "no_decay", 1e-6, 0.01),
    "deepspeed": _lamb("step_size", None, (0.01, 10.0), "nothing", 1e-8, 0.0),
    "optax": _lamb(True, None, None, "nothing", 1e-6, 0.0),
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
    """Refuse unknown variants and values of axes."""
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
    """A group's axes: its own where set, else its variant's."""
    own = {name: group.get(name) for name in table[group["variant"]]}
    return {name: value if own[name] is None else own[name] for name, value in table[group["variant"]].items()}
