"""The tables that the kernels read: their columns.

segments   int64, a row per tensor: how long it is, where its tiles and chunks begin, which group
addresses  int64[2, tensors]: of each parameter's first element and its gradient's (0: it has none this time; -1: it is
           in another launch); the one table that may change every step
chunks     int32, one entry per chunk, some tiles of one tensor: the tensor it belongs to
groups     float64, a row per param group: where the LR comes from, then clipping, then the hyper-parameters
step_counts    int64[2]: updates applied on this device, the t of the schedule; steps skipped
tensor_steps   int64, one per tensor: its own counted updates
torch_steps    float32, one per tensor: the same, as torch shows it in optimizer.state["step"]; or None
ticket     int32[1], zero between launches
partials   float64[3, chunks]: norms of each chunk of the gradient (without AMP's scale), the update, the weight; with
           carried norms a fourth row, for the weight after the update
turn       int32[1]: whether the weights' norms as they are now are in the third row or the fourth; or None
totals     float64: norms of other devices' gradients, then of what each program measured on this one
ratios     float64, one per tensor: its trust ratio
"""

from typing import Any

import triton.language as tl

# Columns of a segment's row.
NUMEL = tl.constexpr(0)
FIRST_TILE = tl.constexpr(1)
FIRST_CHUNK = tl.constexpr(2)
CHUNK_TILES = tl.constexpr(3)  # tiles of a chunk; the tensor's last may have fewer
GROUP = tl.constexpr(4)
IS_VECTOR = tl.constexpr(5)  # 1: of one dimension or none
SEGMENT_WIDTH = tl.constexpr(6)

# Columns of a group's row: the recipe's fields in their order, then these.
LR_ADDRESS = tl.constexpr(10)  # of a device tensor that holds the LR
MILESTONES = tl.constexpr(11)  # this group's slice of the milestone table: begin,
MILESTONE_COUNT = tl.constexpr(12)  # and length
STATES = tl.constexpr(13)  # which states an update uses, a bit each; if any, it advances the tensor's own count
CLIP = tl.constexpr(14)  # the global norm to clip at; infinite: none
CLIP_DIVIDES = tl.constexpr(15)  # 1 for LAMB's clipping formula
EXEMPT_VECTORS = tl.constexpr(16)  # 1: tensors of one dimension or none are neither adapted nor decayed
HYPER = tl.constexpr(17)  # the fields of the rule's hyper-parameters in their order
GROUP_WIDTH = tl.constexpr(36)

# Rows of `partials`.
GRADIENT_NORM = tl.constexpr(0)
UPDATE_NORM = tl.constexpr(1)
WEIGHT_NORM = tl.constexpr(2)  # with carried norms this row and the next take turns

UNKNOWN = tl.constexpr(-1.0)  # stands for the norm of a weight that no update has left

NORMS_BLOCK = tl.constexpr(256)  # norms that are added up at a time


def columns(hyper: Any, *fields: str) -> list[tl.constexpr]:
    """The columns of hyper-parameters in a group's row, from its first on."""
    return [tl.constexpr(hyper._fields.index(field)) for field in fields]
