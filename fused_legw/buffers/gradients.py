"""Flat buffers: the parameters of one (device, dtype) and their state, each tensor a segment that starts on a tile.

A segment's parameter lives in the bucket's weight buffer, or stays where it is: with flatten=False, and where something
else holds its storage too (cuDNN's RNN weights, a user's tensor), which would be left with a stale copy.
State and masters always live in flat buffers of ours. Kernels reach parameters and gradients by address, so both kinds
are updated by the same launch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor


def in_layout_of(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its parameter's strides: itself, or a copy where it is expanded, transposed, sliced, ..."""
    if gradient.stride() == p.stride() or (gradient.is_contiguous() and p.is_contiguous()):
        return gradient
    return torch.empty_strided(p.shape, p.stride(), dtype=gradient.dtype, device=gradient.device).copy_(gradient)


_DTYPE_OF, _DEVICE_OF = operator.attrgetter("dtype"), operator.attrgetter("device")


class _Compared:
    """Stands in for torch's `TensorGuards`, in Python's time."""

    def __init__(self, *tensors: Tensor, **_: Any) -> None:
        self._seen = self._see(tensors)

    @staticmethod
    def _see(tensors: Sequence[Tensor]) -> list[list[Any]]:
        return [list(map(of, tensors)) for of in (type, Tensor.size, Tensor.stride, _DTYPE_OF, _DEVICE_OF)]

    def check(self, *tensors: Tensor) -> bool:
        try:
            return self._see(tensors) == self._seen
        except (RuntimeError, TypeError):  # something without strides
            return False


_Guards: Any = _Compared


with suppress(ImportError, AttributeError, TypeError):  # one call of C for all of them; torch.compile's, and private
    from torch._C._dynamo.guards import TensorGuards

    TensorGuards(dynamic_dims_sizes=None, dynamic_dims_strides=None).check()
    _Guards = TensorGuards


class Look:
    """Which of a list of gradients there are, and the types, dtypes, devices, shapes and strides of those."""

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients themselves are not kept."""
        self._there = self._which(gradients)
        self._all = all(self._there)
        present = compress(gradients, self._there)
        self._guards = _Guards(*present, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    @staticmethod
    def _which(gradients: Sequence[Tensor | None]) -> list[bool]:
        return list(map(operator.is_not, gradients, repeat(None)))

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these, as many as there were, look the same."""
        if self._all:
            return bool(self._guards.check(*gradients))
        there = self._which(gradients)
        return there == self._there and bool(self._guards.check(*compress(gradients, there)))
