"""The gradient noise scale: its estimates, their interval, and where the norms come from."""

import math
import os
from copy import deepcopy

import pytest
import torch
from torch import nn

from fused_legw import DistributedNorms, GradientNoiseScale, MicroBatchNorms
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


# Sources


def _model():
    torch.manual_seed(0)
    first = nn.Linear(6, 6)
    return nn.Sequential(first, nn.Tanh(), first, nn.Linear(6, 2))  # the first layer twice: shared weights


def _data(update):
    random = torch.Generator().manual_seed(update)
    return torch.randn(8, 6, generator=random), torch.randint(0, 2, (8,), generator=random)


def _expected(parts, updates):
    """From whole gradients of every part, one at a time."""
    model, noise = _model(), GradientNoiseScale(8 // parts, 8)
    for update in range(updates):
        gradients = []
        for inputs, labels in zip(*(x.chunk(parts) for x in _data(update)), strict=True):
            found = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), list(model.parameters()))
            gradients.append(torch.cat([g.flatten() for g in found]).double())
        gradients = torch.stack(gradients)
        noise.update(gradients.square().sum(1).mean(), gradients.mean(0).square().sum())
    return noise


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("mean_of_parts", [True, False])
def test_micro_batches(parts, mean_of_parts):
    model, noise = _model(), GradientNoiseScale(8 // parts, 8)
    unused = torch.ones(3, requires_grad=True)
    frozen = torch.ones(3)
    scale = 1024.0
    with MicroBatchNorms(noise, [*model.parameters(), unused, frozen], mean_of_parts=mean_of_parts) as norms:
        for update in range(3):
            model.zero_grad()
            for inputs, labels in zip(*(x.chunk(parts) for x in _data(update)), strict=True):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                (scale * loss / (parts if mean_of_parts else 1)).backward()
            norms.step(loss_scale=scale)
    expected = _expected(parts, 3)
    assert (noise.trace, noise.grad_sq) == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)
    model(_data(0)[0]).sum().backward()  # the hooks are gone
    with pytest.raises(RuntimeError, match="no gradient was seen"):
        norms.step()


def test_micro_batches_refuse():
    with pytest.raises(ValueError, match=r"noise.big_batch must be a multiple of small_batch=3, got 8"):
        MicroBatchNorms(GradientNoiseScale(3, 8), _model().parameters())
    with pytest.raises(ValueError, match="params must be parameters that require gradients"):
        MicroBatchNorms(GradientNoiseScale(4, 8), [torch.ones(2)])


def test_costs_one_read_per_micro_batch_and_one_per_update(monkeypatch):
    read = []
    original = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, **k: read.append(x.numel()) or original(x, **k))
    model, noise = _model(), GradientNoiseScale(4, 8)
    size = sum(p.numel() for p in model.parameters())
    with MicroBatchNorms(noise, model.parameters()) as norms:
        for inputs in _data(0)[0].chunk(2):
            (model(inputs).sum() / 2).backward()
        assert sum(read) == 2 * size
        norms.step()
        assert sum(read) == 3 * size
    model(_data(0)[0]).sum().backward()
    assert sum(read) == 3 * size


def _worker(rank, file, results):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    measured, plain = (DistributedDataParallel(_model(), bucket_cap_mb=1e-4) for _ in range(2))
    noise = GradientNoiseScale(4, 8)
    norms = DistributedNorms(noise)
    measured.register_comm_hook(norms, DistributedNorms.hook)
    same = True
    for update in range(3):
        inputs, labels = (x.chunk(2)[rank] for x in _data(update))
        for model in (measured, plain):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
        norms.step()
        pairs = zip(measured.parameters(), plain.parameters(), strict=True)
        same = same and all(torch.equal(a.grad, b.grad) for a, b in pairs)
    try:
        DistributedNorms(GradientNoiseScale(4, 16))
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save((noise.trace, noise.grad_sq, same, refused), f"{results}/{rank}.pt")
    # Without destructors: gloo's joins its threads while it holds the GIL, which one of them may be waiting for.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_workers_and_two_micro_batches_agree(tmp_path):
    torch.multiprocessing.spawn(_worker, (tmp_path / "store", tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = _expected(2, 3)
    for trace, grad_sq, same, refused in found:
        assert (trace, grad_sq) == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)
        assert same  # the gradients are those without the hook, to the bit
        assert refused == "noise.big_batch must be 2 workers times small_batch=4, got 16"
    assert found[0][:2] == found[1][:2]


def test_state_is_copied():
    noise = GradientNoiseScale(1, 2)
    noise.update(2.0, 1.0)
    twin = deepcopy(noise)
    noise.update(9.0, 1.0)
    assert twin.updates == 1
    assert twin.trace == 2
