"""Every private name of torch that this package uses. `tests/contract/test_torch_private.py` fails when one changes.

Three classes also implement private protocols of torch, in their own files:

    FusedOptimizer      _step_supports_amp_scaling: whether torch.amp.GradScaler leaves unscaling to `step`
    GradScaler          _check_inf_per_device, _per_optimizer_states, _scale: the inf check of torch's scaler
    FollowSchedule      _step_count, _last_lr: attributes of torch's schedulers that other packages read
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

NormBase = _NormBase  # the base of batch and instance norm

# Arithmetic on lists of tensors, and whole optimizer steps, in one call each.
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_sqrt = torch._foreach_sqrt
foreach_zero_ = torch._foreach_zero_
fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_
fused_sgd_ = torch._fused_sgd_

# torch.compile's check of many tensors' types, dtypes, devices, shapes and strides, in one C call. None if this torch
# lacks the class or its arguments differ.
TensorGuards: Any = None
with suppress(ImportError, AttributeError, TypeError):
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

    _TensorGuards(dynamic_dims_sizes=None, dynamic_dims_strides=None).check()
    TensorGuards = _TensorGuards


def storage_uses(storage: torch.UntypedStorage) -> int:
    """The number of tensors and storages, in Python and C++, that hold this memory, including `storage`."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def version(p: Tensor) -> int:
    """The tensor's version counter: how often autograd was told that it changed."""
    return int(p._version)


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread. One inside another has the higher number of the two."""
    return int(torch._C._current_graph_task_id())


def has_scheduler(step: Callable[..., Any]) -> bool:
    """Whether a torch LR scheduler was made for the optimizer with this `step`; schedulers wrap the method."""
    return hasattr(step, "_wrapped_by_lr_sched")
