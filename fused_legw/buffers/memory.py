"""Memory of the flat buffers: tensors in a buffer with a storage of their own, and which parameters live in a buffer.

Every tensor in a buffer gets a storage that is exactly as large as the tensor, through DLPack. So whatever takes one
storage for one tensor, or writes whole storages to a file, sees an ordinary tensor: torch.save, pickle, safetensors.
No such storage can be resized: helpers that free a tensor by resizing its storage get an error, and no other tensor
loses its memory. Each storage keeps its buffer alive.

A parameter may outlive the optimizer that moved it, and have several optimizers. So whether it lives in a buffer is
asked of all live buffers in the process, by its address.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private import storage_uses


class _Span(NamedTuple):
    """The addresses of a buffer of parameters."""

    device: torch.device
    begin: int
    end: int
    storage: StorageWeakRef  # expires when the last tensor in the buffer is gone


_spans: list[_Span] = []  # of the live buffers, and of some that are gone
# The parameters that `unflatten` took out of a buffer and no optimizer has moved since, each with the call's number.
_taken_out: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
_calls = 0  # of `unflatten` so far


def part(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """The tensor at `offset` of a buffer with the shape and strides of the dense tensor `like`, and its own storage."""
    elements = buffer[offset : offset + like.numel()]
    # As a capsule, which is three times as fast as the tensor itself. as_strided, because DLPack may change strides of
    # dimensions of size 1.
    return from_dlpack(to_dlpack(elements)).as_strided(like.shape, like.stride())


def register(buffer: Tensor) -> None:
    """Note a buffer that parameters move into."""
    _spans[:] = [span for span in _spans if not span.storage.expired()]
    storage = buffer.untyped_storage()
    begin = storage.data_ptr()
    _spans.append(_Span(buffer.device, begin, begin + storage.nbytes(), StorageWeakRef(storage)))


def in_buffer(p: Tensor) -> bool:
    """Whether the parameter lives in a buffer of any optimizer of ours, this one or another, living or gone."""
    if not p.numel():
        return False
    address = p.data_ptr()
    return any(
        begin <= address < end and device == p.device and not storage.expired()
        for device, begin, end, storage in _spans
    )


def may_move(p: Tensor) -> bool:
    """Whether no other view, tensor, process, library or buffer refers to the parameter's storage.

    Any other holder would keep a stale copy. If in doubt, the parameter stays where it is.
    """
    storage = p.untyped_storage()
    return (
        p.numel() > 0
        and not in_buffer(p)
        and storage.nbytes() == p.numel() * p.element_size()
        and storage_uses(storage) <= 2  # by the parameter, and by `storage` here
        and storage.resizable()  # memory that torch did not allocate, such as NumPy's, is not
        and not (p.device.type == "cpu" and storage.is_shared())
    )


def move(p: Tensor, buffer: Tensor, offset: int) -> None:
    """Move a parameter into a buffer."""
    p.data = part(buffer, offset, p).copy_(p)
    _taken_out.pop(p, None)


def unflatten(params: Iterable[Tensor]) -> None:
    """Give every parameter that lives in a buffer an ordinary storage."""
    global _calls
    _calls += 1
    for p in params:
        if in_buffer(p):
            p.data = p.data.clone(memory_format=torch.preserve_format)
            _taken_out[p] = _calls


def now() -> int:
    """The time on the clock of `taken_out_since`."""
    return _calls


def taken_out_since(p: Tensor, made: int) -> bool:
    """Whether `unflatten` took the parameter out of a buffer since then. An optimizer made earlier leaves it there."""
    return _taken_out.get(p, 0) > made
