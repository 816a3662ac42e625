"""Which passes a step has, as data. Each pass is a launch per kernel on every device; order comes from launches alone.

    SGD, Adam, AdamW        update
    LARS                    norms (of gradients and updates), update
    LAMB                    norms (of gradients and updates, and the moments advance), update
    AdamP                   projection, update

With clipping or `skip_nonfinite`, and with our GradScaler, a step needs the global norm before it updates anything.
LARS takes it in its norm pass. The others have a pass of their own for it, which stands first. LARS has one too where
it clips and its ratio needs clipped gradients: the norm of clipped gradient plus decay is summed directly (three
expanded sums would cancel), and so only once the clip factor is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..spec import Group, OptimizerSpec


class Pass(NamedTuple):
    """One pass over all tensors."""

    kind: str  # "norms", "projection" or "update"
    of: frozenset[str] = frozenset()  # what a norm pass takes norms of: "gradients"; "updates", and weights with them
    clipped: bool = False  # a norm pass reads clipped gradients; an update's trust ratios are of such norms


def passes(spec: OptimizerSpec, groups: Sequence[Group], *, clips: bool, global_norm: bool) -> tuple[Pass, ...]:
    """The passes of one step in their order. clips: some group clips. global_norm: clipping or skipping asks for it."""
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
    """What the groups' options need of a step beyond values in the group table: states and passes.

    A captured step can go on with options that need no more than it has. What they need less is a value to it: a limit
    of infinity clips nothing.
    """
    found: set[object] = {(i, name) for i, group in enumerate(groups) for name in spec.used_states(group)}
    if spec.clips(groups):
        found.add("clipping")
        if any(map(spec.needs_clipped, groups)):
            found.add("norms of clipped gradients")
    return frozenset(found)
