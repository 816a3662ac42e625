"""Whether work is being captured into a CUDA graph."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether work on the device's current stream is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # whose current stream is asked
        return torch.cuda.is_current_stream_capturing()
