"""State of other packages: what goes on where it was, what begins afresh, and what is refused by name."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW
from tests.support.cases import give_gradients, same, twins
from tests.support.foreign import dict_of, ones, refused_and_unchanged

COUNTING = [(Adam, {}), (AdamW, dict(weight_decay=0.0)), (AdamP, {}), (LAMB, dict(weight_decay=0.0, adapt=False))]
counting = pytest.mark.parametrize(("cls", "options"), COUNTING, ids=lambda x: getattr(x, "__name__", ""))
ONE = torch.ones(3)
MOMENTS = dict(exp_avg=ONE, exp_avg_sq=ONE)


def adam_move(count: int, m: float = 1.0, v: float = 1.0) -> float:
    """What Adam adds to a weight at gradient 1 and LR 0.1, after `count` updates that left moments m and v."""
    m, v = 0.9 * m + 0.1, 0.999 * v + 0.001
    return -0.1 * m / (1 - 0.9 ** (count + 1)) / math.sqrt(v / (1 - 0.999 ** (count + 1)))


# The count of updates in the group


@pytest.mark.parametrize("step", [10_000, 10_000.0, torch.tensor(10_000), torch.tensor([10_000.0])], ids=repr)
@counting
def test_the_groups_step_is_the_count(backend, device, cls, options, step):
    params = ones(device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend, **options)
    given = dict_of(MOMENTS, step=step)
    optimizer.load_state_dict(given)
    optimizer.step()
    torch.testing.assert_close(params[0].tolist(), [adam_move(10_000)] * 3, rtol=1e-5, atol=0)
    assert params[0].tolist() == pytest.approx([-0.1] * 3, rel=1e-4)
    assert optimizer.state[params[0]]["step"].item() == 10_001
    assert "step" not in optimizer.param_groups[0] and "step" not in optimizer.state_dict()["param_groups"][0]
    assert given["param_groups"][0]["step"] is step and set(given["state"][0]) == set(MOMENTS)


@counting
def test_a_step_in_the_state_wins(backend, device, cls, options):
    params = ones(device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend, **options)
    optimizer.load_state_dict(dict_of({**MOMENTS, "step": torch.tensor(5.0)}, step=10_000))
    optimizer.step()
    torch.testing.assert_close(params[0].tolist(), [adam_move(5)] * 3, rtol=1e-5, atol=0)


@counting
def test_a_parameter_without_state_begins_afresh_beside_one_with_the_groups_count(backend, device, cls, options):
    params = ones(device, 2)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend, **options)
    optimizer.load_state_dict(dict_of(MOMENTS, 2, step=10_000))
    optimizer.step()
    torch.testing.assert_close(params[0].tolist(), [adam_move(10_000)] * 3, rtol=1e-5, atol=0)
    torch.testing.assert_close(params[1].tolist(), [-0.1] * 3, rtol=1e-5, atol=0)
    assert [optimizer.state[p]["step"].item() for p in params] == [10_001, 1]


def test_each_group_has_its_own_count_and_copies_keep_it(backend, device):
    params = ones(device, 2)
    optimizer = AdamW([{"params": [p]} for p in params], lr=0.1, weight_decay=0.0, tile=16, backend=backend)
    groups = [{**dict_of({})["param_groups"][0], "params": [i], "step": step} for i, step in enumerate((7, 9))]
    optimizer.load_state_dict({"state": {0: MOMENTS, 1: MOMENTS}, "param_groups": groups})
    for one in (copy.deepcopy(optimizer), optimizer):
        steps = [one.state[p]["step"].item() for group in one.param_groups for p in group["params"]]
        assert steps == [7, 9]


@pytest.mark.parametrize("cls", [SGD, LARS])
def test_momentum_ignores_the_groups_step(backend, device, cls):
    """The count means nothing to it: neither to state that goes on nor to a first update."""
    options = dict(adapt=False) if cls is LARS else {}
    params = ones(device, 2)
    optimizer = cls(params, lr=0.1, momentum=0.5, dampening=0.25, tile=16, backend=backend, **options)
    optimizer.load_state_dict(dict_of(dict(momentum_buffer=ONE), 2, momentum=0.5, dampening=0.25, step=10_000))
    optimizer.step()
    entering = 0.1 if cls is LARS else 1.0  # LARS's momentum holds the LR
    expected = -0.1 * (0.5 / entering + 0.75)
    torch.testing.assert_close(params[0].tolist(), [expected] * 3)
    torch.testing.assert_close(params[1].tolist(), [-0.1] * 3)
    assert optimizer.param_groups[0]["step"] == 10_000


@pytest.mark.parametrize("step", [-1, math.nan, math.inf, "5", torch.ones(2), 2**63], ids=repr)
def test_a_groups_step_that_is_no_count(backend, device, step):
    params = ones(device)
    optimizer = Adam(params, lr=0.1, tile=16, backend=backend)
    optimizer.step()
    message = r"the state dict's param_groups\[0\]\['step'\] must be a number of updates"
    refused_and_unchanged(optimizer, params, dict_of(MOMENTS, step=step), ValueError, message)


# What is refused


def written_by(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    p = torch.zeros(3, requires_grad=True)
    other = cls([p], **options)
    for _ in range(2):
        p.grad = torch.ones(3)
        other.step()
    return {**other.state_dict(), "param_groups": dict_of({})["param_groups"]}


FIVE = torch.tensor(5.0)
ADAMS = "'exp_avg', 'exp_avg_sq'"
REFUSED = {
    "count alone": (Adam, dict(step=FIVE), ADAMS, "'step'"),
    "no second moment": (AdamW, dict(step=FIVE, exp_avg=ONE), "'exp_avg_sq'", "'step', 'exp_avg'"),
    "no first moment": (LAMB, dict(step=FIVE, exp_avg_sq=ONE), "'exp_avg'", "'step', 'exp_avg_sq'"),
    "Lion's": (Adam, dict(exp_avg=ONE), "'exp_avg_sq', 'step'", "'exp_avg'"),
    "a moment that is None": (Adam, dict(MOMENTS, exp_avg=None, step=FIVE), "'exp_avg'", "'exp_avg_sq', 'step'"),
    "no count anywhere": (AdamP, MOMENTS, "'step'", ADAMS),
    "a maximum alone": (Adam, dict(max_exp_avg_sq=ONE), f"{ADAMS}, 'step'", "'max_exp_avg_sq'"),
    "mu": (LARS, dict(mu=ONE), "'momentum_buffer'", "'mu'"),
    "mu, and no other": (SGD, dict(mu=ONE, momentum_buffer=None), "'momentum_buffer'", "'mu'"),
    "8 bits": (AdamW, dict(step=5, state1=ONE, state2=ONE), ADAMS, "'step', 'state1', 'state2'"),
    "8 bits, no count": (AdamW, dict(state1=ONE, state2=ONE), f"{ADAMS}, 'step'", "'state1', 'state2'"),
    "momentum's, to Adam": (Adam, dict(momentum_buffer=ONE), f"{ADAMS}, 'step'", "'momentum_buffer'"),
    "Adam's, to momentum": (SGD, dict(MOMENTS, step=FIVE), "'momentum_buffer'", f"{ADAMS}, 'step'"),
    "RMSprop": (Adam, torch.optim.RMSprop, ADAMS, "'step', 'square_avg'"),
    "Adagrad": (LAMB, torch.optim.Adagrad, ADAMS, "'step', 'sum'"),
    "Adamax": (AdamP, torch.optim.Adamax, "'exp_avg_sq'", "'step', 'exp_avg', 'exp_inf'"),
    "RMSprop's without momentum": (LARS, torch.optim.RMSprop, "'momentum_buffer'", "'step', 'square_avg'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_state_that_cannot_be_gone_on_with_is_refused(backend, device, case):
    cls, state, absent, found = REFUSED[case]
    params = ones(device)
    options = dict(momentum=0.9) if cls is SGD else {}
    optimizer = cls([("w", params[0])], lr=0.1, tile=16, backend=backend, **options)
    optimizer.step()
    wrong = written_by(state, dict(lr=0.1)) if isinstance(state, type) else dict_of(state)
    wrong["param_groups"][0].update(options)
    wanted = "'momentum_buffer'" if cls in (SGD, LARS) else f"{ADAMS}, 'step'"
    message = rf"state\[0\], the state of w, lacks {absent}: looked for {wanted}, found {found};"
    refused_and_unchanged(optimizer, params, wrong, ValueError, message)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (3, TypeError, r"state\[0\], the state of w, must be a dict, got 3"),
        (dict(MOMENTS, exp_avg=ONE * 1j, step=FIVE), TypeError, r"state\[0\]\['exp_avg'\] must be a plain tensor"),
        (dict(MOMENTS, exp_avg=ONE.to_sparse(), step=FIVE), TypeError, r"\['exp_avg'\].*layout torch.sparse_coo"),
        (dict(MOMENTS, exp_avg_sq=ONE.to("meta"), step=FIVE), TypeError, r"state\[0\]\['exp_avg_sq'\].*on meta"),
        (dict(MOMENTS, exp_avg_sq=1.0, step=FIVE), ValueError, r"state\[0\]\['exp_avg_sq'\] has the value 1.0"),
        (dict(MOMENTS, master_param=torch.ones(4), step=FIVE), ValueError, r"\['master_param'\] has shape \(4,\)"),
    ],
)
def test_values_that_cannot_be_copied_are_refused(backend, device, state, error, message):
    params = ones(device)
    optimizer = Adam([("w", params[0])], lr=0.1, tile=16, backend=backend)
    optimizer.step()
    refused_and_unchanged(optimizer, params, {**dict_of({}), "state": {0: state}}, error, message)


@pytest.mark.parametrize("sizes", [(1, 1), (2,), (1, 2)], ids=str)
def test_a_dict_of_torchs_for_other_groups_gets_torchs_error(backend, device, sizes):
    params = ones(device)
    optimizer = AdamW(params, lr=0.1, tile=16, backend=backend)
    optimizer.step()
    others = torch.optim.AdamW([{"params": ones(device, n)} for n in sizes]).state_dict()
    with pytest.raises(ValueError, match="parameter group") as torchs:
        torch.optim.AdamW(twins(params)).load_state_dict(others)
    refused_and_unchanged(optimizer, params, others, ValueError, re.escape(str(torchs.value)))


# What begins afresh, and what rides along


@pytest.mark.parametrize(("cls", "options"), [*COUNTING, (SGD, dict(momentum=0.9)), (LARS, {})])
def test_names_of_the_users_own_ride_along_and_are_no_state(backend, device, cls, options):
    """Lookahead keeps its slow weights there, before the first update."""
    params, plain = ones(device), ones(device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend, **options)
    slow = torch.full((3,), 7.0, device=device)
    optimizer.state[params[0]].update(lookahead_slow_buff=slow, seen=4, parts=[1, 2])
    assert list(optimizer.state_dict()["state"][0]) == ["lookahead_slow_buff", "seen", "parts"]
    other = cls(twins(params), lr=0.1, tile=16, backend=backend, **options)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copy.deepcopy(optimizer), other):
        ((p,),) = (group["params"] for group in one.param_groups)
        p.grad = torch.ones_like(p)
        one.step()
        own = one.state[p]
        assert own["lookahead_slow_buff"].tolist() == [7.0] * 3 and own["seen"] == 4 and own["parts"] == [1, 2]
        assert own["lookahead_slow_buff"] is slow or one is not optimizer
        twin = cls(plain, lr=0.1, tile=16, backend=backend, **options)
        with torch.no_grad():
            plain[0].zero_()
        twin.step()
        same([p.detach()], [plain[0].detach()])
        stored = one.state_dict()["state"][0]
        assert set(stored) == set(own) and stored["seen"] == 4


def test_what_rides_along_is_cast_as_in_torch(device):
    """To its parameter's dtype and device. Only state of our own keeps its float32."""
    params = [torch.zeros(3, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    state = {**MOMENTS, "step": FIVE, "slow": torch.full((3,), 1.01)}
    loaded = []
    for cls, p in zip((AdamW, torch.optim.AdamW), params, strict=True):
        optimizer = cls([p])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        loaded.append(optimizer.state[p])
    ours, torchs = loaded
    assert ours["slow"].dtype == torchs["slow"].dtype == torch.bfloat16 and ours["slow"].device == torchs["slow"].device
    assert ours["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("how", ["clear", "delete", "empty", "none"])
@counting
def test_cleared_state_is_a_fresh_start(backend, device, cls, options, how):
    params = ones(device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend, **options)
    for _ in range(3):
        optimizer.step()
    p = params[0]
    if how == "clear":
        optimizer.state.clear()
    elif how == "delete":
        del optimizer.state[p]
    elif how == "empty":
        optimizer.state[p].clear()
    else:
        optimizer.state[p] = dict.fromkeys(optimizer.state[p])
    with torch.no_grad():
        p.zero_()
    optimizer.step()
    torch.testing.assert_close(p.tolist(), [-0.1] * 3, rtol=1e-5, atol=0)
    assert optimizer.state[p]["step"].item() == 1


def test_state_without_a_master_gets_one_of_the_weight(backend, device):
    p = torch.full((3,), 2.0, dtype=torch.bfloat16, device=device).requires_grad_()
    optimizer = AdamW([p], lr=0.1, tile=16, backend=backend)
    optimizer.load_state_dict(dict_of({**MOMENTS, "step": FIVE}, weight_decay=0.0))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["master_param"].tolist() == pytest.approx([2.0 + adam_move(5)] * 3, rel=1e-6)


def test_amsgrad_turned_on_later_starts_as_torchs(backend, device):
    """Its maximum begins at 0. torch itself needs the entry in its state."""
    params, plain = ones(device), ones(device)
    ours, torchs = Adam(params, lr=0.1, tile=16, backend=backend), torch.optim.Adam(plain, lr=0.1)
    for step in range(6):
        if step == 3:
            ours.load_state_dict(ours.state_dict())
            for optimizer in (ours, torchs):
                optimizer.param_groups[0]["amsgrad"] = True
            torchs.state[plain[0]]["max_exp_avg_sq"] = torch.zeros_like(plain[0])
        give_gradients(step, params, plain, skip=False)
        ours.step()
        torchs.step()
    torch.testing.assert_close(params[0], plain[0], rtol=1e-5, atol=0)


def test_momentum_turned_on_later_begins_at_its_first_gradient(backend, device):
    params, plain = ones(device), ones(device)
    ours, torchs = SGD(params, lr=0.1, tile=16, backend=backend), torch.optim.SGD(plain, lr=0.1)
    for step in range(6):
        if step == 3:
            ours.load_state_dict(torchs.state_dict())
            for optimizer in (ours, torchs):
                optimizer.param_groups[0]["momentum"] = 0.9
        give_gradients(step, params, plain, skip=False)
        ours.step()
        torchs.step()
    torch.testing.assert_close(params[0], plain[0], rtol=1e-5, atol=0)
