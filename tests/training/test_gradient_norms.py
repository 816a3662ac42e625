"""Where the noise scale's norms come from: micro-batches, and workers."""

import os

import pytest
import torch
from torch import nn

from fused_legw import DistributedNorms, GradientNoiseScale, MicroBatchNorms


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


def _micro_batch_norms(update, parts, model=None):
    """(mean squared norm of the parts' gradients, that of the gradient of all) of the first micro-batches of 2."""
    model = model or _model()
    inputs, labels = _data(update)
    gradients = []
    for x, y in list(zip(inputs.split(2), labels.split(2), strict=True))[:parts]:
        found = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]).double())
    gradients = torch.stack(gradients)
    return gradients.square().sum(1).mean(), gradients.mean(0).square().sum()


def _backward(model, update, parts, divisor):
    inputs, labels = _data(update)
    for x, y in list(zip(inputs.split(2), labels.split(2), strict=True))[:parts]:
        (nn.functional.cross_entropy(model(x), y) / divisor).backward()


@pytest.mark.parametrize("mean_of_parts", [True, False])
@pytest.mark.parametrize("told", [False, True])
def test_fewer_micro_batches_than_promised(mean_of_parts, told):
    """Each update counts with the big batch that it had; one of a single micro-batch does not count."""
    model, noise, expected = (
        _model(),
        GradientNoiseScale(2, 8),
        GradientNoiseScale(
            2,
            8,
        ),
    )
    with MicroBatchNorms(noise, model.parameters(), mean_of_parts=mean_of_parts) as norms:
        for update, parts in enumerate([4, 2, 1, 3]):
            model.zero_grad()
            _backward(model, update, parts, parts if mean_of_parts else 1)
            norms.step(micro_batches=parts if told else None)
            if parts > 1:
                small, big = _micro_batch_norms(update, parts)
                trace = (small - big) / (1 / 2 - 1 / (2 * parts))
                # What a big batch of 8 would have shown of the same tr(Sigma) and |G|^2.
                grad_sq = big - trace / (2 * parts)
                expected.update(grad_sq + trace / 2, grad_sq + trace / 8)
    assert noise.updates == 3
    assert (noise.trace, noise.grad_sq) == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)


@pytest.mark.parametrize("divisor", [2, 4])
def test_two_of_four_whatever_the_loss_was_divided_by(divisor):
    """The noise scale of an update does not depend on the divisor."""
    w, noise = torch.zeros(2, requires_grad=True), GradientNoiseScale(1, 4)
    with MicroBatchNorms(noise, [w]) as norms:
        for sample in [3.0, 1.0], [4.0, 0.0]:
            ((w * torch.tensor(sample)).sum() / divisor).backward()
        norms.step()
    small, big = (10 + 16) / 2, 3.5**2 + 0.5**2
    trace, grad_sq = (small - big) / (1 - 1 / 2), 2 * big - small
    assert noise.noise_scale == pytest.approx(trace / grad_sq) == pytest.approx(1 / 12)


def test_a_tensor_that_a_pass_does_not_reach_had_gradient_0_there():
    """As experts do; `norms` counts three micro-batches by the tensor that all passes reach."""
    shared, first, second = (torch.ones(2, requires_grad=True) for _ in range(3))
    noise = GradientNoiseScale(1, 3)
    with MicroBatchNorms(noise, [shared, first, second]) as norms:
        for scale, expert in (3.0, first), (4.0, second), (5.0, second):
            (scale * (shared + expert).sum() / 3).backward()
        norms.step()
    # Squared norms: 4 * 9, 4 * 16, 4 * 25, of which half is the shared tensor's; sums 2 * (12^2 + 3^2 + 9^2) / 9.
    small, big = 4 * 50 / 3, 2 * (144 + 9 + 81) / 9
    assert noise.trace == pytest.approx((small - big) / (1 - 1 / 3))
    assert noise.grad_sq == pytest.approx((3 * big - small) / 2)


def test_told_where_no_tensor_is_in_every_pass():
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    noise = GradientNoiseScale(1, 2)
    with MicroBatchNorms(noise, [first, second]) as norms:
        (3.0 * first.sum() / 2).backward()
        (4.0 * second.sum() / 2).backward()
        norms.step(micro_batches=2)
    small, big = (2 * 9 + 2 * 16) / 2, (2 * 9 + 2 * 16) / 4
    assert (noise.trace, noise.grad_sq) == pytest.approx(((small - big) * 2, 2 * big - small))


def test_two_passes_over_different_tensors_are_one_micro_batch():
    both = [torch.ones(2, requires_grad=True) for _ in range(2)]
    noise = GradientNoiseScale(1, 2)
    with MicroBatchNorms(noise, both) as norms:
        for scale in 3.0, 4.0:
            for w in both:
                (scale * w.sum() / 2).backward()
        norms.step()
    assert noise.updates == 1
    assert noise.trace == pytest.approx((2 * (9 + 16) - 2 * 2 * 3.5**2) * 2)


@pytest.mark.parametrize(
    ("windows", "told", "message"),
    [
        (2, None, r"8 passes were over a parameter of shape \(6, 6\), but noise.big_batch=8 has 4 micro-batches"),
        (1, 2, r"4 passes were over a parameter of shape \(6, 6\), but micro_batches=2"),
        (1, 5, r"micro_batches=5, but noise.big_batch=8 has 4 micro-batches"),
    ],
)
def test_more_micro_batches_than_promised(windows, told, message):
    """Two backward passes per micro-batch are refused too: the norm of their sum is not known."""
    model, noise, expected = _model(), GradientNoiseScale(2, 8), GradientNoiseScale(2, 8)
    with MicroBatchNorms(noise, model.parameters()) as norms:
        for _ in range(windows):
            _backward(model, 0, 4, 4)
        with pytest.raises(RuntimeError, match=message):
            norms.step(micro_batches=told)
        assert noise.updates == 0
        with pytest.raises(RuntimeError, match="no gradient was seen"):  # the window is cleared
            norms.step()
        model.zero_grad()
        _backward(model, 1, 4, 4)
        norms.step()
    expected.update(*_micro_batch_norms(1, 4))
    assert (noise.trace, noise.grad_sq) == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "2"])
def test_a_number_of_micro_batches_is_checked_before_anything_changes(wrong):
    model, noise = _model(), GradientNoiseScale(2, 8)
    with MicroBatchNorms(noise, model.parameters()) as norms:
        _backward(model, 0, 4, 4)
        with pytest.raises(ValueError, match="micro_batches must be a positive integer, got"):
            norms.step(micro_batches=wrong)
        norms.step()
    assert noise.updates == 1


def test_torch_autograd_grad_is_no_pass():
    """A gradient penalty runs the hooks of the weights, and adds nothing to `.grad`."""
    model, noise, expected = _model(), GradientNoiseScale(2, 8), GradientNoiseScale(2, 8)
    with MicroBatchNorms(noise, model.parameters()) as norms:
        for x, y in zip(*(t.split(2) for t in _data(0)), strict=True):
            loss = nn.functional.cross_entropy(model(x), y)
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            (loss / 4).backward()
        norms.step()
    expected.update(*_micro_batch_norms(0, 4))
    assert (noise.trace, noise.grad_sq) == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_share_a_weight(reentrant):
    """A re-entrant checkpoint adds each use of a weight by itself: two passes over it where there is one."""
    from torch.utils.checkpoint import checkpoint

    first, shared = (torch.full((2,), 0.5, requires_grad=True) for _ in range(2))
    noise = GradientNoiseScale(1, 4)
    with MicroBatchNorms(noise, [first, shared]) as norms:
        for sample in 1.0, 2.0:
            x = sample * first
            for _ in range(2):
                x = checkpoint(lambda x: x * shared, x, use_reentrant=reentrant)
            (x.sum() / 2).backward()
        if reentrant:
            with pytest.raises(RuntimeError, match="4 passes were over one parameter and 2 over another"):
                norms.step()
            assert noise.updates == 0
            return
        norms.step()
    # d/d first = sample * shared^2, d/d shared = sample * 2 * first * shared, two elements each.
    unit = 2 * (0.25**2 + 0.5**2)
    small, big = unit * (1 + 4) / 2, unit * 1.5**2
    assert (noise.trace, noise.grad_sq) == pytest.approx(((small - big) * 2, 2 * big - small))


def _refusal(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    return ""


def _accumulate(rank, model, norms, noise):
    """Three updates of two micro-batches on each worker, the first of them without communication."""
    noise.load_state_dict(GradientNoiseScale(4, 8).state_dict())
    for update in range(3):
        model.zero_grad()
        first, second = zip(*(x.chunk(2)[rank].chunk(2) for x in _data(update)), strict=True)
        with model.no_sync():
            (nn.functional.cross_entropy(model(first[0]), first[1]) / 2).backward()
        (nn.functional.cross_entropy(model(second[0]), second[1]) / 2).backward()
        norms.step()
    return noise.trace, noise.grad_sq


def _twice(model, norms):
    for _ in range(2):
        model(_data(0)[0]).sum().backward()
    norms.step()


def _worker(rank, file, results):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    early = MicroBatchNorms(GradientNoiseScale(2, 4), _model().parameters())
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
    found = noise.trace, noise.grad_sq
    accumulated = _accumulate(rank, measured, norms, noise)
    refused = [
        _refusal(ValueError, lambda: DistributedNorms(GradientNoiseScale(4, 16))),
        _refusal(RuntimeError, lambda: MicroBatchNorms(GradientNoiseScale(2, 4), measured.parameters())),
        _refusal(RuntimeError, early.step),
        _refusal(RuntimeError, lambda: _twice(measured, norms)),
    ]
    torch.save((found, accumulated, same, refused), f"{results}/{rank}.pt")
    # Without destructors: gloo's joins its threads while it holds the GIL, which one of them may be waiting for.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_workers_and_two_micro_batches_agree(tmp_path):
    torch.multiprocessing.spawn(_worker, (tmp_path / "store", tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = _expected(2, 3)
    for plain, accumulated, same, refused in found:
        for values in plain, accumulated:
            assert values == pytest.approx((expected.trace, expected.grad_sq), rel=1e-5)
        assert same  # the gradients are those without the hook, to the bit
        assert refused[0] == "noise.big_batch must be 2 workers times small_batch=4, got 16"
        assert all(text.startswith("use DistributedNorms: there are 2 workers") for text in refused[1:3])
        assert "there were 2 passes since the last step(), not 1" in refused[3]
    assert found[0] == found[1]
