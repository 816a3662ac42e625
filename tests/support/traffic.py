"""What a kernel does to global memory, seen in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Traffic:
    """bytes: read and written, masked lanes not counted. wide: addresses of unmasked accesses of whole tiles."""

    bytes: int = 0
    wide: list[int] = field(default_factory=list)

    def add(self, pointers, mask: np.ndarray | None) -> None:
        lanes = pointers.data.size if mask is None else int(np.count_nonzero(mask))
        self.bytes += lanes * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if mask is None and pointers.data.size > 1:
            self.wide.append(int(pointers.data.flat[0]))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what kernels load and store while the context is open."""
    traffic = Traffic()
    original = {name: getattr(InterpreterBuilder, name) for name in dir(InterpreterBuilder) if name in _ACCESSES}
    inside = False

    def wrap(name: str):
        def access(self, pointers, *args):
            nonlocal inside
            if not inside:  # an unmasked access calls the masked one
                masked = _ACCESSES[name]
                traffic.add(pointers, None if masked is None else args[masked].data)
            outer, inside = inside, True
            try:
                return original[name](self, pointers, *args)
            finally:
                inside = outer

        return access

    try:
        for name in _ACCESSES:
            setattr(InterpreterBuilder, name, wrap(name))
        yield traffic
    finally:
        for name, method in original.items():
            setattr(InterpreterBuilder, name, method)


# Name of the access -> where its mask stands after the pointers, if it has one.
_ACCESSES = {"create_load": None, "create_store": None, "create_masked_load": 0, "create_masked_store": 1}
