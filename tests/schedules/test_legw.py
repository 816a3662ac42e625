"""The schedule on the host: golden values from outside, conventions, copies. The oracle is mpmath."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from fused_legw import LEGW, Constant, Cosine, Exponential, MultiStep, Polynomial

mpmath = pytest.importorskip("mpmath")
mp = mpmath.mp.clone()
mp.dps = 50

IMAGENET = dict(base_batch_size=512, base_lr=4.0, base_warmup_epochs=0.15625, dataset_size=1_281_167, epochs=90)

# k = 4, so peak LR 0.2; 7.8125 updates an epoch; W = 15.625; T = 93.75.
RECIPE = dict(base_lr=0.1, base_batch_size=32, base_warmup_epochs=0.5, batch_size=128, dataset_size=1000, epochs=12)
STEPS_PER_EPOCH, W, T = Fraction(125, 16), Fraction(125, 8), Fraction(375, 4)
PEAK = 2 * mp.mpf(0.1)
UPDATES = [0, 1, 14, 15, 16, 17, 23, 24, 40, 54, 55, 70, 92, 93, 94, 95, 1000, 2**31, 2**40]


def exact(x: Fraction) -> mpmath.mpf:
    return mp.mpf(x.numerator) / x.denominator


def remaining(t: int) -> mpmath.mpf:
    return exact(min(max((T - t) / (T - W), Fraction(0)), Fraction(1)))


def whole(t: int) -> mpmath.mpf:
    return exact(min(max((T - t) / T, Fraction(0)), Fraction(1)))


def steps_down(t: int, milestones: list[Fraction]) -> int:
    return sum(t >= e * STEPS_PER_EPOCH for e in milestones)


def periods(t: int, start: int, every: Fraction) -> Fraction:
    return (t / STEPS_PER_EPOCH - start) / every


HUNDRED = [Fraction(i, 10) for i in range(1, 101)]
DECAYS = [
    (Constant(), lambda t: 1),
    (MultiStep([]), lambda t: 1),
    (MultiStep([7]), lambda t: mp.mpf(0.1) ** steps_down(t, [Fraction(7)])),
    (MultiStep([3, 7, 9.5], 0.5), lambda t: mp.mpf(0.5) ** steps_down(t, [Fraction(3), Fraction(7), Fraction(19, 2)])),
    (MultiStep([i / 10 for i in range(1, 101)], 0.9), lambda t: mp.mpf(0.9) ** steps_down(t, HUNDRED)),
    (Exponential(0.5, 4), lambda t: mp.mpf(0.5) ** max(0, math.floor(periods(t, 4, Fraction(1))) + 1)),
    (Exponential(0.97, 3, 2.5), lambda t: mp.mpf(0.97) ** max(0, math.floor(periods(t, 3, Fraction(5, 2))) + 1)),
    (
        Exponential(0.5, 4, 1.5, staircase=False),
        lambda t: mp.mpf(0.5) ** exact(max(Fraction(0), periods(t, 4, Fraction(3, 2)))),
    ),
    (Polynomial(), remaining),
    (Polynomial(2), lambda t: remaining(t) ** 2),
    (Polynomial(0.5, end_lr=0.01), lambda t: 0.01 / PEAK + (1 - 0.01 / PEAK) * mp.sqrt(remaining(t))),
    (Polynomial(2, span="whole"), lambda t: whole(t) ** 2),
    (Cosine(), lambda t: (1 + mp.cos(mp.pi * (1 - remaining(t)))) / 2),
    (Cosine(0.02), lambda t: 0.02 / PEAK + (1 - 0.02 / PEAK) * (1 + mp.cos(mp.pi * (1 - remaining(t)))) / 2),
]


def expected(t: int, decay: object) -> float:
    """LR of the update after t completed ones, from the definition."""
    return float(PEAK * min(1, exact((t + 1) / W)) * (decay(t) if t >= W else 1))


@pytest.mark.parametrize(("decay", "factor"), DECAYS, ids=lambda x: str(x)[:60] if not callable(x) else "")
def test_lr_is_the_definitions(decay, factor):
    schedule = LEGW(**RECIPE, decay=decay)
    assert (schedule.warmup_steps, schedule.total_steps) == (15.625, 93.75)
    for t in UPDATES:
        assert schedule(t) == pytest.approx(expected(t, factor), rel=1e-12, abs=1e-300), t


@pytest.mark.parametrize("decay", [Polynomial(2), Cosine()])
def test_near_the_end_of_a_long_run_no_digits_are_lost(decay):
    schedule = LEGW(0.1, 1, 5, batch_size=1, dataset_size=1000, epochs=1000.0005, decay=decay)
    end = Fraction("1000000.5")
    for t in (999_000, 999_999, 1_000_000):
        left = exact((end - t) / (end - 5000))
        factor = left**2 if decay == Polynomial(2) else mp.sin(mp.pi / 2 * left) ** 2
        assert schedule(t) == pytest.approx(float(mp.mpf(0.1) * factor), rel=1e-12)
    assert schedule(1_000_001) == 0


def test_conventions():
    schedule = LEGW(**RECIPE, decay=Polynomial(2))
    assert schedule(0) == pytest.approx(0.2 / 15.625, rel=1e-15)  # the first update moves
    assert schedule(14) == pytest.approx(0.2 * 15 / 15.625, rel=1e-15)
    assert schedule(15) == 0.2  # the update that completes the warm-up, at floor(W), is at the peak
    assert 0 < schedule(16) < 0.2  # the decay counts from W = 15.625 on
    assert schedule(93) > 0  # the last update of a run that decays to zero still moves
    assert schedule(94) == 0
    whole_warmup = LEGW(0.1, 32, 0.5, batch_size=32, dataset_size=640)
    assert whole_warmup.warmup_steps == 10
    assert [whole_warmup(t) for t in (0, 8, 9, 10)] == pytest.approx([0.01, 0.09, 0.1, 0.1], rel=1e-15)


def test_no_warmup_starts_at_the_peak():
    assert LEGW(0.1, 32, 0, batch_size=32, dataset_size=640, epochs=3, decay=Cosine())(0) == 0.1


def test_polynomial_over_the_whole_run_jumps_where_the_warmup_ends():
    # The MNIST code's: at W the decay has already used W / T of the run.
    schedule = LEGW(**RECIPE, decay=Polynomial(1, span="whole"))
    assert schedule(15) == 0.2
    assert schedule(16) == pytest.approx(0.2 * (1 - 16 / 93.75), rel=1e-14)


@pytest.mark.parametrize(
    ("batch", "peak", "warmup_epochs"),
    [
        (512, 4.0, 0.15625),
        (1024, 5.656854249492381, 0.3125),
        (2048, 8.0, 0.625),
        (4096, 11.313708498984761, 1.25),
        (8192, 16.0, 2.5),
        (16384, 22.627416997969522, 5.0),
        (32768, 32.0, 10.0),
    ],
)
def test_imagenet_table_of_the_paper(batch, peak, warmup_epochs):
    schedule = LEGW(**IMAGENET, batch_size=batch, decay=Polynomial(2))
    assert schedule.peak_lr == pytest.approx(peak, rel=1e-12)
    assert schedule.warmup_epochs == warmup_epochs
    assert schedule.warmup_steps == float(Fraction("0.15625") * 1_281_167 / 512) == pytest.approx(390.98, abs=0.005)
    assert schedule(390) == schedule.peak_lr > schedule(391)


def test_lamb_papers_row():
    schedule = LEGW(0.04, 32768, 20, batch_size=32768, dataset_size=1_281_167, epochs=90, decay=Polynomial(1))
    assert schedule.peak_lr == 0.04
    assert math.ceil(schedule.warmup_steps) == 782
    assert schedule(781) == pytest.approx(0.04, rel=1e-5) and schedule(780) < 0.04


@pytest.mark.parametrize(("rate", "start", "epochs"), [(0.5, 4, 13), (1 / 1.15, 14, 55)], ids=["small", "large"])
def test_ptb_tutorials_epochs(rate, start, epochs):
    steps = 2323  # ((929589 // 20) - 1) // 20
    schedule = LEGW(
        1.0, 20, 0, batch_size=20, dataset_size=929_589, steps_per_epoch=steps, decay=Exponential(rate, start)
    )
    for i in range(epochs):
        for t in (i * steps, (i + 1) * steps - 1):
            assert schedule(t) == pytest.approx(rate ** max(i + 1 - start, 0), rel=1e-12)


@pytest.mark.parametrize(("scaling", "peak"), [("sqrt", 0.8), ("linear", 6.4), ("none", 0.1)])
def test_scaling_rules(scaling, peak):
    assert LEGW(0.1, 32, 0.5, batch_size=2048, dataset_size=1000, scaling=scaling).peak_lr == pytest.approx(peak)


# Milestones are whole updates, and no representation error may move one.


def milestones(epochs, **recipe):
    recipe = dict(base_lr=1.0, base_batch_size=1, base_warmup_epochs=0, batch_size=1, dataset_size=10) | recipe
    return LEGW(**recipe, decay=MultiStep(epochs))


@pytest.mark.parametrize("given", [{}, {"steps_per_epoch": 10 / 3}])
def test_three_epochs_of_ten_thirds_are_ten_updates(given):
    schedule = milestones([3, 4.5, 6], batch_size=3, **given)
    assert schedule.milestones == (10, 15, 20)
    assert [schedule(9), schedule(10)] == pytest.approx([schedule.peak_lr, schedule.peak_lr / 10])


@pytest.mark.parametrize("size", [30, 110, 480])
def test_milestones_in_tenths_of_an_epoch(size):
    # What a ceil of floats would stumble over:
    assert any(math.ceil(i / 10 * size) != size // 10 * i for i in range(1, 1001))
    found = milestones([i / 10 for i in range(1, 1001)], dataset_size=size).milestones
    assert found == tuple(size // 10 * i for i in range(1, 1001))


def test_milestones_between_updates_are_passed_at_the_next_one():
    assert milestones([0.01, 0.11, 0.95, 1.01]).milestones == (1, 2, 10, 11)


def test_milestones_inside_the_warmup_count_from_its_end():
    schedule = milestones([0.5, 1.0, 3], base_warmup_epochs=2)
    assert schedule.milestones == (5, 10, 30)
    assert [schedule(t) for t in (9, 19)] == [0.5, 1.0]
    assert [schedule(t) for t in (20, 29, 30)] == pytest.approx([1e-2, 1e-2, 1e-3], rel=1e-14)


@pytest.mark.parametrize(("size", "batch", "every"), [(10, 3, "1"), (30, 1, "0.1"), (7, 3, "0.3"), (1000, 7, "2.4")])
def test_staircase_boundaries_are_exact(size, batch, every):
    decay = Exponential(0.999, 3, float(every))
    schedule = LEGW(1.0, batch, 0, batch_size=batch, dataset_size=size, decay=decay)
    for t in range(2000):
        passed = max(0, math.floor((t * Fraction(batch, size) - 3) / Fraction(every)) + 1)
        assert schedule(t) == pytest.approx(0.999**passed, rel=1e-10), t


# Copies


@pytest.mark.parametrize("decay", [decay for decay, _ in DECAYS], ids=lambda decay: str(decay)[:60])
def test_copies_are_equal(decay):
    schedule = LEGW(**RECIPE, decay=decay)
    copies = [
        LEGW.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        pickle.loads(pickle.dumps(schedule)),
        eval(repr(schedule)),
        dataclasses.replace(schedule),
    ]
    for copy in copies:
        assert copy == schedule and hash(copy) == hash(schedule)
        assert [copy(t) for t in UPDATES] == [schedule(t) for t in UPDATES]
        assert copy.milestones == schedule.milestones


def test_numpy_numbers_become_plain_ones():
    numbers = {name: np.float64(v) if isinstance(v, float) else np.int64(v) for name, v in RECIPE.items()}
    assert json.loads(json.dumps(LEGW(**numbers).to_dict())) == LEGW(**RECIPE).to_dict()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LEGW(**RECIPE).base_lr = 1.0


def test_with_batch_size_keeps_the_recipe_and_not_the_steps_per_epoch():
    schedule = LEGW(**RECIPE, decay=Cosine(), steps_per_epoch=8)
    other = schedule.with_batch_size(512)
    assert other == LEGW(**{**RECIPE, "batch_size": 512}, decay=Cosine())
    assert (other.peak_lr, other.warmup_epochs, other.warmup_steps) == (0.4, 8, 15.625)
    assert schedule.with_batch_size(512, steps_per_epoch=2).total_steps == 24


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    schedule = LEGW(**RECIPE, decay=MultiStep([3, 7]))
    ax = schedule.plot(color="red")
    assert schedule.with_batch_size(512).plot(ax, label="large") is ax
    first, second = ax.get_lines()
    assert (first.get_color(), first.get_label(), second.get_label()) == ("red", "batch 128", "large")
    epochs, lrs = first.get_data()
    assert (epochs[0], lrs[0]) == (0, schedule(0)) and 11.8 < epochs[-1] <= 12
    assert max(lrs) == schedule.peak_lr and min(lrs[1:]) == pytest.approx(0.002)
    assert ax.get_xlabel() == "epoch" and ax.get_ylabel() == "learning rate"
    matplotlib.pyplot.close(ax.figure)
