"""Clipping, AMP's scale and inf check in one step, against torch's separate calls; and the norms that a step takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, Cosine, reference
from tests.support.cases import give_gradients, legw, make_params, same, twins
from tests.support.machine import needs_other_grad_dtypes

FAMILY = [
    (SGD, dict(momentum=0.9, dampening=0.3)),
    (LARS, dict(trust_coefficient=0.1)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict()),
    (AdamP, dict(delta=0.5)),
    (LAMB, dict()),
]
family = pytest.mark.parametrize(("cls", "options"), FAMILY, ids=[cls.__name__ for cls, _ in FAMILY])
SHAPES = [(3, 7), (20,), (), (0,)]
SCALE = 1024.0
KINDS = [(torch.float64,), (torch.float32,), (torch.float32, torch.bfloat16, torch.float64)]  # dtypes, in turn


def _params(kind: tuple[torch.dtype, ...], device: str) -> list[Tensor]:
    params = make_params(kind[0], device, SHAPES)
    return [p.detach().to(kind[i % len(kind)]).requires_grad_() for i, p in enumerate(params)]


def _groups(tensors: list[Tensor]) -> list[dict]:
    return [dict(params=tensors[::2], weight_decay=0.1), dict(params=tensors[1::2], weight_decay=0.01)]


def _wide(params: list[Tensor]) -> list[Tensor]:
    """Twins without bfloat16: torch has no masters, and its float32 is what ours should equal."""
    return [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True).requires_grad_() for p in params]


def _twin(cls, groups: list[dict], **options) -> torch.optim.Optimizer:
    """torch's own class with its LR written at each step, or our reference where torch has none."""
    if cls in (LARS, LAMB, AdamP):
        return getattr(reference, cls.__name__)(groups, lr=legw(Cosine()), **options)
    return getattr(torch.optim, cls.__name__)(groups, foreach=False, **options)


def _scale(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Multiply the gradients by SCALE; they are then of this dtype."""
    for p in params:
        if p.grad is not None:
            p.grad_dtype, p.grad = None, (p.grad * SCALE).to(dtype or p.grad.dtype)
    return [p.grad for p in params]


def _compare(ours, params: list[Tensor], theirs: list[Tensor]) -> None:
    weights = [ours.state[p].get("master_param", p.detach()) for p in params]
    # Beside float32 tensors torch's float64 ones are clipped by a norm that is float32's too.
    exact = all(w.dtype == torch.float64 for w in weights)
    tolerance = dict(rtol=1e-12, atol=1e-13) if exact else dict(rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(weights, [q.detach() for q in theirs], **tolerance)


@family
@pytest.mark.parametrize("kind", KINDS, ids=["float64", "float32", "mixed"])
def test_equals_torchs_three_calls(backend, device, cls, options, kind):
    params = _params(kind, device)
    theirs = _wide(params)
    ours = cls(_groups(params), lr=legw(Cosine()), max_grad_norm=0.5, tile=16, backend=backend, **options)
    twin, scaler, applied = _twin(cls, _groups(theirs), **options), torch.amp.GradScaler(device, SCALE), 0
    for step in range(6):
        give_gradients(step, params, theirs)
        scaler.scale(torch.zeros((), device=device))  # which makes its scale
        before = [None if g is None else g.clone() for g in _scale(params)]
        _scale(theirs)
        if step in (0, 3):
            theirs[0].grad[0] = torch.inf
        ours.grad_scale = torch.full((1,), SCALE, device=device)
        ours.found_inf = torch.full((1,), float(step in (0, 3)), device=device)  # by some other tensor, say
        ours.step()
        scaler.unscale_(twin)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for group in twin.param_groups if cls not in (LARS, LAMB, AdamP) else ():
            group["lr"] = legw(Cosine())(applied)
        scaler.step(twin)
        scaler.update(SCALE)
        if step not in (0, 3):
            applied += 1
            assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-12 if kind == KINDS[0] else 2e-6)
        for p, g in zip(params, before, strict=True):
            assert g is None or torch.equal(p.grad, g), "gradients are not written back"
    assert ours.steps_applied == applied and int(ours.steps_skipped) == 2
    _compare(ours, params, theirs)


@needs_other_grad_dtypes
@family
@pytest.mark.parametrize(("param", "gradient"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_gradients_in_another_dtype(backend, device, cls, options, param, gradient):
    """Every other one: two launches on one bucket, one norm."""
    params = make_params(getattr(torch, param), device, SHAPES)
    theirs = _wide(params)
    ours = cls(_groups(params), lr=legw(), max_grad_norm=0.5, tile=16, backend=backend, **options)
    twin = getattr(reference, cls.__name__)(_groups(theirs), lr=legw(), max_grad_norm=0.5, **options)
    for step in range(3):
        give_gradients(step, params)
        _scale(params[step % 2 :: 2], getattr(torch, gradient))
        for p, q in zip(params, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.to(q.dtype)
        ours.step()
        twin.step()
    _compare(ours, params, theirs)


@family
def test_a_dtype_without_gradients_adds_nothing_to_the_norm(backend, device, cls, options):
    """Not even what it had the step before."""
    params = make_params(torch.float32, device, [(20,)]) + make_params(torch.bfloat16, device, [(5,)])
    alone = twins(params)
    options = dict(lr=legw(), max_grad_norm=0.5, skip_nonfinite=True, tile=16, backend=backend) | options
    both = [cls(x, **options) for x in (params, alone)]
    give_gradients(0, params, skip=False)
    params[1].grad.fill_(torch.nan)
    both[0].step()
    for step in range(1, 3):
        give_gradients(step, params, alone, skip=False)
        params[1].grad = alone[1].grad = None
        for optimizer in both:
            optimizer.step()
        assert float(both[0].grad_norm) == float(both[1].grad_norm)
        assert float(both[0].grad_norms()[params[1]]) == 0
    same(params, alone)
    assert int(both[0].steps_skipped) == 1


@pytest.mark.parametrize(
    ("cls", "options"), FAMILY + [(LAMB, dict(variant=variant)) for variant in ("author-tf", "apex", "timm")], ids=str
)
def test_a_threshold_for_each_group(backend, device, cls, options):
    """All on the one global norm. At 1e-5 torch's 1e-6 shows, which LAMB's formula lacks; None is LAMB's 1 there."""
    params = make_params(torch.float64, device, [(20,), (3, 7), (5,), (7,), (9,)])
    theirs, limits = twins(params), (0.5, None, 1e3, 1e-5, math.inf)

    def groups(tensors: list[Tensor]) -> list[dict]:
        return [dict(params=[p], max_grad_norm=limit) for p, limit in zip(tensors, limits, strict=True)]

    ours = cls(groups(params), lr=legw(), tile=16, backend=backend, **options)
    twin = getattr(reference, cls.__name__)(groups(theirs), lr=legw(), **options)
    for step in range(3):
        give_gradients(step, params, theirs)
        if step == 2:
            ours.param_groups[1]["max_grad_norm"] = twin.param_groups[1]["max_grad_norm"] = 0.1
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        ours.step()
        twin.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-13)
    _compare(ours, params, theirs)


@pytest.mark.parametrize("size", [1e25, 1e-25])
@family
def test_squares_beyond_float32(backend, device, cls, options, size):
    params = make_params(torch.float32, device, [(20,), (3, 7)])
    exact = twins(params, torch.float64)
    ours = cls(params, lr=legw(), max_grad_norm=1.0, tile=16, backend=backend, **options)
    twin = getattr(reference, cls.__name__)(exact, lr=legw(), max_grad_norm=1.0, **options)
    for step in range(2):
        give_gradients(step, params, skip=False)
        for p, q in zip(params, exact, strict=True):
            p.grad *= size
            q.grad = p.grad.double()
        norm = torch.nn.utils.get_total_norm([q.grad for q in exact])
        ours.step()
        twin.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    torch.testing.assert_close([p.detach().double() for p in params], [q.detach() for q in exact], rtol=1e-5, atol=1e-6)


@family
@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_thresholds_that_make_no_sense(device, cls, options, value):
    (p,) = make_params(torch.float32, device, [(20,)])
    before, address = p.detach().clone(), p.data_ptr()
    message = f"max_grad_norm must be greater than 0, or None, got {value}"
    with pytest.raises(ValueError, match=message):
        cls([p], lr=legw(), max_grad_norm=value, **options)
    optimizer = cls(make_params(torch.float32, device, [(9,)]), lr=legw(), **options)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(params=[p], max_grad_norm=value))
    assert optimizer.state_dict() == saved and torch.equal(p, before) and p.data_ptr() == address


@family
def test_without_a_global_norm_a_bad_gradient_stays_in_its_tensor(backend, device, cls, options):
    """Not even within its group, its tile's program or its update's list."""
    params = make_params(torch.float32, device, [(5,), (20,), (3,), (40,)])
    clean = twins(params)
    optimizers = [cls(_groups(x), lr=legw(), tile=16, backend=backend, **options) for x in (params, clean)]
    for step, value in enumerate([torch.nan, torch.inf, -torch.inf]):
        give_gradients(step, params, clean, skip=False)
        params[1].grad[7] = value
        for optimizer in optimizers:
            optimizer.step()
    assert not params[1].isfinite().all()
    for i in (0, 2, 3):
        same([params[i]], [clean[i]])
        mine, other = optimizers[0].state[params[i]], optimizers[1].state[clean[i]]
        torch.testing.assert_close(dict(mine), dict(other), rtol=0, atol=0)
        if cls in (LARS, LAMB):
            ratios = [o.trust_ratios()[x[i]] for o, x in zip(optimizers, (params, clean), strict=True)]
            assert ratios[0] == ratios[1]


@family
def test_what_a_step_found(backend, device, cls, options):
    """Norms and ratios of the first step, by their formulas; the gradient is the one before clipping."""
    params = make_params(torch.float64, device, [(20,), (3, 7), (4,)])
    before = twins(params)
    optimizer = cls(_groups(params), lr=0.1, tile=16, backend=backend, max_grad_norm=0.5, **options)
    for ask in (optimizer.grad_norms, lambda: optimizer.grad_norm):
        with pytest.raises(RuntimeError, match=f"gradient norms are not known: {cls.__name__} has made no step"):
            ask()
    give_gradients(0, params, skip=False)
    params[1].grad = None
    _scale(params)
    optimizer.grad_scale = torch.full((1,), SCALE, device=device)
    optimizer.step()
    g = {p: torch.zeros_like(p) if p.grad is None else p.grad / SCALE for p in params}
    norms = {p: x.norm() for p, x in g.items()}
    total = torch.stack(list(norms.values())).norm()
    found = optimizer.grad_norms()
    assert found.keys() == set(params) and all(x.shape == () and x.dtype == torch.float64 for x in found.values())
    for p in params:
        torch.testing.assert_close(found[p].to(device), norms[p], rtol=1e-13, atol=0)
    assert float(optimizer.grad_norm) == pytest.approx(float(total), rel=1e-13)
    if cls not in (LARS, LAMB):
        for ask in (optimizer.param_norms, optimizer.trust_ratios):
            with pytest.raises(RuntimeError, match=f"{cls.__name__} (takes no norms|has no trust ratios)"):
                ask()
        return
    clip = 0.5 / (float(total) + 1e-6)
    for p, w, decay in ((params[0], before[0], 0.1), (params[2], before[2], 0.1)):
        w_norm = w.norm().item()
        assert float(optimizer.param_norms()[p]) == pytest.approx(w_norm, rel=1e-13)
        ratio = 0.1 * w_norm / (float(norms[p]) * clip + decay * w_norm)
        if cls is LAMB:
            x = g[p] * clip
            ratio = w_norm / (x / (x.abs() + 1e-6) + decay * w.detach()).norm().item()
        assert float(optimizer.trust_ratios()[p]) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("cls", [SGD, LARS, LAMB, Adam], ids=lambda cls: cls.__name__)
def test_clipping_that_begins_and_ends_in_mid_run(backend, device, cls):
    """As by an optimizer that was made with the threshold of each stretch."""
    params = make_params(torch.float64, device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend)
    for stretch, limit in enumerate((None, 0.5, None, math.inf, 1e-3)):
        state, copies = optimizer.state_dict(), twins(params)
        other = cls(copies, lr=0.1, tile=16, backend=backend, max_grad_norm=limit)
        other.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "max_grad_norm": limit}]})
        optimizer.param_groups[0]["max_grad_norm"] = limit
        for step in (2 * stretch, 2 * stretch + 1):
            give_gradients(step, params, copies)
            optimizer.step()
            other.step()
            same(params, copies)
