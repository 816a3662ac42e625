"""Flat buffers: the parameters of one (device, dtype) and their state, each tensor a segment that starts on a tile.

A segment's parameter lives in the bucket's weight buffer. It stays where it is with flatten=False, or if something else
holds its storage too (cuDNN's RNN weights, a user's tensor), which would keep a stale copy. State and masters always
live in flat buffers. Kernels reach parameters and gradients by address, so one launch updates both kinds. A parameter
whose elements do not fill its memory, such as a slice, is updated through a dense copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import is_dense
from ..torch_private import foreach_copy_
from . import memory

MASTER = "master_param"
STEP = "step"
MOST_CHUNKS = 4096


@dataclass
class Segment:
    """One parameter's place in its bucket."""

    param: Tensor
    tensor: Tensor  # what an update reads and writes: the parameter, or the dense copy of one with gaps
    group: int  # index into param_groups
    first_tile: int
    first_chunk: int
    chunk_tiles: int  # tiles of a chunk
    place: tuple[object, ...] = ()  # `place_of` the parameter when it was adopted
    state: dict[str, Tensor] = field(default_factory=dict)  # live views with the tensor's shape and strides
    shown: set[str] = field(default_factory=set)  # names of the views that optimizer.state holds
    requested: bool = False  # whether a step at LR 0 created the state on purpose

    @property
    def moved(self) -> bool:
        """Whether the parameter has other memory than when adopted, after `model.to` or `p.data = ...`."""
        return place_of(self.param) != self.place


def place_of(p: Tensor) -> tuple[object, ...]:
    return p.data_ptr(), p.dtype, p.device, p.shape, p.stride()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, state and masters for parameters of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_tiles(tiles: int, dtype: torch.dtype) -> int:
    """The tiles in a chunk. They share one partial norm, and the scalars of one update.

    Depends on the tensor alone, so that its norm has the same bits whatever other tensors there are. At least 4, for
    fewer partial norms. At most 4,096 chunks per tensor, because every program that updates it sums all of them. In
    float64 a single tile, because a sum of squares over several could overflow.
    """
    if dtype == torch.float64:
        return 1
    size = 4
    while size * MOST_CHUNKS < tiles:
        size *= 2
    return size


class Bucket:
    """The parameters of one (device, dtype), in param-group order, and their flat buffers."""

    def __init__(self, params: Sequence[tuple[Tensor, int]], tile: int, tables_device: torch.device) -> None:
        """params: each parameter and its index into param_groups. tables_device: where kernels read their tables."""
        first = params[0][0]
        self.device, self.dtype, self.tile = first.device, first.dtype, tile
        self.params = [p for p, _ in params]
        self.segments: list[Segment] = []  # one per parameter
        self.n_tiles = 0  # of all segments
        owner: list[int] = []
        for i, (p, group) in enumerate(params):
            tiles = self._tiles_of(p)
            size = chunk_tiles(tiles, self.dtype)
            tensor = p if is_dense(p) else torch.empty_like(p, requires_grad=False)
            self.segments.append(Segment(p, tensor, group, self.n_tiles, len(owner), size))
            owner += [i] * -(-tiles // size)
            self.n_tiles += tiles
        self._gaps = [i for i, segment in enumerate(self.segments) if segment.tensor is not segment.param]
        self._dense = [self.segments[i].tensor for i in self._gaps]  # the copies of the parameters with gaps
        self.tensors = [segment.tensor for segment in self.segments] if self._gaps else self.params
        # On tables_device:
        self.chunks = torch.tensor(owner, dtype=torch.int32, device="cpu").to(tables_device)  # the segment of each
        self.tensor_steps = torch.zeros(len(params), dtype=torch.int64, device=tables_device)  # updates, per segment
        self.torch_steps: Tensor | None = None  # the same as float32, if optimizer.state has a "step"
        self.waiting = set(range(len(params)))  # segments whose state optimizer.state does not hold yet
        self.weights: Tensor | None = None  # the flat buffer of the parameters that may move
        self.state: dict[str, Tensor] = {}  # flat buffers by name, in the compute dtype; MASTER: the masters

    def _tiles_of(self, p: Tensor) -> int:
        return -(-p.numel() // self.tile)

    def padded(self, segment: Segment) -> int:
        """Elements that a segment takes in a flat buffer."""
        return self._tiles_of(segment.param) * self.tile

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_state(self, name: str) -> None:
        """Add a flat buffer for one kind of state, with a view for each segment. Zeros, except for masters."""
        if name in self.state:
            return
        size = self.n_tiles * self.tile
        self.state[name] = torch.zeros(size, dtype=compute_dtype(self.dtype), device=self.device)
        for segment in self.segments:
            segment.state[name] = memory.part(self.state[name], segment.first_tile * self.tile, segment.tensor)
            if name == MASTER:
                segment.state[name].copy_(segment.param)

    def show_steps(self) -> None:
        """Give each segment a view of its update count in torch's form: a float32, which stops at 2^24."""
        self.torch_steps = torch.zeros(len(self.segments), dtype=torch.float32, device=self.tensor_steps.device)
        scalar = torch.empty((), dtype=torch.float32, device="meta")
        for i, segment in enumerate(self.segments):
            segment.state[STEP] = memory.part(self.torch_steps, i, scalar)

    def set_steps(self, steps: Sequence[int]) -> None:
        """Write every segment's update count."""
        self.tensor_steps.copy_(torch.tensor(steps, dtype=torch.int64, device="cpu"))
        if self.torch_steps is not None:
            self.torch_steps.copy_(self.tensor_steps)

    def set_steps_of(self, rows: slice | list[int], steps: int) -> None:
        """Write one update count for some segments."""
        for column in (self.tensor_steps, self.torch_steps):
            if column is not None:
                column.numpy()[rows] = steps  # ten times as fast as assigning to the tensor

    def steps_are_ours(self) -> bool:
        """Whether no other code has written to a "step"."""
        return self.torch_steps is None or torch.equal(self.tensor_steps.float(), self.torch_steps)

    def exact_steps(self) -> list[int]:
        """Each segment's update count, or the number that other code wrote to its "step". Reads the device."""
        if self.torch_steps is None:
            return self.tensor_steps.tolist()
        same = self.tensor_steps.float() == self.torch_steps
        return torch.where(same, self.tensor_steps, self.torch_steps.long()).tolist()

    def adopt(self, movable: Sequence[Tensor]) -> None:
        """Move these parameters of the bucket into a new buffer, and note where each parameter is.

        Peak memory: the buffer plus the parameters, whose old storages are then freed one by one.
        """
        if movable:
            size = sum(map(self._tiles_of, movable)) * self.tile
            self.weights = torch.zeros(size, dtype=self.dtype, device=self.device)
            memory.register(self.weights)
        offset = 0
        for p in movable:
            assert self.weights is not None
            memory.move(p, self.weights, offset)
            offset += self._tiles_of(p) * self.tile
        self.note_places()

    def share_weights(self, earlier: Iterable[Bucket]) -> None:
        """Take over the buffer of an earlier bucket, if the first parameter lives in it."""
        place = self.params[0].data_ptr()
        for weights in [bucket.weights for bucket in earlier if bucket.weights is not None]:
            if (weights.device, weights.dtype) == (
                self.device,
                self.dtype,
            ) and 0 <= place - weights.data_ptr() < weights.nbytes:
                self.weights = weights

    def note_places(self) -> None:
        """Remember where each parameter is now."""
        for segment in self.segments:
            segment.place = place_of(segment.param)
        self._places = list(map(Tensor.data_ptr, self.params))
        self.addresses = list(map(Tensor.data_ptr, self.tensors)) if self._gaps else self._places
        self._strides = list(map(Tensor.stride, self.tensors))
        self._sizes = list(map(Tensor.numel, self.tensors))
        self._contiguous = all(map(Tensor.is_contiguous, self.tensors))

    def read_gaps(self) -> None:
        """Bring the dense copies of parameters with gaps up to date, before an update."""
        if self._gaps:
            foreach_copy_(self._dense, [self.params[i] for i in self._gaps])

    def write_gaps(self, gradients: Sequence[Tensor | None]) -> None:
        """Write the dense copies of those with a gradient back to their parameters, after an update."""
        for i in self._gaps:
            if gradients[i] is not None:
                self.params[i].copy_(self.tensors[i])

    # Every step runs the checks below, so each is a few passes at the speed of C, without a Python call per tensor.
    # They do not notice a new shape at the same address, but the gradient that then comes has that shape too.

    @property
    def moved(self) -> bool:
        """Whether a parameter's memory is no longer where it was."""
        return list(map(Tensor.data_ptr, self.params)) != self._places

    def in_order(self, tensors: list[Tensor]) -> bool:
        """Whether each tensor, one per segment, has the size of the segment's and its elements in the same order.

        Raises:
            RuntimeError: a tensor is sparse and so has no strides.
        """
        ordered = (
            all(map(Tensor.is_contiguous, tensors))
            if self._contiguous
            else list(map(Tensor.stride, tensors)) == self._strides
        )
        return ordered and list(map(Tensor.numel, tensors)) == self._sizes
