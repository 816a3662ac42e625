"""Where the tests run. Two gates, in two processes, because TRITON_INTERPRET is read when a kernel is decorated:

    TRITON_INTERPRET=1 pytest -m "not codegen"    values, on any machine
    pytest -m codegen                             legality and width of the compiled code, on any Linux machine

On a machine with a GPU plain `pytest` runs everything on it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.cases import make_params
from tests.support.machine import DEVICE, HAS_TRITON, INTERPRETED

torch.set_num_threads(1)  # tensors here are too small to share
if INTERPRETED:
    from tests.support.interpreter import make_faster

    make_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and "codegen" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="the interpreter compiles nothing"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["triton", "aten"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends, where they can run on `device`."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton's kernels need a GPU or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def triton_device(device: str) -> str:
    """A device whose tensors Triton's kernels can update."""
    if not HAS_TRITON:
        pytest.skip("Triton's kernels need a GPU or TRITON_INTERPRET=1")
    return device


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def params(request, device) -> list[Tensor]:
    return make_params(request.param, device)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """The kernel and the compile-time arguments of every launch."""
    from legw_kernels import launch

    seen: list[tuple[str, dict]] = []
    run = launch.launch

    def record(kernel, device, grid, *args, **constants):
        seen.append((kernel.fn.__name__, constants))
        run(kernel, device, grid, *args, **constants)

    monkeypatch.setattr(launch, "launch", record)
    return seen
