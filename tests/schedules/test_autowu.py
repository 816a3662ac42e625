"""AutoWU: its path on host and device, its decisions on recorded losses, resuming, misuse."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch

from fused_legw import SGD, AutoWU
from fused_legw.schedules import autowu
from tests.support.cases import give_gradients, make_params, same, twins
from tests.support.graphs import capturing, spares  # noqa: F401  # spares prepares eager steps for captures

SPE, TOTAL, TURN = 12, 720, 120  # updates: an epoch, the run, where the loss starts to rise


@pytest.fixture(autouse=True)
def _sklearn():
    pytest.importorskip("sklearn")


def _auto(**options) -> AutoWU:
    return AutoWU(TOTAL, SPE, **options)


def _loss(t: int, random: np.random.Generator, *, rises: bool = True) -> float:
    """Falls to its lowest at TURN, then rises; or only falls. With noise."""
    curve = 2.3 - 1.5 * (min(t, TURN) / TURN if rises else t / TOTAL)
    return (
        curve + (3 * ((t - TURN) / TURN) ** 2 + 0.01 * (t - TURN) if rises and t > TURN else 0) + 0.1 * random.normal()
    )


def _train(auto: AutoWU, epochs: range, random: np.random.Generator, **curve) -> int | None:
    """The epoch, from 1, at whose end it switched."""
    for epoch in epochs:
        for t in range(epoch * SPE, (epoch + 1) * SPE):
            auto.observe(_loss(t, random, **curve))
        if auto.end_epoch():
            return epoch + 1
    return None


def _expected(t: int, switch: tuple[float, float] = (TOTAL / 2, 1.0), start: float | None = None) -> float:
    if t < switch[0]:
        return 1e-5 * 1e5 ** (t / (TOTAL / 2))
    s = min(max((t - (start or switch[0])) / (TOTAL - (start or switch[0])), 0), 1)
    return switch[1] * (1 + math.cos(math.pi * s)) / 2


def _moved(switch: tuple[float, float], **options) -> AutoWU:
    return AutoWU.from_dict({**_auto(**options).to_dict(), "switch": switch})


UPDATES = [0, 1, 100, 119, 120, 121, 359, 360, 361, 575, 576, 577, 700, 719, 720, 1000]


def test_the_path_is_the_definitions():
    late = dict(decay="constant-then-cosine")
    cases = [(_auto(), {}), (_moved((120, 0.003)), dict(switch=(120, 0.003)))]
    cases += [(_auto(**late), dict(start=576)), (_moved((120, 0.003), **late), dict(switch=(120, 0.003), start=576))]
    for auto, path in cases:
        assert [auto(t) for t in UPDATES] == pytest.approx([_expected(t, **path) for t in UPDATES], rel=1e-9, abs=1e-12)
        copy = AutoWU.from_dict(json.loads(json.dumps(auto.to_dict())))
        assert copy.to_dict() == auto.to_dict() and [copy(t) for t in UPDATES] == [auto(t) for t in UPDATES]


def test_the_switch_comes_soon_after_the_turn_and_falls_back_to_it():
    after, fallback = [], []
    for seed in range(10):
        auto = _auto(seed=seed)
        epoch = _train(auto, range(TOTAL // SPE), np.random.default_rng(seed))
        after.append((epoch * SPE - TURN) / SPE)
        fallback.append(abs(math.log(auto.switch[1] / _expected(TURN)) / math.log(_expected(SPE) / _expected(0))))
        assert auto.phase == "decay" and auto(epoch * SPE) == pytest.approx(auto.switch[1], rel=1e-12)
        assert auto(epoch * SPE - 1) == pytest.approx(_expected(epoch * SPE - 1), rel=1e-9)
    assert sum(1 <= epochs <= 5 for epochs in after) >= 9, after
    assert sum(epochs <= 1.5 for epochs in fallback) >= 9, fallback


def test_it_never_switches_while_the_loss_falls():
    for seed in range(10):
        auto = _auto(seed=seed)
        assert _train(auto, range(9), np.random.default_rng(seed), rises=False) is None and auto.phase == "warmup"


def test_without_a_switch_the_decay_starts_at_the_longest_warmup():
    auto = AutoWU(24, 3)
    for t in range(12):
        auto.observe(1.0 - t)
        if t % 3 == 2:
            assert auto.end_epoch() == (t == 11)
    assert auto.phase == "decay" and auto.switch == (12, 1.0) and auto(12) == 1 > auto(13)
    assert not auto.end_epoch()


def test_the_same_seed_and_losses_decide_alike_and_bad_losses_are_left_out(monkeypatch):
    monkeypatch.setattr(autowu, "_CONDITION", 50)  # so few that the sample shows

    def train(seed, bad=()):
        auto, random = _auto(seed=seed), np.random.default_rng(3)
        for t in range(20 * SPE):
            loss = _loss(t, random)
            auto.observe(bad[t % len(bad)] if bad and t % 7 == 3 else loss)
            if t % SPE == SPE - 1 and auto.end_epoch():
                break
        return auto.switch

    assert train(5) == train(5) != train(6)
    assert train(5, [math.nan, math.inf, -math.inf]) == train(5, [math.nan]) != train(5)
    assert abs(train(5, [math.nan])[0] - train(5)[0]) <= SPE
    assert _train_nothing_finite() is False


def _train_nothing_finite() -> bool:
    auto = _auto()
    auto.observe(math.nan)
    return auto.end_epoch()


def _optimizer(params, auto, backend) -> SGD:
    return SGD(params, lr=auto, momentum=0.9, backend=backend, tile=16)


def _steps(optimizer, auto, params, steps: range) -> None:
    for t in steps:
        give_gradients(t, params)
        optimizer.step()
        random = np.random.default_rng(t)
        auto.observe(torch.tensor(_loss(t, random)))
        if t % SPE == SPE - 1:
            auto.end_epoch()


@pytest.mark.parametrize(("at", "optimizer_first"), [(65, True), (140, False), (185, True)])
def test_a_resumed_run_equals_the_uninterrupted_one(backend, device, at, optimizer_first):
    """In the warm-up's middle of an epoch, past a first positive test, and after the switch."""
    params, auto = make_params(torch.float32, device, [(5,), (20,)]), _auto()
    optimizer = _optimizer(params, auto, backend)
    _steps(optimizer, auto, params, range(at))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), auto.state_dict()], file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed, own = twins(params), AutoWU(10, 5, decay="constant-then-cosine", seed=9)
    other = _optimizer(resumed, own, backend)
    for target, state in list(zip((other, own), stored, strict=True))[:: 1 if optimizer_first else -1]:
        target.load_state_dict(state)
    assert other.param_groups[0]["schedule"] is own
    _steps(optimizer, auto, params, range(at, 190))
    _steps(other, own, resumed, range(at, 190))
    assert own.phase == "decay" and own.to_dict() == auto.to_dict()
    same(params, resumed)


def test_missing_losses_of_a_resumed_run_are_named(device):
    params, auto = make_params(torch.float32, device, [(5,)]), _auto()
    optimizer = _optimizer(params, auto, "aten")
    _steps(optimizer, auto, params, range(2 * SPE))
    own = _auto()
    other = _optimizer(twins(params), own, "aten")
    other.load_state_dict(optimizer.state_dict())
    own.observe(1.0)
    with pytest.raises(RuntimeError, match=r"load auto\.state_dict\(\) besides .* only 1 of 25 losses are here"):
        own.end_epoch()
    own.load_state_dict(auto.state_dict())
    own.observe(1.0)
    assert not own.end_epoch()


def test_the_kernel_follows_and_compiles_nothing(backend, device, launches):
    """The switch, and a change of the batch in either phase."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))
    auto = _auto()
    optimizer = SGD([p], lr=auto, backend=backend, tile=16)
    layout, variants = optimizer._run.layout, list[set[str]]()
    for t in range(230):
        if t in (60, 200):
            optimizer.set_batch_size(64, steps_per_epoch=24 if t == 60 else 6)
        if t == 150:
            auto.become(AutoWU.from_dict({**auto.to_dict(), "switch": [150.0, 0.004]}))
        p.data.zero_()
        p.grad = torch.full_like(p, -1)
        launches.clear()
        optimizer.step()
        variants.append({repr(launch) for launch in launches})
        assert p.item() == pytest.approx(auto(t), rel=1e-12, abs=1e-300), t
        assert auto(t) == pytest.approx(_expected(t), rel=1e-9) or t >= 150
    assert optimizer._run.layout is layout and variants == variants[:1] * 230
    # 5 epochs of 12, then 24 an epoch to update 200, then 6 an epoch for what is left of 60.
    left = 60 - 5 - 140 / 24
    assert auto.constants.end == pytest.approx(200 + 6 * left, rel=1e-12) and auto(math.ceil(200 + 6 * left)) == 0
    s = (50 / 24 + 10 / 6) / (60 - 5 - 90 / 24)  # at 210, of the decay in epochs
    assert auto(210) == pytest.approx(0.004 * (1 + math.cos(math.pi * s)) / 2, rel=1e-9)
    assert AutoWU.from_dict(auto.to_dict())(210) == auto(210)


def test_a_captured_graph_follows_the_switch(triton_device, monkeypatch):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=triton_device))
    auto = _auto()
    optimizer = SGD([p], lr=auto, backend="triton", tile=16)
    p.grad = torch.full_like(p, -1)
    optimizer.step()
    with capturing(monkeypatch) as graph:
        optimizer.step()
    for t in range(1, 8):
        if t == 4:
            auto.become(_moved((4, 0.25)))
            optimizer.upload_param_groups()
        p.data.zero_()
        graph.replay()
        assert p.item() == pytest.approx(auto(t), rel=1e-12), t
    assert auto(4) == 0.25


@pytest.mark.parametrize("paces", [[6], [48, 6]], ids=str)
def test_another_batch_before_the_first_update(device, paces):
    """The run keeps its epochs, whatever batches were asked for before one was used."""
    auto = _auto()
    optimizer = SGD(make_params(torch.float32, device, [(5,)]), lr=auto)
    for pace in paces:
        optimizer.set_batch_size(64, steps_per_epoch=pace)
    # Half as many updates; the warm-up keeps its growth per update, and ends at its epoch.
    assert [auto(t) for t in (0, 60, 180)] == pytest.approx([_expected(t) for t in (0, 60, 180)], rel=1e-9)
    assert auto(360) == 0 < auto(359) < auto(180) > auto(179)
    other = auto.change_batch_size(30, 32, steps_per_epoch=SPE)
    assert other.constants.end == 30 + (TOTAL / SPE - 30 / 6) * SPE
    assert [other.as_of(29)(t) for t in (0, 29, 300)] == [auto(t) for t in (0, 29, 300)]
    assert AutoWU.from_dict(json.loads(json.dumps(other.to_dict()))).to_dict() == other.to_dict()


def test_losses_wait_on_the_device(device):
    """As copies: a replayed graph writes the next to the same memory."""
    auto, loss = _auto(), torch.zeros((), device=device)
    for value in (3.0, 2.0, 1.0):
        loss.fill_(value)
        auto.observe(loss)
    assert all(isinstance(x, torch.Tensor) and x.device == loss.device for x in auto._pending)
    assert auto.state_dict()["losses"].tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("total_steps", 0), ("steps_per_epoch", 0), ("min_lr", 2.0), ("max_lr", -1), ("max_warmup_fraction", 1.0)]
    + [("patience", 0), ("tests", 1.5), ("confidence", 1), ("decay", "linear"), ("seed", -1)],
)
def test_a_bad_setting_is_named_with_its_value(name, bad):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {bad!r}"):
        AutoWU(**{"total_steps": TOTAL, "steps_per_epoch": SPE, name: bad})


def test_out_of_order(device):
    auto = _auto()
    with pytest.raises(RuntimeError, match=r"end_epoch\(\) needs losses"):
        auto.end_epoch()
    auto.observe(1.0)
    with pytest.raises(RuntimeError, match=r"steps_applied=2, but observe\(loss\) was called only 1 times"):
        auto.end_epoch(2)
    for bad in ("1", None, True, torch.zeros(2)):
        with pytest.raises(ValueError, match="loss must be a number or a 0-dim tensor, got"):
            auto.observe(bad)
    with pytest.raises(ValueError, match="state_dict must be what"):
        auto.load_state_dict({})
    with pytest.raises(ValueError, match="schedule must be what"):
        AutoWU.from_dict({"name": "AutoWU"})
    assert len(auto.state_dict()["losses"]) == 1
    optimizer = SGD(make_params(torch.float32, device, [(5,)]), lr=auto)
    with pytest.raises(ValueError, match=r"steps_per_epoch must be given for AutoWU, .* got None"):
        optimizer.set_batch_size(64)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    auto = _auto()
    auto.observe(1.0)
    with pytest.raises(ImportError, match=r"pip install 'fused-legw\[autowu\]'"):
        auto.end_epoch()
    assert auto._losses == [] and len(auto._pending) == 1


def test_a_skipped_update_counts_no_longer():
    """steps_applied, where fewer updates were applied than losses seen, places the switch."""
    auto = _auto(patience=1)
    random = np.random.default_rng(0)
    for t in range(20 * SPE):
        auto.observe(_loss(t, random))
        if t % SPE == SPE - 1 and auto.end_epoch(t + 1 - 3):
            break
    assert auto.switch[0] == t - 2
