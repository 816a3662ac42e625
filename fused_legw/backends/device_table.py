"""Small tables that the host writes and kernels read. Uploaded only when changed, and safe in graph captures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import capture


class _Staging:
    """A pinned host buffer that is not rewritten during its asynchronous copy."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(numel, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def copy(self, values: Sequence[float], to: Tensor, *, captured: bool = False) -> None:
        if self._copied is not None and not captured:
            self._copied.synchronize()
        self._buffer.copy_(torch.tensor(values, dtype=self._buffer.dtype, device="cpu"))
        to.copy_(self._buffer, non_blocking=True)
        if self._copied is not None and not captured:
            self._copied.record(torch.cuda.current_stream(to.device))


class DeviceTable:
    """A table of fixed size on one device.

    shared=False: each graph capture gets a device table and a pinned source of its own, because replays repeat the
    captured upload. An eager write makes both beforehand, and they are never written again.
    shared=True: eager steps and replays read the same table. A capture does not upload, so an eager step must have
    written the values before.
    """

    prepares_captures = torch.cuda.is_available()

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> None:
        self._key = numel, dtype, device
        self.device_table = torch.zeros(numel, dtype=dtype, device=device)
        self._staging = [_Staging(*self._key), _Staging(*self._key)]  # written in turn
        self._values: Sequence[float] | None = None  # the values on the device
        self._shared = shared
        self._spare: tuple[Tensor, _Staging] | None = None  # for the next capture
        self._captured: list[tuple[Tensor, _Staging]] = []  # kept alive, because graphs may replay their upload

    @property
    def captured(self) -> bool:
        """Whether a graph may still replay an upload of this table."""
        return bool(self._captured)

    def write(self, values: Sequence[float]) -> Tensor:
        """Upload the values. Returns the device table, for kernels launched next on the current stream."""
        device = self._key[2]
        if capture.capturing(device):
            return self._write_captured(values)
        if self.prepares_captures and not self._shared and self._spare is None:
            self._spare = torch.zeros_like(self.device_table), _Staging(*self._key)
        if values != self._values:
            self._staging.reverse()
            self._staging[0].copy(values, self.device_table)
            self._values = values
        return self.device_table

    def _write_captured(self, values: Sequence[float]) -> Tensor:
        if self._shared:
            if values != self._values:
                raise RuntimeError(
                    "run one eager step before the capture: a hyper-parameter in param_groups changed since the last "
                    "one"
                )
            return self.device_table
        if self._spare is None:
            raise RuntimeError("optimizer.step() must run eagerly once before each graph capture of it")
        table, staging = self._spare
        self._spare = None
        self._captured.append((table, staging))
        staging.copy(values, table, captured=True)
        return table
