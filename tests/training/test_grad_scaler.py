"""Steps that were not finite: skipped bit for bit, by the optimizer itself and by both GradScalers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import fused_legw
from fused_legw import LAMB, LARS, SGD, Adam, AdamP, Cosine
from tests.support.cases import give_gradients, legw, make_params, same, twins
from tests.support.machine import HAS_TRITON
from tests.support.scalers import FAMILY, SCALERS, TAKES_FUSED, family, fused_option, make_scaler

HOW = ["skip_nonfinite", "found_inf", *SCALERS]


def _mixed(device: str) -> list[Tensor]:
    """Two dtypes, so two launches that must agree; the bfloat16 ones have masters."""
    return make_params(torch.float32, device, [(20,), (0,)]) + make_params(torch.bfloat16, device, [(3, 4), ()])


def _mask(cls, how: str, steps: int) -> list[bool]:
    """Which steps to spoil; each class and each way is seen with the first steps among them and without."""
    chance = random.Random(f"{cls.__name__} {how}")
    first = ([c for c, _ in FAMILY].index(cls) + HOW.index(how)) % 2 == 0
    return [first] * 2 + [chance.random() < 0.4 for _ in range(steps - 2)]


def _spoil(params: list[Tensor], step: int) -> None:
    """One element of one gradient: inf, -inf or nan."""
    chance = random.Random(step)
    g = chance.choice([p.grad for p in params if p.grad is not None and p.numel()])
    g.view(-1)[chance.randrange(g.numel())] = chance.choice([torch.inf, -torch.inf, torch.nan])


def _step(optimizer, params: list[Tensor], bad: bool, how: str, scaler) -> None:
    if how == "found_inf":
        optimizer.found_inf = torch.full((1,), float(bad), device=params[0].device)
    if scaler is None:
        optimizer.step()
        return
    for p in params:
        if p.grad is not None:
            p.grad = p.grad * scaler.get_scale()  # a power of two: exact
    scaler.step(optimizer)
    scaler.update()


@family
@pytest.mark.parametrize("how", HOW)
def test_skipped_steps_never_were(backend, device, cls, options, how):
    if fused_option(how) and cls not in TAKES_FUSED:
        pytest.skip("only the drop-ins for torch's classes take fused")
    params = _mixed(device)
    kept = twins(params)
    common = dict(lr=legw(Cosine()), tile=16, backend=backend, **options, **fused_option(how))
    ours, plain = cls(params, skip_nonfinite=how == "skip_nonfinite", **common), cls(kept, **common)
    scaler = make_scaler(how, device) if how in SCALERS else None
    mask = _mask(cls, how, 9)
    for step, bad in enumerate(mask):
        give_gradients(step, params, kept)
        if bad:
            _spoil(params, step)
        _step(ours, params, bad, how, scaler)
        if not bad:
            plain.step()
        assert not all(mask[: step + 1]) or ours.state_dict()["state"] == {}, "nothing has happened yet"
    same(params, kept)
    a, b = ours.state_dict(), plain.state_dict()
    assert a["state"].keys() == b["state"].keys()
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    # "lr" there is what the host knows of; get_last_lr below asks the device.
    assert [g | dict(lr=None) for g in a["param_groups"]] == [g | dict(lr=None) for g in b["param_groups"]]
    assert ours.steps_applied == plain.steps_applied == mask.count(False)
    assert ours.get_last_lr() == plain.get_last_lr()
    # Without fused=True torch's scaler leaves out the call of `step`.
    assert int(ours.steps_skipped) == (0 if how == "torch's" else mask.count(True))


@pytest.mark.parametrize("cls", [SGD, Adam, LAMB])
def test_going_on_from_a_skipped_first_step(backend, device, cls):
    """A copy, a checkpoint and a rebuild right after it know of no update either."""
    options = dict(lr=legw(Cosine()), skip_nonfinite=True, tile=16, backend=backend)
    options |= dict(momentum=0.9, dampening=0.5) if cls is SGD else {}
    params = make_params(torch.float32, device, [(20,), (3,)])
    kept = twins(params)
    first = cls(params, **options)
    give_gradients(0, params, skip=False)
    _spoil(params, 0)
    first.step()
    loaded = twins(params)
    resumed, plain = cls(loaded, **options), cls(kept, **options)
    resumed.load_state_dict(first.state_dict())
    params[0].data = params[0].data.clone()  # the next step builds its buffers anew
    for step in range(1, 4):
        give_gradients(step, params, loaded, kept)
        for optimizer in (first, resumed, plain):
            optimizer.step()
    same(params, kept)
    same(loaded, kept)
    assert first.steps_applied == resumed.steps_applied == plain.steps_applied == 3
    assert int(first.steps_skipped) == 1


def _scaled_run(optimizer, scaler, p: Tensor, steps: int = 30):
    """(scales, which steps moved the weights) of a run with infinite losses and, now and then, an explicit unscale_."""
    scales, moved = [], []
    for step in range(steps):
        optimizer.zero_grad()
        value = torch.inf if step in (0, 5, 6, 17, 24) else 1.0 + step % 3
        scaler.scale((p.square() * value).sum()).backward()
        if step in (3, 6, 20):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p], 0.5)
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, p))
    return scales, moved


@pytest.mark.parametrize(("cls", "clip"), [(SGD, None), (SGD, 0.7), (LARS, None), (Adam, None), (LAMB, 0.7)])
def test_our_scaler_is_torchs(backend, device, cls, clip):
    runs, results = [], []
    for how in SCALERS:
        (p,) = make_params(torch.float32, device, [(9,)])
        optimizer = cls(
            [p],
            lr=0.01,
            max_grad_norm=clip,
            tile=16,
            backend=backend,
            **(fused_option(how) if cls in TAKES_FUSED else {}),
        )
        runs.append(_scaled_run(optimizer, make_scaler(how, device, init_scale=64.0), p))
        results.append(p.detach())
        called = how == "ours" or optimizer.defaults.get("fused")
        assert optimizer.steps_applied == 25 and int(optimizer.steps_skipped) == (5 if called else 0)
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    assert runs[0] == runs[1] == runs[2] and runs[0][1].count(False) == 5
    same(results[:1], results[1:2])
    same(results[:1], results[2:])


def test_other_optimizers_are_torchs_business(backend, device):
    """One scaler for a fused optimizer and torch's own; each skips alone, and either lowers the scale."""
    runs = []
    for how in SCALERS:
        p, q = make_params(torch.float32, device, [(9,), (5,)])
        optimizers = [Adam([p], lr=0.01, tile=16, backend=backend), torch.optim.SGD([q], lr=0.01)]
        scaler, scales = make_scaler(how, device), []
        for step in range(6):
            loss = p.sum() * (torch.inf if step == 1 else 1) + q.sum() * (torch.inf if step in (1, 3) else 2)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append((scales, optimizers[0].steps_applied, p.tolist(), q.tolist()))
    assert runs[0] == runs[1] == runs[2] and runs[0][1] == 5


def test_explicit_unscale_is_torchs(backend, device):
    (p,) = make_params(torch.float32, device, [(9,)])
    optimizer, scaler = Adam([p], lr=0.01, tile=16, backend=backend), make_scaler("ours", device)
    scaler.scale(3 * p.sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(p.grad, torch.full_like(p, 3.0)), "it writes the gradients"
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)


@pytest.mark.parametrize("options", [dict(), dict(max_grad_norm=0.1)], ids=str)
def test_our_scaler_writes_no_gradient(backend, device, options):
    params = make_params(torch.float32, device, [(9,), (20,)])
    optimizer = SGD(params, lr=0.1, tile=16, backend=backend, **options)
    scaler = make_scaler("ours", device)
    for bad in (False, True):
        give_gradients(0, params, skip=False)
        if bad:
            _spoil(params, 1)
        before = [(p.grad.clone(), p.grad._version) for p in params]
        scaler.step(optimizer)
        scaler.update()
        for p, (g, version) in zip(params, before, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
            assert p.grad._version == version
    assert scaler.get_scale() == 512 and optimizer.steps_applied == 1


def test_an_error_leaves_no_scale_behind_and_the_step_can_be_repeated(backend, device):
    (p,) = make_params(torch.float32, device, [(4,)])
    before = p.detach().clone()
    optimizer = SGD([p], lr=legw(), tile=16, backend=backend)
    scaler, shown = make_scaler("ours", device), optimizer.param_groups[0]["lr"]
    scaler.scale(p.sum()).backward()
    optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(RuntimeError, match=r"was set to 7\.0"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf", "_finds_nonfinite", "_takes_scale"} & {
        k for k, v in vars(optimizer).items() if v
    }
    same([p.detach()], [before])
    optimizer.param_groups[0]["lr"] = shown
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.detach(), before - legw()(0))
    p.grad.fill_(torch.inf)  # without the scaler, and without its skipping
    optimizer.step()
    assert optimizer.steps_applied == 2 and not p.isfinite().any()


@family
def test_launches_under_both_scalers(device, launches, cls, options):
    """With found_inf from torch's scaler and no clipping nothing is measured but what trust ratios need."""
    if not HAS_TRITON:
        pytest.skip("Triton's kernels need a GPU or TRITON_INTERPRET=1")
    updates = ["factors_kernel"] if cls is AdamP else []
    measured = ["norm_kernel", *updates, "update_kernel"]
    twice = measured[:1] + measured if cls is LAMB else measured
    for how, expected in (("ours", twice), ("torch's", measured if cls in (LARS, LAMB) else measured[1:])):
        params = make_params(torch.float32, device, [(9,), (20,)])
        optimizer, scaler = cls(params, lr=legw(), tile=16, backend="triton", **options), make_scaler(how, device)
        give_gradients(0, params, skip=False)
        launches.clear()
        scaler.step(optimizer)
        assert [name for name, _ in launches] == expected


def test_the_scalers_state_round_trips(device):
    runs = []
    for resumed in (False, True):
        (p,) = make_params(torch.float32, device, [(9,)])
        optimizer, scaler = SGD([p], lr=0.01), make_scaler("ours", device)
        scales, _ = _scaled_run(optimizer, scaler, p, 8)
        if resumed:
            state = scaler.state_dict()
            scaler = fused_legw.GradScaler(device)
            scaler.load_state_dict(state)
            assert scaler.state_dict() == state
        runs.append((scales, _scaled_run(optimizer, scaler, p, 8), p.tolist()))
    assert runs[0] == runs[1]
