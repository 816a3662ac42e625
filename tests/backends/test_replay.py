"""Replays of one captured graph against eager steps, bit for bit: 200 on a GPU, a few in the interpreter's stand-in."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, Cosine
from fused_legw.backends import device_table
from tests.support.cases import legw, make_params, same, twins
from tests.support.graphs import capturing
from tests.support.machine import DEVICE

pytestmark = pytest.mark.gpu

GPU = DEVICE == "cuda"
REPLAYS, TILE = (200, 1024) if GPU else (5, 16)
SHAPES = [(1000, 999), (64,), (3,), (256, 1024)] if GPU else [(20,), (5, 7)]
KINDS = [
    (SGD, dict(momentum=0.9, nesterov=True)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict()),
    (AdamP, dict(delta=0.5)),
    (LARS, dict(momentum=0.9)),
    (LAMB, dict()),
]


def constant_gradients(step: int, params: list[Tensor], *, infinite: bool) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(step)
    gradients = [torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype) for p in params]
    if infinite:
        gradients[-1].view(-1)[step] = torch.inf
    return gradients


@pytest.mark.parametrize("guarded", [False, True], ids=["plain", "clipping and skipping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), KINDS, ids=lambda x: getattr(x, "__name__", ""))
def test_replays_equal_eager_steps(triton_device, monkeypatch, cls, options, dtype, guarded):
    """One schedule, gradients in static buffers; halfway the weight decay changes, uploaded for the replays."""
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    guards = dict(max_grad_norm=1.0, skip_nonfinite=True) if guarded else {}
    params = make_params(dtype, triton_device, SHAPES)
    plain = twins(params)
    replayed, eager = (
        cls(x, lr=legw(Cosine()), weight_decay=0.01, tile=TILE, backend="triton", **options, **guards)
        for x in (params, plain)
    )
    skipped = set(random.Random(0).sample(range(2, REPLAYS + 1), REPLAYS // 5)) if guarded else set()
    for tensors, optimizer in ((params, replayed), (plain, eager)):
        for p, g in zip(tensors, constant_gradients(0, params, infinite=False), strict=True):
            p.grad = g
        optimizer.step()
    with capturing(monkeypatch) as graph:
        replayed.step()
    for step in range(1, REPLAYS + 1):
        for p, q, g in zip(params, plain, constant_gradients(step, params, infinite=step in skipped), strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)
        if step == REPLAYS // 2:
            for optimizer in (replayed, eager):
                optimizer.param_groups[0]["weight_decay"] = 0.25
            replayed.upload_param_groups()
        graph.replay()
        eager.step()
        same(params, plain)
    torch.testing.assert_close(replayed.state_dict()["state"], eager.state_dict()["state"], rtol=0, atol=0)
    for optimizer in (replayed, eager):
        assert optimizer.steps_applied == REPLAYS + 1 - len(skipped)
        assert int(optimizer.steps_skipped) == len(skipped)
        assert optimizer.get_last_lr() == [legw(Cosine())(REPLAYS - len(skipped))]
