"""torch.optim's contract for the optimizers that count steps or adapt: hooks, groups, errors, uploads for graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, Cosine, reference
from fused_legw.backends import device_table
from tests.support.cases import error, give_gradients, legw, make_params, same, twins
from tests.support.family import FAMILY, SHAPES, family, make_one, run_steps
from tests.support.graphs import capturing, constant_gradients

torch_pairs = pytest.mark.parametrize(
    ("cls", "torchs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)], ids=["Adam", "AdamW"]
)


def _kept(optimizer) -> tuple:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, optimizer.state_dict()["state"], groups


def _unchanged(optimizer, before: tuple) -> None:
    params, state, groups = _kept(optimizer)
    torch.testing.assert_close((params, state), before[:2], rtol=0, atol=0)
    assert groups == before[2]


@family
def test_closures_and_hooks(backend, device, cls, options):
    """A pre-hook may replace gradients; the closure runs with autograd on, in between."""
    params = make_params(torch.float64, device, [(4,)])
    exact, seen = twins(params), []
    optimizer = make_one(cls, params, backend, **options)
    twin = getattr(reference, cls.__name__)(exact, lr=legw(Cosine()), **options)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(f"post {o.steps_applied}"))

    def closure(p=params[0]):
        seen.append("closure")
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        loss = optimizer.step(closure)
        assert loss.requires_grad
        twin.step(lambda: closure(exact[0]))
    assert [x for x in seen if x != "closure"] == ["pre", "post 1", "pre", "post 2"]
    assert max(error(params, exact)) < 1e-12


@family
def test_state_dict_hooks(backend, device, cls, options):
    """Post-hooks see the packed dict, the user's load hooks run before ours."""
    params = make_params(torch.float64, device, [(4,)])
    optimizer, seen = make_one(cls, params, backend, **options), []
    run_steps(optimizer, range(2), params)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append(type(d["param_groups"][0]["schedule"])))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: {**d, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.steps_applied))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", dict, 2]
    assert not optimizer.state_dict()["state"], "what the user's hook dropped was not loaded"


@family
def test_a_group_added_later(backend, device, cls, options):
    params = make_params(torch.float64, device, SHAPES)
    exact = twins(params)
    late = {} if cls in (Adam, AdamP, AdamW) else dict(adapt=False)
    ours = make_one(cls, params[:2], backend, **options)
    full = [dict(params=exact[:2]), dict(params=exact[2:], lr=0.01, weight_decay=0.25, **late)]
    twin = getattr(reference, cls.__name__)(full, lr=legw(Cosine()), **options)
    for step in range(6):
        give_gradients(step, params, exact)
        if step < 3:
            for p in params[2:] + exact[2:]:
                p.grad = None
        elif step == 3:
            ours.add_param_group(dict(params=params[2:], lr=0.01, weight_decay=0.25, **late))
        ours.step()
        twin.step()
    assert max(error(params, exact)) < 1e-12
    assert ours.get_last_lr() == [legw(Cosine())(5), 0.01]


@torch_pairs
def test_each_parameter_counts_its_own_updates(backend, device, cls, torchs):
    """A layer frozen and thawed, and one that never had a gradient: bias corrections go by its own count."""
    params = make_params(torch.float64, device, [(5,), (7,), (9,), (3,)])
    plain = twins(params)
    ours, theirs = make_one(cls, params, backend, lr=0.05), torchs(plain, lr=0.05, foreach=False)
    for step in range(8):
        give_gradients(step, params, plain, skip=False)
        for tensors in (params, plain):
            tensors[1].requires_grad_(not 2 <= step < 6)
            absent = [3] + [1] * (2 <= step < 6) + [2] * (step % 2)
            for i in absent:
                tensors[i].grad = None
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, plain, rtol=1e-11, atol=1e-13)
    assert [int(ours.state[p]["step"]) for p in params[:3]] == [8, 4, 4]
    assert params[3] not in ours.state_dict()["state"] and set(ours.state_dict()["state"]) == {0, 1, 2}


@torch_pairs
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
def test_a_scheduler_that_drives_betas_too(backend, device, cls, torchs, kind):
    """OneCycleLR writes lr and betas each step; a tensor LR it fills in place."""
    params = make_params(torch.float64, device, [(5,), (7,)])
    plain = twins(params)
    pairs = []
    for tensors, make, own in ((params, cls, dict(tile=16, backend=backend)), (plain, torchs, dict(foreach=False))):
        optimizer = make(tensors, lr=kind(0.01), **own)
        pairs.append((optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)))
    for step in range(7):
        give_gradients(step, params, plain)
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-8)


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_moves_to_another_dtype(backend, device, cls, options, dtype):
    """State goes on: in float32 under bfloat16 weights, widened for float64's."""
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 3).to(device)
    optimizer = make_one(cls, model.parameters(), backend, **options)
    run_steps(optimizer, range(2), list(model.parameters()))
    before = optimizer.state_dict()["state"]
    model.to(dtype)
    exact = [p.detach().double().requires_grad_() for p in model.parameters()]
    twin = getattr(reference, cls.__name__)(exact, lr=legw(Cosine()), **options)
    twin.steps_applied = 2
    for i, p in enumerate(exact):
        for name, value in before[i].items():
            twin.state[p][name] = int(value) if name == "step" else value.double()
    give_gradients(2, list(model.parameters()), exact)
    optimizer.step()
    twin.step()
    wanted = torch.float32 if dtype == torch.bfloat16 else torch.float64
    for p in model.parameters():
        assert {x.dtype for name, x in optimizer.state[p].items() if name != "step"} == {wanted}
    assert max(error(list(model.parameters()), exact)) < (2**-7 if dtype == torch.bfloat16 else 1e-12)


@torch_pairs
def test_torchs_old_dicts_count_in_numbers(backend, device, cls, torchs):
    params = make_params(torch.float64, device, SHAPES)
    plain = twins(params)
    theirs, ours = torchs(plain, lr=0.01), make_one(cls, params, backend, lr=0.01)
    run_steps(theirs, range(3), plain)
    for p, q in zip(params, plain, strict=True):
        p.data.copy_(q)
    old = theirs.state_dict()
    old = {**old, "state": {k: {**v, "step": int(v["step"])} for k, v in old["state"].items()}}
    ours.load_state_dict(old)
    run_steps(ours, range(3, 6), params)
    run_steps(theirs, range(3, 6), plain)
    torch.testing.assert_close(params, plain, rtol=1e-11, atol=1e-13)


BAD_STEPS = [torch.ones(3), "many", None, torch.tensor(torch.nan), torch.tensor(torch.inf), -4]


@pytest.mark.parametrize("what", [*(("step", bad) for bad in BAD_STEPS), ("schedule", 7), ("lr", "high")], ids=str)
@pytest.mark.parametrize("cls", [Adam, LAMB])
def test_what_cannot_be_loaded_changes_nothing(backend, device, cls, what):
    name, value = what
    params = make_params(torch.float32, device, [(5,), (7,)])
    optimizer = make_one(cls, params, backend)
    run_steps(optimizer, range(2), params)
    before, bad = _kept(optimizer), copy.deepcopy(optimizer.state_dict())
    (bad["state"][1] if name == "step" else bad["param_groups"][0])[name] = value
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(bad)
    _unchanged(optimizer, before)
    run_steps(optimizer, range(2, 3), params)


@pytest.mark.parametrize(
    "option", [dict(lr="x"), dict(lr=None), dict(lr=torch.ones(2)), dict(weight_decay="x")], ids=str
)
@pytest.mark.parametrize(("cls", "options"), [(SGD, {}), *FAMILY], ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_option_in_a_later_group_moves_no_group(backend, device, cls, options, option):
    params = make_params(torch.float32, device, [(5,), (7,)])
    optimizer = cls([dict(params=[p]) for p in params], lr=0.1, tile=16, backend=backend, **options)
    run_steps(optimizer, range(2), params)
    group = optimizer.param_groups[1]
    before, right = _kept(optimizer), {k: group[k] for k in option}
    group.update(option)
    give_gradients(2, params)
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    group.update(right)
    _unchanged(optimizer, before)
    optimizer.step()


FOLLOWED = [
    (SGD, dict(momentum=0.9), dict(momentum=0.5, nesterov=True, lr=0.1)),
    (LARS, dict(weight_decay=0.1), dict(trust_coefficient=0.5, weight_decay=0.2, adapt=False)),
    (LARS, dict(weight_decay=0.1), dict(variant="moco")),
    (Adam, dict(max_grad_norm=0.1), dict(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3, max_grad_norm=0.2)),
    (AdamP, dict(weight_decay=0.1), dict(delta=2.0, wd_ratio=0.5, nesterov=True)),
    (LAMB, dict(max_grad_norm=0.1), dict(trust_clamp=(0.0, 0.01), lr=torch.tensor(0.3))),
]
REFUSED = [
    (SGD, dict(), dict(momentum=0.9)),
    (SGD, dict(), dict(max_grad_norm=0.1)),
    (Adam, dict(), dict(amsgrad=True)),
    (LARS, dict(max_grad_norm=0.5, weight_decay=0.1), dict(denominator="norm_of_sum")),
    (LAMB, dict(), dict(variant="author-tf")),
]


@pytest.mark.parametrize(("cls", "options", "change"), FOLLOWED + REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_changed_options_reach_replays_or_are_refused(triton_device, monkeypatch, cls, options, change):
    monkeypatch.setattr(device_table.DeviceTable, "prepares_captures", True)
    params = make_params(torch.float64, triton_device, [(20,), (5, 7)])
    plain = twins(params)
    a, b = (cls(x, **dict(lr=0.5, tile=16, backend="triton") | options) for x in (params, plain))
    for optimizer, tensors in ((a, params), (b, plain)):
        constant_gradients(tensors, 1.0)
        optimizer.step()
    with capturing(monkeypatch) as graph:
        a.step()
    a.param_groups[0].update(change)
    b.param_groups[0].update(change)
    if (cls, options, change) in REFUSED:
        with pytest.raises(RuntimeError, match="capture"):
            a.upload_param_groups()
        return
    a.upload_param_groups()
    for _ in range(2):
        graph.replay()
        b.step()
    torch.testing.assert_close(params, plain, rtol=1e-12, atol=0)


@family
def test_repr_and_compilation(device, cls, options):
    (p,) = make_params(torch.float32, device, [(3,)])
    optimizer, plain = make_one(cls, [p], "aten", lr=0.5, **options), twins([p])
    other = make_one(cls, plain, "aten", lr=0.5, **options)
    assert repr(optimizer).startswith(f"{cls.__name__} (") and "lr: 0.5" in repr(optimizer)
    p.grad, plain[0].grad = torch.ones_like(p), torch.ones_like(p)
    torch.compile(optimizer.step, backend="aot_eager")()
    other.step()
    same([p], plain)


def test_momentum_loaded_where_none_was_is_kept(backend, device):
    """The dict's momentum replaces the constructor's 0, and its buffers must not be taken for fresh ones."""
    params = make_params(torch.float64, device, [(5,), (7,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9, tile=16, backend=backend)
    run_steps(optimizer, range(2), params)
    resumed = twins(params)
    other = SGD(resumed, lr=0.1, tile=16, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    run_steps(optimizer, range(2, 4), params)
    run_steps(other, range(2, 4), resumed)
    same(params, resumed)
