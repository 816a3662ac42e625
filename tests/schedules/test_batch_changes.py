"""Changing the batch in mid-run: the schedule on the host, `set_batch_size` on both backends, state dicts, captures."""

from __future__ import annotations

import io
import json
import math
from fractions import Fraction

import pytest
import torch

from fused_legw import LEGW, SGD, Constant, Cosine, Exponential, FollowSchedule, MultiStep, Polynomial
from fused_legw.optim.base import FusedOptimizer
from tests.support.cases import legw, make, make_params, run, same, twins
from tests.support.graphs import capturing, spares  # noqa: F401  # spares prepares eager steps for captures

# 7.8125 updates an epoch at first; W = 15.625.
RECIPE = dict(base_lr=0.1, base_batch_size=32, base_warmup_epochs=0.5, batch_size=128, dataset_size=1000, epochs=12)
W, E = Fraction(125, 8), Fraction(12)


def _left(epoch: Fraction, start: Fraction) -> float:
    return float(min(max((E - epoch) / (E - start), Fraction(0)), Fraction(1)))


# The factor after `epoch` epochs, where the warm-up took `start`.
DECAYS = [
    (Constant(), lambda epoch, start: 1),
    (MultiStep([3, 7, 9.5], 0.5), lambda epoch, start: 0.5 ** sum(epoch >= e for e in (3, 7, Fraction(19, 2)))),
    (Exponential(0.5, 4), lambda epoch, start: 0.5 ** max(0, math.floor(epoch - 4) + 1)),
    (
        Exponential(0.9, 1, 1.5, staircase=False),
        lambda epoch, start: 0.9 ** float(max(0, (epoch - 1) / Fraction(3, 2))),
    ),
    (Polynomial(2), lambda epoch, start: _left(epoch, start) ** 2),
    (Polynomial(1, span="whole"), lambda epoch, start: _left(epoch, Fraction(0))),
    (Cosine(), lambda epoch, start: math.sin(math.pi / 2 * _left(epoch, start)) ** 2),
]
# In the warm-up, at either side of its end, in the decay, at and after milestones, in between, one right after another.
CHANGES = [
    {0: 512},
    {3: 512},
    {15: 64},
    {16: 512},
    {24: 512},
    {55: 256},
    {80: 48},
    {3: 256, 9: 64, 20: 96, 60: 512},
    {15: 256, 16: 32, 17: 512},
]


def _path(decay_factor, changes: dict[int, int], n: int) -> list[float]:
    """The LR of the first n updates, from the definition, one after another."""
    batch, epoch, start, lrs = 128, Fraction(0), None, list[float]()
    for t in range(n):
        batch = changes.get(t, batch)
        if t + 1 >= W and start is None:  # the warm-up ends within this update
            start = epoch + (W - t) * Fraction(batch, 1000)
        lr = 0.1 * math.sqrt(batch / 32) * min(1, float((t + 1) / W))
        lrs.append(lr * (decay_factor(epoch, start) if t >= W else 1))
        epoch += Fraction(batch, 1000)
    return lrs


def _changed(schedule: LEGW, changes: dict[int, int]) -> LEGW:
    for t, batch in changes.items():
        schedule = schedule.change_batch_size(t, batch)
    return schedule


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize(("decay", "factor"), DECAYS, ids=lambda x: str(x)[:40] if not callable(x) else "")
def test_the_schedule_is_the_definitions(decay, factor, changes):
    schedule = _changed(LEGW(**RECIPE, decay=decay), changes)
    expected = _path(factor, changes, 130)
    assert [schedule(t) for t in range(130)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert schedule.warmup_steps == W
    copy = LEGW.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert copy == schedule and hash(copy) == hash(schedule) and copy.constants == schedule.constants


@pytest.mark.parametrize("changes", [CHANGES[i] for i in (1, 3, 5, 7, 8)], ids=str)
@pytest.mark.parametrize(("decay", "factor"), DECAYS, ids=lambda x: str(x)[:40] if not callable(x) else "")
def test_the_optimizer_follows_and_compiles_nothing(backend, device, launches, decay, factor, changes):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))
    optimizer = SGD([p], lr=LEGW(**RECIPE, decay=decay), backend=backend, tile=16)
    scheduler, layout = FollowSchedule(optimizer), optimizer._run.layout
    expected, variants = _path(factor, changes, 85), list[set[str]]()
    for t in range(85):
        if t in changes:
            optimizer.set_batch_size(changes[t])
        p.data.zero_()
        p.grad = torch.full_like(p, -1)
        launches.clear()
        optimizer.step()
        variants.append({repr(launch) for launch in launches})
        schedule = optimizer.param_groups[0]["schedule"]
        assert p.item() == pytest.approx(schedule(t), rel=1e-12, abs=1e-300), t
        assert p.item() == pytest.approx(expected[t], rel=1e-9, abs=1e-12), t
        assert optimizer.get_last_lr() == scheduler.get_last_lr() == [schedule(t)] == [optimizer.param_groups[0]["lr"]]
    assert optimizer._run.layout is layout and variants == variants[:1] * 85
    assert schedule == _changed(LEGW(**RECIPE, decay=decay), changes)


def test_the_warmup_does_not_restart_and_its_length_stays():
    """Also where a loader's length rounds the updates of an epoch, and so would W."""
    schedule = LEGW(**RECIPE, steps_per_epoch=8, decay=Cosine())
    assert schedule.warmup_steps == 16
    small = schedule.change_batch_size(16, 64, steps_per_epoch=15)  # whose own W would be 15
    large = schedule.change_batch_size(16, 512, steps_per_epoch=3)  # and here 24
    assert small.warmup_steps == large.warmup_steps == 16
    assert small(16) == pytest.approx(small.peak_lr, rel=1e-12)
    assert large(16) == pytest.approx(large.peak_lr, rel=1e-12) and large(17) < large(16)
    assert large.total_steps == 16 + 10 * 3 and large.epoch(46) == 12


def test_another_batch_from_the_start_forgets_the_changes():
    schedule = LEGW(**RECIPE, decay=Cosine())
    assert _changed(schedule, {9: 512}).with_batch_size(256) == schedule.with_batch_size(256)


def test_a_batch_that_made_no_update_leaves_no_trace():
    schedule = LEGW(**RECIPE, decay=Cosine())
    assert _changed(_changed(schedule, {9: 512}), {9: 64}) == _changed(schedule, {9: 64})
    assert schedule.change_batch_size(0, 512) == schedule.with_batch_size(512)


def test_hundreds_of_changes():
    """More than Python's calls can be nested are read back in one go."""
    earlier = [(t, 128 + t % 2, 1000 / (128 + t % 2)) for t in range(1, 1101)]
    schedule = LEGW(**{**RECIPE, "epochs": 1000}, decay=Cosine(), earlier=earlier)
    assert LEGW.from_dict(schedule.to_dict()) == schedule
    assert schedule.epoch(1100) == pytest.approx(1.1 * 128.5, rel=1e-12)


def test_resuming_after_changes_is_exact(backend, device):
    """The resumed run changes once more, as the uninterrupted one does."""
    params = make_params(torch.float32, device, [(5,), (20,)])
    optimizer = make(params, backend, lr=legw(MultiStep([1, 2, 4])))
    for begin, batch in ((0, 128), (5, 48), (12, 256)):
        optimizer.set_batch_size(batch)
        run(optimizer, range(begin, begin + 5), params)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
    resumed = twins(params)
    other = make(resumed, backend, lr=legw(Constant()))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["schedule"] == optimizer.param_groups[0]["schedule"]
    for following, own in ((optimizer, params), (other, resumed)):
        following.set_batch_size(512)
        run(following, range(20, 25), own)
    same(params, resumed)
    assert [len(o.param_groups[0]["schedule"].earlier) for o in (optimizer, other)] == [3, 3]


def test_a_captured_graph_follows_after_an_upload(triton_device, monkeypatch):
    """The milestones too, which are in a table of their own."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=triton_device))
    schedule = legw(MultiStep([2, 3, 4]))
    optimizer = SGD([p], lr=schedule, backend="triton", tile=16)
    p.grad = torch.full_like(p, -1)
    optimizer.step()
    with capturing(monkeypatch) as graph:
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"set_batch_size\(256\) was called in a graph capture"):
            optimizer.set_batch_size(256)
    for t in range(1, 60):
        if t == 45:
            optimizer.set_batch_size(256)
            optimizer.upload_param_groups()
            schedule = schedule.change_batch_size(45, 256)
        p.data.zero_()
        graph.replay()
        assert p.item() == pytest.approx(schedule(t), rel=1e-12), t
    assert optimizer.steps_applied == 60
    assert optimizer.param_groups[0]["schedule"] == schedule and schedule.milestones == (44, 49, 54)


def test_groups_that_share_a_schedule_go_on_sharing(backend, device):
    a, b, c = make_params(torch.float32, device, [(5,), (6,), (7,)])
    shared = legw(Cosine())
    groups = [dict(params=[a], lr=shared), dict(params=[b], lr=shared, lr_scale=0.5), dict(params=[c])]
    optimizer = SGD(groups, lr=0.25, backend=backend, tile=16)
    optimizer.set_batch_size(128)
    first, second, third = (group["schedule"] for group in optimizer.param_groups)
    assert first is second is not shared and third is None
    run(optimizer, range(1), [a, b, c])
    assert optimizer.get_last_lr() == [first(0), 0.5 * first(0), 0.25]


def test_the_device_is_asked_only_if_the_batch_changes(backend, device, monkeypatch):
    optimizer = make(make_params(torch.float32, device, [(5,)]), backend, lr=legw())
    schedule = optimizer.param_groups[0]["schedule"]
    with monkeypatch.context() as patch:
        patch.setattr(FusedOptimizer, "steps_applied", property(lambda self: pytest.fail("the device was asked")))
        optimizer.set_batch_size(schedule.batch_size)
        optimizer.set_batch_size(schedule.batch_size, steps_per_epoch=20)
    assert optimizer.param_groups[0]["schedule"] is schedule
    optimizer.set_batch_size(schedule.batch_size, steps_per_epoch=21)
    assert optimizer.param_groups[0]["schedule"].steps_per_epoch == 21


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "32", None, math.nan])
def test_a_bad_batch_is_named_with_its_value(device, bad):
    optimizer = make(make_params(torch.float32, device, [(5,)]), "aten", lr=legw())
    schedule = optimizer.param_groups[0]["schedule"]
    with pytest.raises(ValueError, match=rf"^batch_size must be a positive integer, got {bad!r}"):
        optimizer.set_batch_size(bad)
    with pytest.raises(ValueError, match=r"^steps_per_epoch must be a finite positive number, got 0"):
        optimizer.set_batch_size(512, steps_per_epoch=0)
    assert optimizer.param_groups[0]["schedule"] is schedule


def test_what_a_schedule_refuses_changes_no_group(device):
    a, b = make_params(torch.float32, device, [(5,), (6,)])
    groups = [dict(params=[a], lr=legw()), dict(params=[b], lr=legw(Cosine()))]
    optimizer = SGD(groups, backend="aten")
    before = [group["schedule"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"epochs=10.* ends the run .* inside its warm-up"):
        optimizer.set_batch_size(1280)
    assert [group["schedule"] for group in optimizer.param_groups] == before
    with pytest.raises(ValueError, match="batch_size=128: no param group follows a schedule"):
        SGD([a], lr=0.1).set_batch_size(128)


def test_a_place_before_a_change_is_refused(backend, device):
    params = make_params(torch.float32, device, [(5,)])
    optimizer = make(params, backend, lr=legw())
    optimizer.steps_applied = 10
    optimizer.set_batch_size(128)
    with pytest.raises(ValueError, match="steps_applied=9 lies before update 10"):
        optimizer.steps_applied = 9
    state = optimizer.state_dict()
    state["param_groups"][0]["steps_applied"] = 3
    other = make(twins(params), backend, lr=legw())
    with pytest.raises(ValueError, match="steps_applied=3 lies before update 10"):
        other.load_state_dict(state)
    assert other.param_groups[0]["schedule"] == legw()
    with pytest.raises(ValueError, match="steps_applied=0 lies before update 10"):
        make(twins(params), backend, lr=optimizer.param_groups[0]["schedule"])
    with pytest.raises(ValueError, match=r"steps_applied=0 lies before"):
        other.add_param_group(dict(params=twins(params), lr=optimizer.param_groups[0]["schedule"]))
    assert len(other.param_groups) == 1
    with pytest.raises(ValueError, match=r"^t must be at least 10, where the batch size last changed, got 9"):
        optimizer.param_groups[0]["schedule"].change_batch_size(9, 64)


@pytest.mark.parametrize("bad", [3, "no", [3], [(1, 2)], [(0, 32, 40.0)], [(5, 0, 1.0)], [(5, 32, 0.0)],
                                 [(5, 32, 40.0), (5, 32, 40.0)]])  # fmt: skip
def test_a_bad_history_is_named(bad):
    with pytest.raises(ValueError, match="must be"):
        legw(earlier=bad)
