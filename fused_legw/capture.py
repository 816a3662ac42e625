"""Tells whether a CUDA graph capture is running, and refuses work that it cannot record."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def capturing(device: torch.device) -> bool:
    """Whether work on the device's current stream is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # is_current_stream_capturing covers the current device only
        return torch.cuda.is_current_stream_capturing()


def any_capturing(devices: Iterable[torch.device]) -> bool:
    return any(map(capturing, devices))


def refuse(devices: Iterable[torch.device], reason: str) -> None:
    """Raise RuntimeError where any of these devices is capturing."""
    if any_capturing(devices):
        raise RuntimeError(f"{reason}: run optimizer.step() eagerly once before capturing it into a graph")
