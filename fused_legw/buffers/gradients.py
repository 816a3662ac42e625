"""Reads the gradients of a step, and notices whether their layout is that of the last step.

Every step has new gradients. Mostly the same parameters have one, with the same types, dtypes, devices, shapes and
strides: the same layout. Results that depend on the layout alone are kept until it changes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain, compress, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import SUPPORTED_DTYPES
from ..spec import Group, OptimizerSpec
from ..torch_private import TensorGuards
from .bucket import STEP, Bucket
from .state import StateViews

_DTYPE_OF, _DEVICE_OF = operator.attrgetter("dtype"), operator.attrgetter("device")
_PLAIN_KINDS, _PLAIN_DTYPES = {Tensor, type(None)}, set(SUPPORTED_DTYPES)


class PythonGuards:
    """A slower substitute for torch's `TensorGuards`, for versions of torch without that class."""

    def __init__(self, *tensors: Tensor, **_: Any) -> None:
        self._seen = self._see(tensors)

    @staticmethod
    def _see(tensors: Sequence[Tensor]) -> list[list[Any]]:
        return [list(map(of, tensors)) for of in (type, Tensor.size, Tensor.stride, _DTYPE_OF, _DEVICE_OF)]

    def check(self, *tensors: Tensor) -> bool:
        try:
            return self._see(tensors) == self._seen
        except (RuntimeError, TypeError):  # a tensor without strides
            return False


class GradientLayout:
    """Which gradients of a list are not None, and their types, dtypes, devices, shapes and strides."""

    guards: Any = TensorGuards or PythonGuards

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        """Does not keep the gradients."""
        self._there = self._which(gradients)
        self._all = all(self._there)
        present = compress(gradients, self._there)
        self._guards = self.guards(*present, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    @staticmethod
    def _which(gradients: Sequence[Tensor | None]) -> list[bool]:
        return list(map(operator.is_not, gradients, repeat(None)))

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these gradients have this layout. There must be as many."""
        if self._all:
            return bool(self._guards.check(*gradients))
        there = self._which(gradients)
        return there == self._there and bool(self._guards.check(*compress(gradients, there)))


def _plain(bucket: Bucket, gradients: list[Tensor | None]) -> bool:
    """Whether kernels can read every gradient as it is, in the order of its parameter's elements."""
    kinds = set(map(type, gradients))
    if not kinds <= _PLAIN_KINDS:
        return False
    seen: list[Any] = gradients
    if type(None) in kinds:
        seen = [t if g is None else g for t, g in zip(bucket.tensors, gradients, strict=True)]
    try:
        return (
            bucket.in_order(seen)
            and set(map(_DTYPE_OF, seen)) <= _PLAIN_DTYPES
            and set(map(_DEVICE_OF, seen)) <= {bucket.device}
        )
    except RuntimeError:  # sparse tensors have no strides
        return False


def in_layout_of(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of its segment's tensor. A copy if it is expanded, transposed, sliced, ..."""
    if gradient.stride() == tensor.stride() or (gradient.is_contiguous() and tensor.is_contiguous()):
        return gradient
    shape, strides = tensor.shape, tensor.stride()
    return torch.empty_strided(shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


class GradientSet(NamedTuple):
    """The gradients that one step uses."""

    by_bucket: list[list[Tensor | None]]  # an entry per segment, in its tensor's layout; None: it does not move
    moving: list[Tensor]  # the parameters with a gradient
    generation: int  # grows by one whenever the layout differs from the last step's


class GradientReader:
    """Reads the gradients of the parameters in some buckets, and shows the state that their updates need."""

    def __init__(self, spec: OptimizerSpec, groups: list[Group], buckets: Sequence[Bucket], views: StateViews) -> None:
        self._spec, self._groups, self._buckets, self._views = spec, groups, buckets, views
        self._used = list[tuple[str, ...]]()  # names of the state that each group used in the last step
        self._options: int | None = None  # the options' generation when `_used` was made
        self._layouts = list[GradientLayout]()  # the last layout of each bucket, if all gradients were used unchanged
        self._moving = list[Tensor]()  # the parameters that had these gradients
        self._generation = 0

    def read(self, frozen: set[int], options: int, *, checked: bool = False) -> GradientSet | None:
        """The current gradients. None if one must be converted first and they are not `checked` yet.

        frozen: groups whose state is created, but which do not move.
        options: the options' generation, a number that grows whenever an option of any group changes.
        """
        raw: list[list[Tensor | None]] = [[p.grad for p in bucket.params] for bucket in self._buckets]
        if not frozen and self.alike(raw):
            self._show_state(raw, options)
            return GradientSet(raw, self._moving, self._generation)
        plain = all(map(_plain, self._buckets, raw))
        if not (plain or checked):
            return None
        self._show_state(raw, options)
        self._generation += 1
        unchanged = plain and not frozen
        self._layouts = list(map(GradientLayout, raw)) if unchanged else []
        found = raw if unchanged else [*map(self._of_moving, self._buckets, raw, repeat(frozen))]
        params = chain.from_iterable(bucket.params for bucket in self._buckets)
        self._moving = [p for p, g in zip(params, chain.from_iterable(found), strict=True) if g is not None]
        return GradientSet(found, self._moving, self._generation)

    def alike(self, raw: list[list[Tensor | None]]) -> bool:
        """Whether gradients have the layout of the last step, whose gradients were all used unchanged."""
        return bool(self._layouts) and all(map(GradientLayout.fits, self._layouts, raw))

    def _show_state(self, raw: list[list[Tensor | None]], options: int) -> None:
        """Let optimizer.state show the state that parameters with a gradient need."""
        if options != self._options:
            self._options = options
            step = (STEP,) if self._spec.counts_steps else ()
            used = [(*self._spec.used_states(group), *step) for group in self._groups]
            if used != self._used:
                self._used = used
                for bucket in self._buckets:
                    bucket.waiting.update(range(len(bucket.segments)))
        for bucket, gradients in zip(self._buckets, raw, strict=True):
            for i in [i for i in bucket.waiting if gradients[i] is not None]:
                self._views.show(bucket, bucket.segments[i], self._used[bucket.segments[i].group])
                bucket.waiting.remove(i)

    @staticmethod
    def _of_moving(bucket: Bucket, raw: list[Tensor | None], frozen: set[int]) -> list[Tensor | None]:
        gradients = list[Tensor | None]()
        for segment, g in zip(bucket.segments, raw, strict=True):
            segment.requested |= g is not None and segment.group in frozen
            moves = g is not None and segment.group not in frozen
            gradients.append(in_layout_of(segment.tensor, g) if moves and g is not None else None)
        return gradients
