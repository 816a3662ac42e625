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

from . import formulas

# Columns of a segment's row.
NUMEL = 0
FIRST_TILE = 1
FIRST_CHUNK = 2
CHUNK_TILES = 3  # tiles of a chunk; the tensor's last may have fewer
GROUP = 4
IS_VECTOR = 5  # 1: of one dimension or none
SEGMENT_WIDTH = 6

# Columns of a group's row: the recipe's fields in their order, then these.
LR_ADDRESS = len(formulas.ScheduleConstants._fields)  # of a device tensor that holds the LR
MILESTONES = LR_ADDRESS + 1  # this group's slice of the milestone table: begin,
MILESTONE_COUNT = LR_ADDRESS + 2  # and length
STATES = LR_ADDRESS + 3  # which states an update uses, a bit each; if any, it advances the tensor's own count
CLIP = LR_ADDRESS + 4  # the global norm to clip at; infinite: none
CLIP_DIVIDES = LR_ADDRESS + 5  # 1 for LAMB's clipping formula
EXEMPT_VECTORS = LR_ADDRESS + 6  # 1: tensors of one dimension or none are neither adapted nor decayed
HYPER = LR_ADDRESS + 7  # the fields of the rule's hyper-parameters in their order
_FIELDS = max(len(formulas.MomentumHyper._fields), len(formulas.AdamHyper._fields))
GROUP_WIDTH = -(-(HYPER + _FIELDS) // 4) * 4  # rows of whole sectors, of 32 bytes

# Rows of `partials`.
GRADIENT_NORM = 0
UPDATE_NORM = 1
WEIGHT_NORM = 2  # with carried norms this row and the next take turns

UNKNOWN = -1.0  # stands for the norm of a weight that no update has left
