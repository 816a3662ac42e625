"""LARS whose update leaves the norms of the weights to the next step."""

from __future__ import annotations

import pytest
import torch

from fused_legw import LARS, SGD, Cosine, variants
from fused_legw.backends import device_table
from tests.support.cases import give_gradients, legw, make_params, same, twins
from tests.support.graphs import capturing
from tests.support.machine import INTERPRETED

SHAPES = [(7,), (100,), (0,), (3, 5), ()]


def _pair(device, dtypes=(torch.float32,), **options):
    """The same parameters with norms carried and without."""
    params = [p for dtype in dtypes for p in make_params(dtype, device, SHAPES)]
    made = []
    for tensors, carry in ((params, True), (twins(params), False)):
        optimizer = LARS(
            tensors, legw(Cosine()), weight_decay=0.1, tile=16, backend="triton", carry_norms=carry, **options
        )
        made.append((optimizer, tensors))
    return made


def _agree(a, b):
    """But for the order in which float64 norms of tiles are added up."""
    torch.testing.assert_close([p.detach() for p in a], [p.detach() for p in b], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("variant", variants.LARS)
def test_carried_norms_change_nothing(triton_device, variant):
    """Gradients missing now and then, from single tensors and from all of one dtype; non-finite ones; clipping."""
    dtypes = torch.float32, torch.bfloat16, torch.float64
    (carried, a), (plain, b) = _pair(triton_device, dtypes, variant=variant, skip_nonfinite=True, max_grad_norm=1.0)
    for step in range(8):
        give_gradients(step, a, b)
        for tensors in (a, b):
            if step == 4:
                tensors[1].grad[3] = torch.inf
            if step == 5:
                for p in tensors[: len(SHAPES)]:
                    p.grad = None
        carried.step()
        plain.step()
    assert carried.steps_applied == plain.steps_applied == 7
    _agree(a, b)
    norms = zip(carried.param_norms().values(), plain.param_norms().values(), b, strict=True)
    torch.testing.assert_close(*zip(*((x, y) for x, y, p in norms if p.grad is not None), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")
def test_counted_traffic():
    from tests.support.traffic import counted

    params = make_params(torch.float32, "cpu", [(1024, 1024)])
    optimizer = LARS(params, legw(Cosine()), weight_decay=0.1, backend="triton", carry_norms=True)
    for least in (28, 24, 24):
        give_gradients(0, params, skip=False)
        with counted() as traffic:
            optimizer.step()
        assert least <= traffic.bytes / params[0].numel() <= least + 0.3


def _in_place(p, optimizer):
    with torch.no_grad():
        p.mul_(3)


def _told(p, optimizer):
    p.data.mul_(3)
    optimizer.weights_changed()


def _moved(p, optimizer):
    p.data = p.data * 3


def _loaded(p, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    p.data.mul_(3)


def _untold(p, optimizer):
    p.data.mul_(3)


@pytest.mark.parametrize("change", [_in_place, _told, _moved, _loaded, _untold])
def test_changes_from_outside(triton_device, change):
    (carried, a), (plain, b) = _pair(triton_device)
    for step in range(4):
        if step == 2:
            change(a[1], carried)
            b[1].data.mul_(3)
        give_gradients(step, a, b, skip=False)
        carried.step()
        plain.step()
    if change is _untold:  # what cannot be seen is missed
        assert not torch.allclose(a[1], b[1], rtol=1e-6)
    else:
        _agree(a, b)


def test_replays_carry_norms_and_can_be_told(triton_device, monkeypatch):
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    (carried, a), (plain, b) = _pair(triton_device)
    give_gradients(0, a, b, skip=False)
    carried.step()
    plain.step()
    with capturing(monkeypatch) as graph:
        carried.step()
    for replay in range(5):
        if replay == 2:
            for p in (a[1], b[1]):
                p.data.mul_(3)
            carried.weights_changed()
        graph.replay()
        plain.step()
    _agree(a, b)


def test_only_lars_on_triton_carries_norms(device):
    (p,) = make_params(torch.float32, device, [(5,)])
    with pytest.raises(TypeError, match="carry_norms=True: SGD has no norms"):
        SGD([p], carry_norms=True)
    (q,) = twins([p])
    optimizers = LARS([p], 0.1, backend="aten", carry_norms=True), LARS([q], 0.1, backend="aten")
    for step in range(3):
        give_gradients(step, [p], [q], skip=False)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.weights_changed()
    same([p], [q])


def test_changed_weights_are_not_captured(triton_device, monkeypatch):
    """A graph that forgets norms would do so at every replay."""
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    ((carried, a), _) = _pair(triton_device)
    give_gradients(0, a, skip=False)
    carried.step()
    _in_place(a[1], carried)
    with pytest.raises(RuntimeError, match="weights changed since the last step: run"), capturing(monkeypatch):
        carried.step()


def test_uploads_see_changes_before_a_replay(triton_device, monkeypatch):
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    (carried, a), (plain, b) = _pair(triton_device)
    give_gradients(0, a, b, skip=False)
    for optimizer in (carried, plain):
        optimizer.step()
    with capturing(monkeypatch) as graph:
        carried.step()
    for p in (a[1], b[1]):
        _in_place(p, None)
    carried.upload_param_groups()
    graph.replay()
    plain.step()
    _agree(a, b)


def test_norms_of_an_empty_last_tensor(triton_device):
    (p, q) = params = make_params(torch.float32, triton_device, [(20,), (0,)])
    optimizer = LARS(params, 0.1, tile=16, backend="triton", carry_norms=True)
    for _ in range(2):
        give_gradients(0, params, skip=False)
        before = p.detach().norm().item()
        optimizer.step()
        assert optimizer.param_norms()[p].item() == pytest.approx(before, rel=1e-6)
        assert optimizer.param_norms()[q].item() == 0
