"""CUDA graphs: on a GPU real ones, elsewhere a fake one that records calls and replays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fused_legw import capture
from fused_legw.backends import device_table
from tests.support.machine import DEVICE


class Recorded:
    """Kernel launches and table uploads, with their arguments as they were: what a graph keeps."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for run in self.work:
            run()


@contextmanager
def _recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Nothing runs while recording; uploads read their source again at each replay, as a captured copy does."""
    from legw_kernels import launch

    graph = Recorded()

    def upload(self, values, to: Tensor, *, captured: bool = False) -> None:
        assert captured, "an eager table must not be uploaded in a capture"
        self._buffer.copy_(torch.tensor(values, dtype=self._buffer.dtype))
        graph.work.append(lambda: to.copy_(self._buffer))

    run = launch.launch
    with monkeypatch.context() as patch:
        patch.setattr(capture, "capturing", lambda device: True)
        patch.setattr(device_table._Staging, "copy", upload)
        patch.setattr(launch, "launch", lambda *args, **constants: graph.work.append(lambda: run(*args, **constants)))
        yield graph


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded | torch.cuda.CUDAGraph]:
    if DEVICE != "cuda":
        with _recording(monkeypatch) as graph:
            yield graph
    else:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            yield graph


@pytest.fixture(autouse=True)
def spares(monkeypatch):
    """Off the GPU eager steps must prepare for captures too."""
    if DEVICE != "cuda":
        monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)


def constant_gradients(params: list[Tensor], value: float) -> list[Tensor]:
    for p in params:
        p.grad = torch.full_like(p, value)
    return [p.grad for p in params]
