"""State set by hand: what is gone on with, and what the next step refuses before anything has changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW
from tests.support.cases import same, twins


def made(cls, device, backend, updates=3, dtype=torch.float32, **options) -> tuple[Tensor, Any]:
    p = torch.ones(3, dtype=dtype, device=device).requires_grad_()
    optimizer = cls([("w", p)], lr=0.1, tile=16, backend=backend, **options)
    for _ in range(updates):
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = torch.ones_like(p)
    return p, optimizer


def remove(*names: str):
    def change(state, p):
        for name in names:
            del state[p][name]

    return change


def put(**values: Any):
    return lambda state, p: state[p].update(values)


def instead(values: Any):
    return lambda state, p: state.__setitem__(p, values)


ADAMS = "'exp_avg', 'exp_avg_sq'"
LOOKED_FOR = f"looked for {ADAMS}, 'step'"
REFUSED = {
    "moments gone": (AdamW, 3, remove("exp_avg", "exp_avg_sq"), f"lacks {ADAMS}: {LOOKED_FOR}, found 'step'"),
    "one moment gone": (LAMB, 3, remove("exp_avg_sq"), f"lacks 'exp_avg_sq': {LOOKED_FOR}, found 'exp_avg', 'step'"),
    "the count gone": (AdamP, 3, remove("step"), f"lacks 'step': {LOOKED_FOR}, found {ADAMS}"),
    "one moment given": (Adam, 0, put(exp_avg=torch.ones(3)), f"lacks 'exp_avg_sq', 'step': {LOOKED_FOR}"),
    "a count given": (Adam, 0, put(step=torch.tensor(4.0)), f"lacks {ADAMS}: {LOOKED_FOR}, found 'step'"),
    "mu": (LARS, 0, put(mu=torch.ones(3)), "lacks 'momentum_buffer': looked for 'momentum_buffer', found 'mu'"),
    "mu, later": (SGD, 3, instead(dict(mu=torch.ones(3))), "lacks 'momentum_buffer'.*found 'mu'"),
    "8 bits": (AdamW, 0, put(state1=torch.ones(3), state2=torch.ones(3)), f"lacks {ADAMS}, 'step'.*found 'state1'"),
    "no dict": (SGD, 3, instead(5), "must be a dict, got 5"),
    "two counts": (AdamW, 3, put(step=torch.ones(2)), r"\['step'\] must be a number of updates"),
    "no number": (AdamW, 3, put(step=math.nan), r"\['step'\] must be a number of updates.*got nan"),
    "text": (AdamW, 3, put(step="5"), r"\['step'\] must be a number of updates.*got '5'"),
    "negative": (AdamW, 3, put(step=torch.tensor([-1.0])), r"\['step'\] must be a number of updates"),
    "infinite": (AdamW, 3, put(step=torch.tensor(math.inf)), r"\['step'\] must be a number of updates"),
    "too large": (AdamW, 3, put(step=1e30), r"\['step'\] must be a number of updates"),
    "complex": (AdamW, 3, put(exp_avg=torch.ones(3) * 1j), r"\['exp_avg'\] must be a plain tensor of real numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_next_step_refuses_it_and_changes_nothing(backend, device, case):
    cls, updates, change, message = REFUSED[case]
    p, optimizer = made(cls, device, backend, updates, **(dict(momentum=0.9) if cls is SGD else {}))
    change(optimizer.state, p)
    before, groups = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["param_groups"])
    own = optimizer.state[p]
    values = copy.deepcopy(own)
    for _ in range(2):  # not only once
        with pytest.raises((ValueError, TypeError), match=rf"the state of w:? .*{message}|the state of w: {message}"):
            optimizer.step()
        same([p.detach()], [before])
        assert optimizer.state[p] is own and optimizer.state_dict()["param_groups"] == groups
        assert repr(own) == repr(values)
    del optimizer.state[p]
    optimizer.step()  # cleared, it begins afresh
    assert not torch.equal(p, before)


@pytest.mark.parametrize(
    "step",
    [
        6,
        6.0,
        torch.tensor([6.0]),
        torch.tensor([[6]]),
        torch.tensor(6, dtype=torch.float64),
        torch.tensor([6.0]).numpy(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("how", ["by hand", "loaded"])
def test_any_number_of_one_element_is_a_count(backend, device, step, how):
    p, optimizer = made(AdamW, device, backend)
    if how == "by hand":
        optimizer.state[p]["step"] = step
    else:
        given = optimizer.state_dict()
        given["state"][0]["step"] = step
        optimizer.load_state_dict(given)
        assert optimizer.state[p]["step"].item() == 6
    twin = twins([p])
    torchs = torch.optim.AdamW(twin, lr=0.1)
    moments = {name: optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    torchs.state[twin[0]] = {**moments, "step": torch.tensor(6.0)}
    twin[0].grad = p.grad.clone()
    optimizer.step()
    torchs.step()
    torch.testing.assert_close(p, twin[0], rtol=1e-6, atol=0)
    assert optimizer.state[p]["step"].item() == 7 and optimizer.state[p]["step"].shape == ()


def test_the_groups_step_counts_for_state_set_by_hand(backend, device):
    p, optimizer = made(Adam, device, backend, 0)
    optimizer.param_groups[0]["step"] = 10_000
    optimizer.state[p] = dict(exp_avg=torch.ones(3, device=device), exp_avg_sq=torch.ones(3, device=device))
    optimizer.step()
    assert p.tolist() == pytest.approx([0.9] * 3, rel=1e-5)
    assert optimizer.state[p]["step"].item() == 10_001 and "step" not in optimizer.param_groups[0]


def test_other_spellings_beside_ours_ride_along(backend, device):
    p, optimizer = made(SGD, device, backend, momentum=0.9)
    mu = torch.ones(3, device=device)
    optimizer.state[p]["mu"] = mu
    layout = optimizer._run.layout
    optimizer.step()
    assert optimizer.state[p]["mu"] is mu and optimizer._run.layout is layout, "no rebuild"
    p, optimizer = made(SGD, device, backend)  # without momentum no state is needed
    optimizer.state[p]["mu"] = mu
    optimizer.step()
    assert optimizer.state[p]["mu"] is mu


# Weights that grow or shrink, as Gaussian splatting does it: all state is cut or extended by its names.


def resize(optimizer, p: Tensor, how: str, rows: int, names: tuple[str, ...]) -> Tensor:
    """Cut a weight and its state to `rows`, or extend them by zeros. Returns the weight, another Parameter if so."""

    def sized(x: Tensor) -> Tensor:
        return torch.cat([x.detach(), x.new_zeros(max(rows - len(x), 0), *x.shape[1:])])[:rows].clone()

    if how == "another parameter":
        state = optimizer.state.pop(p)
        q = nn.Parameter(sized(p))
        optimizer.param_groups[0]["params"][0] = q
        optimizer.state[q] = state
    else:
        q, state = p, optimizer.state[p]
        p.data = sized(p)
    for name in names:
        state[name] = sized(state[name])
    return q


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("how", ["another parameter", "other data"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cls", "names"), [(AdamW, ("exp_avg", "exp_avg_sq")), (SGD, ("momentum_buffer",))])
def test_a_master_that_its_weight_has_outgrown_is_made_anew(backend, device, cls, names, dtype, how, rows):
    p = torch.full((4, 3), 2.0, dtype=dtype, device=device).requires_grad_()
    options = dict(momentum=0.9) if cls is SGD else dict(weight_decay=0.0)
    optimizer = cls([p], lr=0.01, tile=16, backend=backend, **options)
    exact = [torch.full((4, 3), 2.0, dtype=torch.float32).requires_grad_()]
    plain = getattr(torch.optim, cls.__name__)(exact, lr=0.01, **options)
    for step in range(6):
        if step == 3:
            p.grad = exact[0].grad = None
            p = resize(optimizer, p, how, rows, names)
            exact = [resize(plain, exact[0], "another parameter", rows, names)]
            with torch.no_grad():  # the master begins at the rounded weight
                exact[0].copy_(p)
        for q in (p, exact[0]):
            q.grad = torch.ones_like(q)
        optimizer.step()
        plain.step()
    state = optimizer.state[p]
    torch.testing.assert_close(state["master_param"].cpu(), exact[0].detach(), rtol=1e-5, atol=1e-6)
    for name in names:
        torch.testing.assert_close(state[name].cpu(), plain.state[exact[0]][name], rtol=1e-5, atol=1e-6)
    assert p.dtype == dtype and p.shape == (rows, 3)


def test_a_copy_made_before_the_next_step_makes_it_anew_too(backend, device):
    p, optimizer = made(AdamW, device, backend, dtype=torch.bfloat16)
    p = resize(optimizer, p, "another parameter", 5, ("exp_avg", "exp_avg_sq"))
    other = copy.deepcopy(optimizer)
    ((q,),) = (group["params"] for group in other.param_groups)
    q.grad = torch.ones_like(q)
    other.step()
    assert other.state[q]["master_param"].shape == (5,)


def test_a_master_that_misfits_otherwise_is_an_error(backend, device):
    """Where the user put it beside the same weight, and in a state dict."""
    p, optimizer = made(AdamW, device, backend, dtype=torch.bfloat16)
    given = optimizer.state_dict()
    given["state"][0]["master_param"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"state\[0\]\['master_param'\] has shape \(4,\), but its parameter has"):
        optimizer.load_state_dict(given)
    good = optimizer.state[p]["master_param"]
    optimizer.state[p]["master_param"] = torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"the state of w: \['master_param'\] has shape \(4,\)"):
        optimizer.step()
    optimizer.state[p]["master_param"] = good
    optimizer.step()


def test_moments_that_do_not_fit_a_grown_weight_are_an_error(backend, device):
    p, optimizer = made(AdamW, device, backend, dtype=torch.bfloat16)
    p = resize(optimizer, p, "another parameter", 5, ("exp_avg",))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"\['exp_avg_sq'\] has shape \(3,\), but its parameter has shape \(5,\)"):
        optimizer.step()
    assert optimizer.state[p]["master_param"].shape == (3,), "nothing has changed"
