"""The gradient noise scale: its estimates and their interval."""

import math
from copy import deepcopy

import pytest
import torch

from fused_legw import GradientNoiseScale
from fused_legw.training.noise_scale import _student, time_and_samples


def _norms(small, big, seed, updates, dimensions=30):
    """(small, big) squared norms of Gaussian gradients; returns them with tr(Sigma) and |G|^2, which are known."""
    random = torch.Generator().manual_seed(seed)
    mean = torch.linspace(0.2, 1, dimensions, dtype=torch.float64)
    deviation = torch.linspace(1, 4, dimensions, dtype=torch.float64)
    parts = big // small
    noise = torch.randn(updates, parts, dimensions, generator=random, dtype=torch.float64)
    gradients = mean + noise * deviation / math.sqrt(small)
    return (
        gradients.square().sum(-1).mean(-1).tolist(),
        gradients.mean(1).square().sum(-1).tolist(),
        float(deviation.square().sum()),
        float(mean.square().sum()),
    )


def _measured(seed, *, updates=400, small=4, big=16, **options):
    noise = GradientNoiseScale(small, big, **options)
    smalls, bigs, trace, grad_sq = _norms(small, big, seed, updates)
    for pair in zip(smalls, bigs, strict=True):
        noise.update(*pair)
    return noise, trace, grad_sq


def test_estimates_have_no_bias():
    found = [_measured(seed, updates=200, decay=0.9) for seed in range(40)]
    _, trace, grad_sq = found[0]
    assert sum(noise.trace for noise, *_ in found) / 40 == pytest.approx(trace, rel=0.03)
    assert sum(noise.grad_sq for noise, *_ in found) / 40 == pytest.approx(grad_sq, rel=0.1)


@pytest.mark.parametrize("decay", [0.95, 0.99])
def test_interval_covers_the_truth(decay):
    found = [_measured(seed, decay=decay) for seed in range(100)]
    _, trace, grad_sq = found[0]
    intervals = [noise.interval() for noise, *_ in found]
    covered = sum(low <= trace / grad_sq <= high for low, high in intervals)
    assert covered >= 90
    # And they are worth having: the widest half of them says more than the order of magnitude.
    assert sorted(high / max(low, 1e-9) for low, high in intervals)[50] < (4 if decay == 0.99 else 30)


def test_interval_of_lower_confidence_covers_less():
    found = [_measured(seed, confidence=0.5) for seed in range(100)]
    truth = found[0][1] / found[0][2]
    covered = sum(low <= truth <= high for low, high in (noise.interval() for noise, *_ in found))
    assert 35 <= covered <= 65


def test_averages_are_debiased_and_weigh_the_last_most():
    noise = GradientNoiseScale(1, 2, decay=0.5)
    for trace, grad_sq in ((8.0, 2.0), (4.0, 1.0), (1.0, 3.0)):
        noise.update(grad_sq + trace, grad_sq + trace / 2)
    weights = 0.25, 0.5, 1.0
    assert noise.trace == pytest.approx((8 * 0.25 + 4 * 0.5 + 1) / sum(weights))
    assert noise.grad_sq == pytest.approx((2 * 0.25 + 0.5 + 3) / sum(weights))
    assert noise.noise_scale == pytest.approx(noise.trace / noise.grad_sq)
    assert noise.updates == 3


def test_clamps_only_after_averaging():
    noise = GradientNoiseScale(1, 2, decay=0.0)
    noise.update(1.0, 0.4)  # |G|^2 is estimated as -0.2
    assert noise.grad_sq == pytest.approx(-0.2)
    assert noise.noise_scale == math.inf
    assert noise.interval() == (0.0, math.inf)
    noise = GradientNoiseScale(1, 2, decay=0.5)
    noise.update(1.0, 0.4)
    noise.update(1.0, 0.9)
    assert noise.grad_sq == pytest.approx((0.5 * -0.2 + 0.8) / 1.5)
    noise = GradientNoiseScale(1, 2)
    noise.update(1.0, 1.2)  # tr(Sigma) is estimated as -0.4
    assert noise.trace == pytest.approx(-0.4)
    assert noise.noise_scale == 0


def test_high_is_infinite_where_the_gradient_cannot_be_told_from_zero():
    noise = GradientNoiseScale(1, 2)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        one, other = torch.randn(2, 10, generator=random)
        noise.update((one.square().sum() + other.square().sum()) / 2, ((one + other) / 2).square().sum())
    low, high = noise.interval()
    assert low > 1
    assert high == math.inf


def test_what_is_not_finite_does_not_count():
    noise, other = GradientNoiseScale(1, 2), GradientNoiseScale(1, 2)
    for pair in ((3.0, 2.0), (math.inf, 1.0), (1.0, math.nan), (5.0, 4.0)):
        noise.update(*map(torch.tensor, pair))
        if all(map(math.isfinite, pair)):
            other.update(*pair)
    assert noise.updates == 2
    assert (noise.trace, noise.grad_sq, noise.interval()) == (other.trace, other.grad_sq, other.interval())


def test_goes_on_from_its_state(tmp_path):
    whole, _, _ = _measured(0, updates=50)
    smalls, bigs, _, _ = _norms(4, 16, 0, 50)
    first = GradientNoiseScale(4, 16)
    for pair in zip(smalls[:20], bigs[:20], strict=True):
        first.update(*pair)
    torch.save(first.state_dict(), tmp_path / "noise.pt")
    second = GradientNoiseScale(4, 16)
    second.load_state_dict(torch.load(tmp_path / "noise.pt", weights_only=True))
    for pair in zip(smalls[20:], bigs[20:], strict=True):
        second.update(*pair)
    assert (second.trace, second.grad_sq, second.interval(), second.updates) == (
        whole.trace, whole.grad_sq, whole.interval(), 50
    )  # fmt: skip
    before = second.state_dict()
    for wrong, message in (
        ({}, "are missing"),
        ({**first.state_dict(), "small_batch": 2}, "state_dict has small_batch=2, but this one has 4"),
        ({**first.state_dict(), "sums": torch.zeros(2)}, "must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(wrong)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in second.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(small_batch=0, big_batch=2), "small_batch must be"),
        (dict(small_batch=2, big_batch=2.5), "big_batch must be"),
        (dict(small_batch=4, big_batch=4), "small_batch must be below big_batch=4, got 4"),
        (dict(small_batch=1, big_batch=2, decay=1.0), "decay must be below 1, got 1.0"),
        (dict(small_batch=1, big_batch=2, decay=-0.1), "decay must be"),
        (dict(small_batch=1, big_batch=2, confidence=1), "confidence must be below 1, got 1"),
        (dict(small_batch=1, big_batch=2, confidence=0), "confidence must be"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNoiseScale(**arguments)


@pytest.mark.parametrize("wrong", ["x", None, -1.0, torch.ones(2)])
def test_refuses_norms(wrong):
    noise = GradientNoiseScale(1, 2)
    for pair in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(ValueError, match="sq_norm must be"):
            noise.update(*pair)
    for read in (lambda: noise.trace, lambda: noise.noise_scale, noise.interval):
        with pytest.raises(RuntimeError, match="before the first update"):
            read()


def test_student_quantiles():
    # From tables of Student's t, two-sided 95 %.
    for freedom, value in ((3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert _student(0.975, freedom) == pytest.approx(value, rel=0.011 if freedom == 3 else 2e-3)


def test_time_and_samples_lie_on_the_curve():
    for batch in 1, 64, 4096:
        updates, samples = time_and_samples(batch, 512)
        assert (updates - 1) * (samples - 1) == pytest.approx(1)
        assert samples / updates == pytest.approx(batch / 512)


def test_state_is_copied():
    noise = GradientNoiseScale(1, 2)
    noise.update(2.0, 1.0)
    twin = deepcopy(noise)
    noise.update(9.0, 1.0)
    assert twin.updates == 1
    assert twin.trace == 2


def test_another_big_batch_is_checked():
    noise = GradientNoiseScale(2, 8)
    for wrong, message in (2, "big_batch must be above small_batch=2, got 2"), (2.5, "big_batch must be a positive"):
        with pytest.raises(ValueError, match=message):
            noise.update(2.0, 1.0, big_batch=wrong)
    assert noise.updates == 0
    noise.update(2.0, 1.0, big_batch=4)
    assert (noise.trace, noise.grad_sq) == pytest.approx((1 / (1 / 2 - 1 / 4), (4 * 1 - 2 * 2) / 2))
