"""Param groups that other packages wrote: what their options mean to the optimizers here.

A loaded group without a `variant` counts as theirs. Groups of our own LARS and LAMB always have one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import variants
from ..spec import Group

# Options that change the update in a way that no optimizer here has, and the value at which they do nothing.
_NEUTRAL: dict[str, Any] = dict(
    grad_averaging=True,  # apex, timm, pytorch_optimizer: LAMB's first moment with 1 - beta1
    bias_correction=True,  # apex's Adam; LAMB has it
    correct_bias=True,  # transformers' AdamW
    caution=False,  # timm: updates masked by their sign
    cautious=False,  # pytorch_optimizer's word for it
    corrected_weight_decay=False,  # timm
    decoupled_decay=False,  # timm's LAMB: weight decay outside of the trust ratio
    clipping_threshold=None,  # timm's AdamW
    rectify=False,  # pytorch_optimizer
    fixed_decay=False,  # pytorch_optimizer
)


def translate(group: Group, live: Group, own: Mapping[str, Any]) -> None:
    """Bring a loaded group of another package to our options, in place.

    Args:
        group: the group; it may lack options.
        live: the optimizer's group that it is for.
        own: the optimizer's options.

    Raises:
        ValueError: an option that changes the update and has no counterpart here.
    """
    if "variant" in group:
        return
    for name, neutral in _NEUTRAL.items():
        if name in group and name not in own:
            value = group.pop(name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} is not supported, only {name}={neutral!r}")
    if "trust_coeff" in group and "trust_coefficient" in own:  # timm's LARS
        group["trust_coefficient"] = group.pop("trust_coeff")
    if "always_adapt" in group and "not_adapted" in own:  # timm's LARS and LAMB
        adapts = bool(group.pop("always_adapt"))
        group["not_adapted"] = "nothing" if adapts else _unless_of_variant(live, "not_adapted", "no_decay")
    if "weight_decouple" in group and "amsgrad" in own:  # pytorch_optimizer's Adams
        group["decoupled_weight_decay"] = bool(group.pop("weight_decouple"))
    if "trust_clamp" in own:  # LAMB
        if "min_coeff" in group and "max_coeff" in group:  # DeepSpeed's
            group["trust_clamp"] = float(group.pop("min_coeff")), float(group.pop("max_coeff"))
            group["bias_correction"] = "step_size" if group.get("bias_correction", True) else False
        if "trust_clip" in group:  # timm's
            clips = bool(group.pop("trust_clip"))
            group["trust_clamp"] = (0.0, 1.0) if clips else _unless_of_variant(live, "trust_clamp", None)
        if group.get("max_grad_norm", 0) is None:
            group["max_grad_norm"] = math.inf


def _unless_of_variant(live: Group, axis: str, value: Any) -> Any:
    """The value, or None if the live group's variant has it anyway. No clamp is said as one that never holds."""
    table = variants.LAMB if "trust_clamp" in live else variants.LARS
    if table[live["variant"]][axis] == value:
        return None
    return (0.0, math.inf) if value is None else value
