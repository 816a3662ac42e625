"""Steps that are skipped, unscaled and clipped, against the kept steps alone and against torch's separate calls."""

from __future__ import annotations

import pytest
import torch
from cases import give_gradients, legw, make_params, same, twins
from torch import Tensor

from fused_legw import LAMB, LARS, SGD, Adam, AdamW, Cosine, GradScaler, reference

FAMILY = [
    (SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    (LARS, dict(weight_decay=0.1, trust_coefficient=0.1)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict()),
    (LAMB, dict(variant="apex")),
]
SHAPES = [(5, 7), (20,), ()]
BAD = {0, 1, 4, 5, 9}  # steps with a gradient that is not finite, the first among them


def _spoil(params: list[Tensor], step: int) -> None:
    if step in BAD:
        params[step % 2].grad.view(-1)[3] = [torch.inf, -torch.inf, torch.nan][step % 3]


@pytest.mark.parametrize(("cls", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["skip_nonfinite", "our scaler", "torch's scaler"])
def test_skipped_steps_never_were(backend, device, cls, options, dtype, how):
    params = make_params(dtype, device, SHAPES)
    kept = twins(params)
    common = dict(lr=legw(Cosine()), tile=16, backend=backend, **options)
    skipping = how == "skip_nonfinite"
    ours, other = cls(params, skip_nonfinite=skipping, **common), cls(kept, skip_nonfinite=skipping, **common)
    scaler = None if skipping else (GradScaler if how == "our scaler" else torch.amp.GradScaler)(device, init_scale=1.0)
    for step in range(12):
        give_gradients(step, params, kept, skip=False)
        _spoil(params, step)
        if scaler is None:
            ours.step()
        else:
            scaler.scale(torch.zeros((), device=device))  # which makes its scale
            scaler.step(ours)
            scaler.update(1.0)
        if step not in BAD:
            other.step()
        if step == 1:
            assert ours.state_dict()["state"] == {}, "a skipped first step leaves no state"
    same(params, kept)
    a, b = ours.state_dict(), other.state_dict()
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert ours.steps_applied == other.steps_applied == 12 - len(BAD)
    assert ours.get_last_lr() == other.get_last_lr()
    assert int(ours.steps_skipped) == len(BAD)


@pytest.mark.parametrize(("cls", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchs_three_calls(backend, device, cls, options, dtype):
    """max_grad_norm, grad_scale and found_inf together: unscale_, clip_grad_norm_, then a step."""
    params = make_params(dtype, device, SHAPES)
    theirs = twins(params)
    options = options | (dict(variant="paper") if cls is LAMB else {})  # apex's clipping is not torch's
    ours = cls(params, lr=legw(Cosine()), max_grad_norm=0.5, tile=16, backend=backend, **options)
    twin = getattr(reference, cls.__name__)(theirs, lr=legw(Cosine()), **options)
    for step in range(10):
        give_gradients(step, params, theirs)
        ours.grad_scale = torch.full((1,), 1024.0, device=device)
        ours.found_inf = torch.zeros(1, device=device)
        for p in params:
            if p.grad is not None:
                p.grad = p.grad * 1024
        before = [None if p.grad is None else p.grad.clone() for p in params]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        ours.step()
        twin.step()
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=tolerance)
        for p, g in zip(params, before, strict=True):
            assert g is None or torch.equal(p.grad, g), "gradients are not written back"
    torch.testing.assert_close(params, theirs, rtol=tolerance, atol=tolerance)


def test_our_scaler_is_torchs(backend, device):
    """The same scales, skipped steps and results; after unscale_ too."""
    runs = []
    for make_scaler in (GradScaler, torch.amp.GradScaler):
        (p,) = make_params(torch.float32, device, [(20,)])
        optimizer = Adam([p], lr=legw(), max_grad_norm=1.0, tile=16, backend=backend)
        scaler = make_scaler(device, init_scale=64.0, growth_interval=3)
        scales = []
        for step in range(16):
            optimizer.zero_grad()
            value = torch.inf if step in (0, 5, 6) else float(step)
            scaler.scale((p * value).sum()).backward()
            if step % 4 == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        runs.append((scales, optimizer.steps_applied, p.detach()))
    assert runs[0][:2] == runs[1][:2] and runs[0][1] == 13
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-6, atol=1e-7)


def test_our_scaler_takes_its_scale_back_after_an_error(device):
    (p,) = make_params(torch.float32, device, [(4,)])
    optimizer, scaler = SGD([p], lr=legw()), GradScaler(device)
    scaler.scale(p.sum()).backward()
    optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(RuntimeError, match=r"was set to 7\.0"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys() and not optimizer._finds_nonfinite


@pytest.mark.parametrize(("cls", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", ""))
def test_without_a_global_norm_a_bad_gradient_stays_in_its_tensor(backend, device, cls, options):
    params = make_params(torch.float32, device, SHAPES)
    alone = twins(params[:1])
    options = options | (dict(variant="paper") if cls is LAMB else {})
    optimizers = [cls(x, lr=0.1, tile=16, backend=backend, **options) for x in (params, alone)]
    for step in range(2):
        give_gradients(step, params[:1], alone, skip=False)
        params[1].grad = torch.full_like(params[1], torch.nan)
        for optimizer in optimizers:
            optimizer.step()
    same(params[:1], alone)
    assert params[0].isfinite().all() and not params[1].isfinite().any()


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_bad_max_grad_norm(device, value):
    with pytest.raises(ValueError, match=f"max_grad_norm must be greater than 0, or None, got {value}"):
        SGD(make_params(torch.float32, device, [(4,)]), max_grad_norm=value)


def test_clipping_squares_that_overflow(backend, device):
    (p,) = make_params(torch.float32, device, [(50,)])
    before = p.detach().clone()
    optimizer = SGD([p], lr=1.0, max_grad_norm=1.0, tile=16, backend=backend)
    p.grad = torch.full_like(p, 1e25)
    optimizer.step()
    torch.testing.assert_close(before - p.detach(), torch.full_like(p, 50**-0.5), rtol=1e-4, atol=1e-6)
    assert float(optimizer.grad_norm) == pytest.approx(1e25 * 50**0.5)


def test_norms_that_nobody_took(device):
    (p,) = make_params(torch.float32, device, [(4,)])
    optimizer = SGD([p], lr=0.1)
    for ask, message in (
        (optimizer.grad_norms, "gradient norms are not known"),
        (optimizer.param_norms, "SGD takes no norms of its parameters"),
        (optimizer.trust_ratios, "SGD has no trust ratios"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ask()
