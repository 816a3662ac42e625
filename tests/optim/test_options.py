"""Options of a group: the same are refused wherever they come from, before anything has changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, variants
from tests.support.cases import give_gradients, legw, make_params, same, twins

NAN, TWO = math.nan, torch.ones(2)
COMMON = dict(
    weight_decay=["x", None, NAN, -1, TWO, torch.tensor(-1.0), 1j],
    lr_scale=["x", None, NAN, -1, math.inf, TWO],
    maximize=["yes", None, 2, 0.5, TWO],
    max_grad_norm=["x", 0, NAN, TWO],
    schedule=["cosine", 0.1],
    differentiable=[True],
)
MOMENTUM = COMMON | dict(momentum=["x", None, -1, TWO], dampening=["x", None, NAN], nesterov=["no", None])
MOMENTS = COMMON | dict(
    betas=["x", 0.9, None, (0.9,), (0.9, 1.0), ("x", 0.9), (0.9, NAN), (0.9, None), (0.9, TWO), (0.5, 0.6, 0.7)],
    decoupled_weight_decay=["no", 2],
)
WRONG = {
    SGD: MOMENTUM,
    LARS: MOMENTUM
    | dict(
        variant=["mine", None, [1]],
        form=["x", 3, [1]],
        denominator=["x"],
        zero_norm=["x", True],
        not_adapted=["x"],
        trust_clip=["yes", 2],
        adapt=["no", None],
        trust_coefficient=["x", -1, TWO],
        eps=["x", -1, TWO],
    ),
    Adam: MOMENTS | dict(eps=["x", None, -1, NAN, TWO], amsgrad=["yes", None]),
    AdamW: dict(amsgrad=["yes"]),
    AdamP: {name: values for name, values in MOMENTS.items() if name != "decoupled_weight_decay"}
    | dict(eps=["x", None, -1], nesterov=["yes", None], delta=["x", -1, None, TWO], wd_ratio=["x", NAN, -1, TWO]),
    LAMB: (MOMENTS | {"weight_decay": ["x", NAN, -1, TWO]})  # None is the variant's
    | dict(
        variant=["mine", 1],
        bias_correction=["x", 2, 0.5, TWO],
        trust_clamp=["x", 1, (1, 0.5), (1, "x"), (-1, 1), (0, NAN), (0, 1, 2)],
        weight_norm_clamp=[(TWO, TWO)],
        not_adapted=["vectors"],
        adapt=[TWO],
        eps=["x", -1],
    ),
}
EVERY = [(cls, name, value) for cls, wrong in WRONG.items() for name, values in wrong.items() for value in values]
ERRORS = (TypeError, ValueError)
SAID = {"betas": "beta", "eps": "eps"}  # torch's messages


def _made(cls, **options):
    params = make_params(torch.float32, "cpu", [(3,), (2, 2)])
    optimizer = cls([dict(params=params[:1]), dict(params=params[1:], **options)], lr=0.1, backend="aten", tile=16)
    give_gradients(0, params, skip=False)
    optimizer.step()
    return params, optimizer


def _added(optimizer, wrong: dict) -> None:
    optimizer.add_param_group(dict(params=[torch.zeros(2, requires_grad=True)], **wrong))


def _loaded(optimizer, wrong: dict) -> None:
    state = optimizer.state_dict()
    state["param_groups"][1].update(wrong)
    optimizer.load_state_dict(state)


def _stepped(optimizer, wrong: dict) -> None:
    optimizer.param_groups[1].update(wrong)
    optimizer.step()


def _uploaded(optimizer, wrong: dict) -> None:
    optimizer.param_groups[1].update(wrong)
    optimizer.upload_param_groups()


@pytest.mark.parametrize(("cls", "name", "value"), EVERY, ids=str)
def test_what_is_refused_everywhere(cls, name, value):
    params, optimizer = _made(cls)
    if name not in ("schedule", "lr_scale") and not (name == "differentiable" and cls in (LARS, LAMB, AdamP)):
        address = params[0].data_ptr()
        with pytest.raises(ERRORS, match=SAID.get(name, name)):
            cls(params, lr=0.1, backend="aten", **{name: value})
        assert params[0].data_ptr() == address
    for way in (_added, _loaded, _stepped, _uploaded):
        groups = [dict(group) for group in optimizer.param_groups]
        before = copy.deepcopy(optimizer.state_dict()["state"]), twins(params)
        if way in (_stepped, _uploaded) and name == "differentiable" and cls in (LARS, LAMB, AdamP):
            continue  # no option of theirs
        with pytest.raises(ERRORS) as caught:
            way(optimizer, {name: value})
        said = str(caught.value)
        assert f"param_groups[{2 if way is _added else 1}]" in said
        assert SAID.get(name, name) in said
        if way in (_stepped, _uploaded):
            optimizer.param_groups[1].clear()
            optimizer.param_groups[1].update(groups[1])
        assert len(optimizer.param_groups) == 2
        for group, was in zip(optimizer.param_groups, groups, strict=True):
            assert all(group[k] is v for k, v in was.items()) and len(group) == len(was)
        torch.testing.assert_close((optimizer.state_dict()["state"], twins(params)), before, rtol=0, atol=0)
    optimizer.step()


RIGHT = [
    (SGD, dict(momentum=torch.tensor(0.5), weight_decay=torch.tensor([0.1]), dampening=torch.tensor([[0.1]]))),
    (SGD, dict(maximize=1, nesterov=0, max_grad_norm=math.inf, lr_scale=2, momentum=True, anything="goes")),
    (LARS, dict(trust_clip=torch.ones(1).numpy().astype(bool)[0], adapt=0, trust_coefficient=1, eps=0, momentum=0)),
    (Adam, dict(betas=[0.5, 0.6], amsgrad=1, eps=torch.tensor(1e-3))),
    (Adam, dict(betas=(torch.tensor(0.5), torch.tensor([0.6])), decoupled_weight_decay=True)),
    (LAMB, dict(bias_correction=1, trust_clamp=[0, math.inf], eps=torch.tensor(1e-3), amsgrad="an Adam's key")),
]


@pytest.mark.parametrize(("cls", "options"), RIGHT, ids=str)
def test_what_is_taken_everywhere(cls, options):
    params, optimizer = _made(cls, **options)
    others = [_made(cls) for _ in range(2)]
    others[0][1].load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others[0][0], strict=True):
        q.data.copy_(p)
    others[1][1].param_groups[1].update(options)
    for _ in range(2):
        optimizer.step()
        others[0][1].step()
        others[1][1].step()
    same(params, others[0][0])
    assert type(optimizer.param_groups[1].get("betas", ())) is tuple
    assert "anything" not in options or optimizer.param_groups[1]["anything"] == "goes"


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_a_missing_option_moves_no_group(backend, cls):
    """An axis that is gone is the variant's, as None; any other is an error before the first group moves."""
    params = make_params(torch.float32, "cpu", [(3,), (2, 2)])
    optimizer = cls([dict(params=[p]) for p in params], lr=0.1, backend=backend, tile=16)
    give_gradients(0, params, skip=False)
    optimizer.step()
    group, right = optimizer.param_groups[1], dict(optimizer.param_groups[1])
    for name in right.keys() - {"params", "foreach", "fused", "capturable", "differentiable", "steps_applied"}:
        del group[name]
        before = twins(params)
        if name in getattr(variants, cls.__name__, {}).get("paper", {}):
            optimizer.step()
            assert not torch.equal(params[1], before[1])
        else:
            with pytest.raises(KeyError, match=name):
                optimizer.step()
            same(params, before)
        group.update(right)
    optimizer.step()


ON_A_DEVICE = torch.tensor(0.5, device="meta")  # holds no value, as one on a GPU that must not be read


@pytest.mark.parametrize("cls", [SGD, LARS, Adam, LAMB], ids=lambda cls: cls.__name__)
def test_tensors_of_another_device_are_not_read(cls):
    _, optimizer = _made(cls, nesterov=True, momentum=0.5) if cls in (SGD, LARS) else _made(cls)
    group = optimizer.param_groups[1]
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        if name in group:
            group[name] = ON_A_DEVICE
    if "betas" in group:
        group.update(betas=(ON_A_DEVICE, ON_A_DEVICE), eps=ON_A_DEVICE)
    cls._spec.check(group)
    cls._spec.check_made(group)
    group["weight_decay"] = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match=r"Tensor weight_decay must be 1-element, got shape \(2,\)"):
        cls._spec.check(group)


def test_groups_that_nobody_wrote_to_are_not_checked_again(monkeypatch):
    checked = []
    check = type(Adam._spec).check
    monkeypatch.setattr(type(Adam._spec), "check", lambda spec, group: (checked.append(1), check(spec, group)))
    _, optimizer = _made(Adam)
    group = optimizer.param_groups[1]

    def checks_of_a_step() -> int:
        checked.clear()
        optimizer.step()
        return len(checked)

    assert checks_of_a_step() == 0
    group["lr"] = 0.05
    assert checks_of_a_step() == 0
    group["lr_scale"] = 0.05
    assert [checks_of_a_step(), checks_of_a_step()] == [1, 0]
    group["eps"] = 1e-3
    assert [checks_of_a_step(), checks_of_a_step()] == [1, 0]
    group["betas"] = [0.5, 0.6]  # can change in place
    assert [checks_of_a_step(), checks_of_a_step()] == [1, 1]
    group["betas"][1] = 1.5
    with pytest.raises(ValueError, match=r"param_groups\[1\]: Invalid beta parameter at index 1: 1\.5"):
        optimizer.step()


@pytest.mark.parametrize("lr", ["x", None, TWO, NAN, math.inf, legw()], ids=str)
@pytest.mark.parametrize("way", [_stepped, _uploaded, _loaded])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_lr_that_is_none(lr, way, scheduled):
    params, optimizer = _made(SGD, **(dict(lr=legw()) if scheduled else {}))
    before, shown = twins(params), optimizer.param_groups[1]["lr"]
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[1\]\['lr'\]"):
        way(optimizer, dict(lr=lr))
    same(params, before)
    optimizer.param_groups[1]["lr"] = shown
    assert (optimizer.param_groups[1]["schedule"] is None) != scheduled
    optimizer.step()


def test_an_lr_loaded_on_another_device_changes_nothing():
    _, optimizer = _made(Adam)
    before = optimizer.state_dict()
    bad = copy.deepcopy(before)
    bad["param_groups"][1].update(lr=ON_A_DEVICE, eps=1.0)
    with pytest.raises(ValueError, match=r"lr is a tensor on meta, but param_groups\[1\]\['params'\]\[0\] is on cpu"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    optimizer.step()


def test_a_negative_lr_that_a_scheduler_wrote_is_torchs():
    """A lambda past its end, say: torch goes on, and a checkpoint of it must load."""
    (p, _), optimizer = _made(SGD)
    plain = twins([p])
    torchs = torch.optim.SGD(plain, lr=0.1)
    for o, q in ((optimizer, p), (torchs, plain[0])):
        o.param_groups[0]["lr"] = -0.5
        q.grad = torch.ones_like(q)
        o.step()
    torch.testing.assert_close([p], plain)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == -0.5


def test_nesterov_whose_momentum_is_cycled_to_nothing(backend, device):
    """torch refuses it only where a group is made."""
    params = make_params(torch.float64, device, [(4,), (20,)])
    plain = twins(params)
    own = [SGD(params, lr=0.1, momentum=0.9, nesterov=True, tile=16, backend=backend)]
    theirs = torch.optim.SGD(plain, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(8):
        give_gradients(step, params, plain, skip=False)
        for optimizer in (own[0], theirs):
            optimizer.param_groups[0].update(momentum=0.3 * (step % 3), dampening=0.25 * (step > 4))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(params, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_given_by_hand_while_momentum_is_0(backend, device, dtype):
    """torch uses it as soon as the momentum is raised; tensors without any start afresh."""
    params = make_params(dtype, device, [(4,), (20,), ()])
    exact = twins(params, torch.float64)
    given = torch.arange(20.0, device=device, dtype=torch.float64)
    ours = SGD(params, lr=0.1, dampening=0.5, tile=16, backend=backend)
    theirs = torch.optim.SGD(exact, lr=0.1, dampening=0.5)
    for step in range(7):
        give_gradients(step, params, exact, skip=False)
        for optimizer, tensors in ((ours, params), (theirs, exact)):
            if step == 1:
                optimizer.state[tensors[1]]["momentum_buffer"] = given.clone()
            optimizer.param_groups[0]["momentum"] = 0.9 * (step in (3, 4, 6))
            optimizer.step()
            if step == 2:
                assert optimizer.state[tensors[1]]["momentum_buffer"].tolist() == given.tolist()
                assert "momentum_buffer" not in optimizer.state[tensors[0]]
    bound = dict(rtol=1e-12, atol=1e-14) if dtype == torch.float64 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close([p.double() for p in params], exact, **bound)
    for p, q in zip(params, exact, strict=True):
        mine, true = (o.state[x]["momentum_buffer"].double() for o, x in ((ours, p), (theirs, q)))
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


def test_a_maximum_given_by_hand_before_amsgrad(backend, device):
    params = make_params(torch.float64, device, [(4,), (20,)])
    exact = twins(params)
    ours = Adam(params, lr=0.1, tile=16, backend=backend)
    theirs = torch.optim.Adam(exact, lr=0.1, foreach=False)
    for step in range(5):
        give_gradients(step, params, exact, skip=False)
        for optimizer, tensors in ((ours, params), (theirs, exact)):
            if step == 2:
                for p in tensors:
                    optimizer.state[p]["max_exp_avg_sq"] = torch.ones_like(p)
            optimizer.param_groups[0]["amsgrad"] = step > 3
            optimizer.step()
    torch.testing.assert_close(params, exact, rtol=1e-12, atol=1e-14)


def test_state_of_another_shape_given_by_hand_changes_nothing(backend, device):
    params = make_params(torch.float32, device, [(4,), (20,)])
    optimizer = SGD(params, lr=0.1, tile=16, backend=backend)
    optimizer.state[params[1]]["momentum_buffer"] = torch.ones(3, device=device)
    give_gradients(0, params, skip=False)
    before = twins(params)
    with pytest.raises(ValueError, match=r"momentum_buffer'\] has shape \(3,\)"):
        optimizer.step()
    same(params, before)
    assert optimizer.state[params[1]]["momentum_buffer"].shape == (3,)


@pytest.mark.parametrize("flag", ["skip_nonfinite", "flatten", "master_weights"])
def test_flags_of_the_whole_optimizer(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        SGD([torch.zeros(2, requires_grad=True)], lr=0.1, **{flag: "no"})
