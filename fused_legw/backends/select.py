"""Selects the backend of a device, and says why."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

BACKENDS = "aten", "triton"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter. They then take tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def explain_backend(device: torch.device, wanted: str | None = None) -> tuple[str, str]:
    """(name of the backend for a device, the reason).

    Raises:
        ValueError: the wanted backend is unknown or cannot run on the device.
    """
    if wanted not in (None, "triton", "aten"):
        raise ValueError(f"backend must be 'triton', 'aten' or None, got {wanted!r}")
    if wanted == "aten":
        return "aten", "requested"
    if not has_triton():
        problem = "triton is not installed"
    elif interpreted():
        return "triton", "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    elif device.type != "cuda":
        problem = f"Triton's kernels need a GPU, not {device.type!r} tensors, unless TRITON_INTERPRET=1 is set"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        problem = "the kernels need compute capability 8.0 or higher"
    else:
        return "triton", "a GPU that Triton compiles for"
    if wanted == "triton":
        raise ValueError(f"backend='triton' cannot run on {device}: {problem}")
    return "aten", problem
