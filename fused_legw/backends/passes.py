"""The passes of a step, as data. Each pass launches its kernel on every device; launches run in order.

    SGD, Adam, AdamW        update
    LARS                    norms (of gradients and updates), update
    LAMB                    norms (of gradients and updates, and the moments advance), update
    AdamP                   projection, update

With clipping, `skip_nonfinite` or our GradScaler, a step needs the global norm before it updates anything. LARS takes
it in its norm pass. The others have an extra pass for it, which comes first. LARS has that pass too if it clips and its
ratio needs clipped gradients: the norm of clipped gradient plus weight decay is summed directly, after the clip factor
is known. (Expanded into three sums, it would suffer from cancellation.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..spec import Group, OptimizerSpec


class Pass(NamedTuple):
    """One pass over all tensors."""

    kind: str  # "norms", "projection" or "update"
    of: frozenset[str] = frozenset()  # tensors of a norm pass: "gradients", "updates" (with them weights), or both
    clipped: bool = False  # norm pass: it reads clipped gradients; update: its trust ratios come from such a pass


def passes(spec: OptimizerSpec, groups: Sequence[Group], *, clips: bool, global_norm: bool) -> tuple[Pass, ...]:
    """The passes of one step, in order. clips: some group clips. global_norm: clipping or skipping needs it."""
    clipped_first = clips and any(map(spec.needs_clipped, groups))
    apart = clipped_first or (global_norm and spec.two_stage)
    found = list[Pass]()
    if apart or (global_norm and not spec.adapts):
        found.append(Pass("norms", frozenset({"gradients"})))
    if spec.adapts:
        found.append(Pass("norms", frozenset({"updates"} if apart else {"gradients", "updates"}), clipped=apart))
    if spec.projects:
        found.append(Pass("projection"))
    return (*found, Pass("update", clipped=apart))


def needs(spec: OptimizerSpec, groups: Sequence[Group]) -> frozenset[object]:
    """The states and passes that a step needs for the groups' options.

    A captured step can follow options whose needs are a subset of its own. A pass that is no longer needed does no
    harm: with an infinite limit clipping changes nothing.
    """
    found: set[object] = {(i, name) for i, group in enumerate(groups) for name in spec.used_states(group)}
    if spec.clips(groups):
        found.add("clipping")
        if any(map(spec.needs_clipped, groups)):
            found.add("norms of clipped gradients")
    return frozenset(found)
