"""The checks that `fused-legw verify` runs: every fused optimizer on every backend of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..backends import select
from ..optim.adam import Adam, AdamW
from ..optim.adamp import AdamP
from ..optim.base import FusedOptimizer
from ..optim.lamb import LAMB
from ..optim.lars import LARS
from ..optim.sgd import SGD
from ..schedules.decays import Constant, Cosine, Exponential, MultiStep, Polynomial
from ..schedules.legw import LEGW
from .compare import verify

Result = dict[str, Any]
Job = tuple[str, str]  # case and dtype

# By name of the case: the class, its base LR, and its other arguments.
CASES: dict[str, tuple[type[FusedOptimizer], float, dict[str, Any]]] = {
    "SGD": (SGD, 0.05, dict(momentum=0.9, weight_decay=1e-3)),
    "LARS": (LARS, 2.0, dict(weight_decay=1e-3)),
    "Adam": (Adam, 2e-3, dict(weight_decay=1e-3)),
    "AdamW": (AdamW, 2e-3, dict()),
    "AdamP": (AdamP, 2e-3, dict(weight_decay=0.1, delta=0.5)),  # options with which many steps are projected
    "LAMB": (LAMB, 5e-3, dict()),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(300, 65), (4097,), (1024,), (), (64, 3, 3, 3), (1,), (1000,), (0,), (17, 19, 23)]

# For the interpreter, which takes milliseconds per tile: a few small tiles, full ones and others.
SMALL_SHAPES, SMALL_TILE = [(), (32,), (1,), (5, 9), (2, 3, 5), (31,), (8, 4), (0,)], 32


def _groups(params: Sequence[Any], base_lr: float, steps: int) -> list[dict[str, Any]]:
    """Param groups that cover every decay with a schedule each. `steps` updates run past the end of each schedule."""
    decays = (
        Constant(), MultiStep([2.5, 4, 6], 0.3), Exponential(0.7, 3), Exponential(0.7, 3, staircase=False),
        Polynomial(2), Polynomial(1.5, end_lr=base_lr / 50, span="whole"), Cosine(base_lr / 100),
    )  # fmt: skip
    size = 64 * steps // 10 + 5
    return [
        {
            "params": params[i :: len(decays)],
            "lr": LEGW(base_lr, 16, 0.3, batch_size=64, dataset_size=size, epochs=9, decay=decay),
        }
        for i, decay in enumerate(decays)
    ]


def _check_here(backend: str, device: str, steps: int, jobs: Sequence[Job]) -> Iterator[Result]:
    """The results of these (case, dtype) on one backend, in this process."""
    slow = backend == "triton" and select.interpreted()
    shapes, tile = (SMALL_SHAPES, {"tile": SMALL_TILE}) if slow else (SHAPES, {})
    for case, dtype in jobs:
        cls, base_lr, options = CASES[case]

        def make(params: list[Any], cls: Any = cls, lr: float = base_lr, options: Any = options) -> FusedOptimizer:
            optimizer: FusedOptimizer = cls(_groups(params, lr, steps), lr=lr, backend=backend, **tile, **options)
            return optimizer

        result = verify(make, shapes, steps, dtype=DTYPES[dtype], device=device)
        yield {"case": case, "device": device, "interpreted": slow, **result.to_dict()}


def _check_interpreted(steps: int, jobs: Sequence[Job]) -> Iterator[Result]:
    """Run each job in a process of its own, because Triton's interpreter must be on before kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fused_legw", "verify", "--json", "--backend", "triton", "--steps", str(steps)]

    def run(job: Job) -> list[Result]:
        own = ["--case", job[0], "--dtype", job[1]]
        done = subprocess.run(command + own, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not done.stdout:
            raise RuntimeError(f"{' '.join(command + own)} ended with {done.returncode}: {done.stderr}")
        results: list[Result] = json.loads(done.stdout)["results"]
        return results

    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        for results in pool.map(run, jobs):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(cases: Sequence[str] | None, dtypes: Sequence[str] | None, *, slow: bool) -> list[Job]:
    """The jobs to run, by default all. In the interpreter: float32, and two more dtypes for the first case."""
    some = {name: ["float32", "float64", "bfloat16"] if i == 0 else ["float32"] for i, name in enumerate(CASES)}
    return [(case, dtype) for case in cases or CASES for dtype in dtypes or (some[case] if slow else DTYPES)]


def check(
    steps: int,
    notes: list[str],
    *,
    backend: str | None = None,
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Result]:
    """The results of every case in every dtype on every backend of this machine.

    backend, cases, dtypes: run only these. notes: a list to which remarks for the reader are added.
    """
    if backend != "triton":
        yield from _check_here("aten", "cpu", steps, _jobs(cases, dtypes, slow=False))
    if backend == "aten":
        return
    device = "cuda" if torch.cuda.is_available() and not select.interpreted() else "cpu"
    usual, why = select.explain_backend(torch.device(device))
    if usual == "triton":
        yield from _check_here("triton", device, steps, _jobs(cases, dtypes, slow=select.interpreted()))
    elif select.has_triton():
        notes.append(f"No GPU for Triton's kernels here ({why}): they were checked in its interpreter.")
        yield from _check_interpreted(steps, _jobs(cases, dtypes, slow=True))
    else:
        notes.append(f"Only the ATen backend was checked: {why}.")
