"""Tensor arithmetic of the ATen backend: joined tensors, scaling and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..torch_private import foreach_mul, foreach_zero_

_ROW, _SMALL = 256, 4096  # `norms` sums rows of _ROW elements first, but not in tensors below _SMALL elements


@dataclass
class Joined:
    """Tensors that follow one another in one tensor, each padded to whole tiles.

    ATen starts its threads once per large tensor, and its fused kernels even for small ones. A start costs as much as
    about 100,000 elements, so operations on all of the tensors use `whole`.
    """

    whole: Tensor
    views: list[Tensor]  # the tensors, in their shapes
    tile: int  # in elements

    def __post_init__(self) -> None:
        ends = list(accumulate(-(-x.numel() // self.tile) * self.tile for x in self.views))
        self._starts = [0, *ends[:-1]]
        every = zip(self.views, self._starts, ends, strict=True)
        self._pads = [self.whole[start + x.numel() : end] for x, start, end in every if start + x.numel() < end]

    @classmethod
    def like(cls, tensors: Sequence[Tensor], buffer: Tensor, tile: int) -> Joined:
        """Room for tensors of these shapes and strides at the start of a buffer."""
        ends = [0, *accumulate(-(-x.numel() // tile) * tile for x in tensors)]
        views = [buffer.as_strided(x.shape, x.stride(), at) for x, at in zip(tensors, ends, strict=False)]
        return cls(buffer[: ends[-1]], views, tile)

    def parts(self, whole: bool) -> list[Tensor]:
        """A list of the one whole tensor, or of the views."""
        return [self.whole] if whole else self.views

    def clear_padding(self) -> None:
        if self._pads:
            foreach_zero_(self._pads)

    def norms(self) -> list[float]:
        """`norms` of the views, with the same bits. The padding may hold anything."""
        if self.tile % _ROW or not len(self.whole):
            return norms(self.views)
        rows = torch.linalg.vector_norm(self.whole.view(-1, _ROW), dim=1)
        return norms(self.views, [rows[start // _ROW :] for start in self._starts])


@dataclass
class AtenBatch:
    """The tensors of one group, dtype and update count that ATen updates together. Lists: an entry per parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]  # for each of the spec's states; empty where the group does not use it
    count: int  # earlier updates of these tensors
    scale: float  # factor on the gradients, for clipping and AMP
    joined: Joined | None = None  # the parameters, if they follow one another
    # If the spec is two-stage:
    gathered: Joined | None = None  # a copy of the gradients
    scratch: Joined | None = None  # memory for the updates
    whole: bool = False  # each list in `states` holds one tensor, in which all states follow one another
    # If the spec adapts:
    exempts_vectors: bool = False  # tensors of one dimension or none have neither a trust ratio nor weight decay
    g_norms: list[float] = field(default_factory=list)  # norms of the scaled gradients
    w_norms: list[float] = field(default_factory=list)  # norms of the weights
    ratios: list[float] = field(default_factory=list)  # trust ratios, filled in by the update


def scaled(grads: list[Tensor], factor: float) -> list[Tensor]:
    """The gradients times a factor, in new memory; the same tensors if it is 1."""
    return grads if factor == 1 else list(foreach_mul(grads, factor))


def norms(tensors: Sequence[Tensor], of_rows: Sequence[Tensor] = ()) -> list[float]:
    """The L2 norm of each dense tensor, to 1e-7. Does not overflow if the values are finite.

    Sums are in float64, which is slow. So large tensors are first cut into short rows, whose norms are taken in the
    tensor's own dtype.
    of_rows: the norms of each tensor's rows, if known; there may be more than needed.
    """
    parts, lengths = [], []
    for i, x in enumerate(tensors):
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        rows, left = 0, x.numel()
        if left >= _SMALL:
            rows, left = divmod(left, _ROW)
            if of_rows:
                parts.append(of_rows[i][:rows])
            else:
                parts.append(torch.linalg.vector_norm(x.as_strided((rows, _ROW), (_ROW, 1)), dim=1))
        if left:
            parts.append(x.as_strided((left,), (1,), x.storage_offset() + rows * _ROW))
        lengths.append(rows + left)
    if not parts:
        return [0.0] * len(tensors)
    squares = torch.cat(parts).to("cpu", torch.float64).square_()
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    sums = torch.segment_reduce(squares, "sum", lengths=counts, unsafe=True)
    plain: list[float] = sums.sqrt_().tolist()
    return [y if 1e-12 < y < 1e18 else norm(x) for x, y in zip(tensors, plain, strict=True)]


def norm(x: Tensor) -> float:
    """The L2 norm in float64. Does not overflow if the values are finite."""
    plain = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    if 1e-140 < plain < 1e150 or x.numel() == 0:
        return plain
    largest = float(x.abs().max())
    if not 0 < largest < math.inf:
        return largest
    return float(torch.linalg.vector_norm(x.double() / largest)) * largest
