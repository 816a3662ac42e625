"""CUDA-graph capture. On a GPU the real one; elsewhere a stand-in that records what a capture would and repeats it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, Cosine, capture
from tests.support.cases import legw, make_params, twins
from tests.support.graphs import capturing, constant_gradients, spares  # noqa: F401  # spares prepares eager steps for captures
from tests.support.machine import needs_other_grad_dtypes


def _optimizer(params: list[Tensor], cls: type = SGD, options: dict | None = None):
    return cls(params, lr=legw(Cosine()), tile=16, backend="triton", **(options or dict(momentum=0.9)))


def _setup(device: str, *kind):
    params = make_params(torch.float32, device, [(20,), (5, 7)])
    return params, _optimizer(params, *kind)


@pytest.mark.parametrize(
    "kind",
    [
        (SGD, dict(momentum=0.9)),
        (Adam, dict(max_grad_norm=1.0)),
        (LARS, dict(weight_decay=0.1)),
        (AdamP, dict(weight_decay=0.1, delta=2.0)),
        (LAMB, dict(variant="apex", skip_nonfinite=True)),
    ],
    ids=str,
)
def test_replays_and_eager_steps_follow_one_schedule(triton_device, monkeypatch, kind):
    """Eager, capture, replay, eager, second capture, replay the first: each uses its own gradients, all one count."""
    params, sgd = _setup(triton_device, *kind)
    expected = twins(params)
    eager = _optimizer(expected, *kind)

    def expect(value: float) -> None:
        constant_gradients(expected, value)
        eager.step()
        torch.testing.assert_close(params, expected, rtol=0, atol=0)
        assert sgd.steps_applied == eager.steps_applied

    kept = [constant_gradients(params, 1.0)]
    sgd.step()
    expect(1.0)

    kept.append(constant_gradients(params, 2.0))
    with capturing(monkeypatch) as first:
        sgd.step()
    for _ in range(3):
        first.replay()
        expect(2.0)

    for p, g in zip(params, kept[0], strict=True):  # the addresses of the last eager upload: nothing is uploaded again
        p.grad = g
    sgd.step()
    expect(1.0)

    kept.append(constant_gradients(params, 3.0))
    sgd.step()
    expect(3.0)

    kept.append(constant_gradients(params, 4.0))
    with capturing(monkeypatch) as second:
        sgd.step()
    for graph, value in ((first, 2.0), (second, 4.0), (first, 2.0), (second, 4.0)):
        graph.replay()
        expect(value)
    assert sgd.get_last_lr() == [legw(Cosine())(sgd.steps_applied - 1)]


def test_a_capture_counts_only_when_replayed(triton_device, monkeypatch):
    params, sgd = _setup(triton_device)
    constant_gradients(params, 1.0)
    sgd.step()
    shown = sgd.param_groups[0]["lr"]
    with capturing(monkeypatch):
        sgd.step()
    assert sgd.steps_applied == 1
    assert sgd.param_groups[0]["lr"] == shown


def test_a_graph_outlives_a_rebuild(triton_device, monkeypatch):
    """What it addresses stays, though a rebuild made new buffers; capture again to go on with those."""
    import gc
    import weakref

    params, sgd = _setup(triton_device)
    constant_gradients(params, 1.0)
    sgd.step()
    with capturing(monkeypatch):
        sgd.step()
    momentum = weakref.ref(sgd._run.layout.buckets[0].state["momentum_buffer"])
    sgd.load_state_dict(sgd.state_dict())
    gc.collect()
    assert momentum() is not None


@needs_other_grad_dtypes
def test_a_refused_capture_leaves_nothing_behind(triton_device, monkeypatch):
    """A ticket made inside a capture would not be zero outside of it."""
    params, sgd = _setup(triton_device)
    constant_gradients(params, 1.0)
    sgd.step()
    params[0].grad = None
    params[0].grad_dtype = None
    params[0].grad = torch.ones_like(params[0], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"torch\.bfloat16 gradients are new: .*eagerly"), capturing(monkeypatch):
        sgd.step()
    assert len(sgd._run.engine.devices[0]._address_tables) == 1
    sgd.step()
    assert sgd.steps_applied == 2


def test_the_aten_backend_is_not_captured(device, monkeypatch):
    (p,) = make_params(torch.float32, device, [(4,)])
    sgd = SGD([p], lr=legw(), backend="aten")
    constant_gradients([p], 1.0)
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="backend='aten' cannot be captured"):
        sgd.step()
    assert sgd.steps_applied == 0


@pytest.mark.parametrize("change", ["no eager step", "moved", "hyper-parameter", "state"])
def test_what_cannot_be_captured_says_what_to_do(triton_device, monkeypatch, change):
    params, sgd = _setup(triton_device)
    constant_gradients(params, 1.0)
    if change != "no eager step":
        sgd.step()
    if change == "moved":
        params[0].data = params[0].data.clone()
    if change == "hyper-parameter":
        sgd.param_groups[0]["weight_decay"] = 0.1
    if change == "state":
        sgd = SGD(params, lr=legw(), tile=16, backend="triton")
        sgd.step()
        sgd.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match="eager"), capturing(monkeypatch):
        sgd.step()


@pytest.mark.parametrize("cls", [SGD, LAMB], ids=str)
def test_replays_skip_and_count_what_they_skip(triton_device, monkeypatch, cls):
    """The decision is the device's: a replay with a gradient that is not finite changes nothing."""
    options = dict(skip_nonfinite=True) | (dict(momentum=0.9) if cls is SGD else {})
    params, optimizer = _setup(triton_device, cls, options)
    gradients = constant_gradients(params, 1.0)
    optimizer.step()
    with capturing(monkeypatch) as graph:
        optimizer.step()
    graph.replay()
    before = twins(params), optimizer.state_dict()["state"]
    gradients[1][2, 3] = torch.nan
    graph.replay()
    torch.testing.assert_close(params, before[0], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    assert (optimizer.steps_applied, int(optimizer.steps_skipped)) == (2, 1)
    gradients[1].fill_(1.0)
    graph.replay()
    assert (optimizer.steps_applied, int(optimizer.steps_skipped)) == (3, 1)


def test_values_changed_in_param_groups_reach_replays(triton_device, monkeypatch):
    params = make_params(torch.float64, triton_device, [(20,), (5, 7)])
    options = dict(lr=0.5, tile=16, backend="triton")
    optimizer = SGD(params, **options)
    constant_gradients(params, 1.0)
    optimizer.step()
    with capturing(monkeypatch) as graph:
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.25, weight_decay=0.125)
    optimizer.upload_param_groups()
    expected = [p - 0.25 * (1 + 0.125 * p) for p in twins(params)]
    graph.replay()
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in expected], rtol=1e-12, atol=0)
    optimizer.param_groups[0]["schedule"] = legw()
    with pytest.raises(RuntimeError, match="a schedule was replaced"):
        optimizer.upload_param_groups()


def test_a_state_dict_shows_the_lr_that_the_device_got_to(triton_device, monkeypatch):
    params, sgd = _setup(triton_device)
    constant_gradients(params, 1.0)
    sgd.step()
    with capturing(monkeypatch) as graph:
        sgd.step()
    for _ in range(3):
        graph.replay()
    (group,) = sgd.state_dict()["param_groups"]
    assert (group["steps_applied"], group["lr"]) == (4, legw(Cosine())(3))
