"""State dicts as an earlier version wrote them, and how its runs went on from there.

`tests/fixtures/state_dicts_edb322c.pt` was written by this program at commit edb322c, with Triton's interpreter:

    TRITON_INTERPRET=1 PYTHONPATH=.:kernels python tests/support/old_state_dicts.py FILE

It uses nothing but public names, so it also runs at later commits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_legw as fl

FILE = Path(__file__).resolve().parents[1] / "fixtures/state_dicts_edb322c.pt"
BACKENDS = "aten", "triton"
SHAPES = [(5,), (3, 7), (40,), (), (0,), (16,), (2, 3, 3, 3)]
BEFORE, AFTER = 4, 5  # updates made before the state dict is written, and after it


def _legw(decay: Any, base_lr: float = 0.05) -> fl.LEGW:
    return fl.LEGW(base_lr, 16, 0.25, batch_size=64, dataset_size=256, epochs=5, decay=decay)


def _autowu() -> fl.AutoWU:
    schedule = fl.AutoWU(20, 4)
    for t in range(3):
        schedule.observe(2.0 - 0.25 * t)
    return schedule


# What a case is made of: the class, its LR, other options, and the parameters' dtype.
CASES: dict[str, tuple[type[Any], Callable[[], Any], dict[str, Any], torch.dtype]] = {
    "sgd": (fl.SGD, lambda: _legw(fl.Cosine()), dict(momentum=0.9, weight_decay=0.01, nesterov=True), torch.float32),
    "sgd, number": (fl.SGD, lambda: 0.05, dict(momentum=0.9, dampening=0.5), torch.float32),
    "sgd, float64": (fl.SGD, lambda: _legw(fl.MultiStep([1.0, 1.5])), dict(momentum=0.5), torch.float64),
    "sgd, clipped": (fl.SGD, lambda: _legw(fl.Constant()), dict(momentum=0.9, max_grad_norm=1.0), torch.float32),
    "adam, amsgrad": (fl.Adam, lambda: _legw(fl.Polynomial(2)), dict(amsgrad=True), torch.float32),
    "adamw, bfloat16": (fl.AdamW, lambda: _legw(fl.Exponential(0.5, 1)), dict(), torch.bfloat16),
    "adamw, autowu": (fl.AdamW, _autowu, dict(), torch.float32),
    "adamp": (fl.AdamP, lambda: _legw(fl.Cosine()), dict(weight_decay=0.1, delta=0.5), torch.float32),
    "lars": (fl.LARS, lambda: _legw(fl.Polynomial(2), 2.0), dict(weight_decay=1e-3), torch.float32),
    "lars, timm": (fl.LARS, lambda: _legw(fl.Cosine(), 2.0), dict(variant="timm", nesterov=True), torch.float32),
    "lars, carried": (fl.LARS, lambda: _legw(fl.Cosine(), 2.0), dict(carry_norms=True), torch.float16),
    "lamb": (fl.LAMB, lambda: _legw(fl.Polynomial(1.0)), dict(), torch.float32),
    "lamb, apex": (fl.LAMB, lambda: _legw(fl.Cosine()), dict(variant="apex"), torch.bfloat16),
}


def gradients(params: list[Tensor], step: int) -> None:
    """Gradients of exact values, the same on every machine; now and then one is None."""
    for i, p in enumerate(params):
        values = [((37 * j + 101 * step + 13 * i) % 257 - 128) / 64 for j in range(p.numel())]
        missing = (step + i) % 5 == 4
        p.grad = None if missing else torch.tensor(values, dtype=torch.float64).reshape(p.shape).to(p)


def fresh(case: str, backend: str) -> tuple[list[Tensor], Any]:
    """The parameters, and their optimizer: two groups, the second with a scale of its own where there is a schedule."""
    cls, lr, options, dtype = CASES[case]
    params = []
    for i, shape in enumerate(SHAPES):
        numel = torch.Size(shape).numel()
        values = [((53 * j + 29 * i) % 127 - 63) / 32 for j in range(numel)]
        params.append(torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype).requires_grad_())
    schedule = lr()
    groups: list[dict[str, Any]] = [{"params": params[:4], "lr": schedule}, {"params": params[4:], "lr": schedule}]
    if not isinstance(schedule, float):
        groups[1]["lr_scale"] = 0.5
    return params, cls(groups, lr=schedule, tile=16, backend=backend, **options)


def advance(params: list[Tensor], optimizer: Any, steps: range) -> None:
    for step in steps:
        gradients(params, step)
        optimizer.step()


def _write(case: str, backend: str) -> dict[str, Any]:
    params, optimizer = fresh(case, backend)
    advance(params, optimizer, range(BEFORE))
    if case == "sgd":
        optimizer.set_batch_size(128)
    written = {"state_dict": optimizer.state_dict(), "weights": [p.detach().clone() for p in params]}
    advance(params, optimizer, range(BEFORE, BEFORE + AFTER))
    after = {"state": optimizer.state_dict()["state"], "weights": [p.detach().clone() for p in params]}
    return {**written, "after": after}


def main(file: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {f"{case} {backend}": _write(case, backend) for case in CASES for backend in BACKENDS}
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    torch.save(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
