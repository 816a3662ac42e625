"""Options of other packages in a loaded group: what they mean here, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW
from legw_kernels import formulas
from tests.support.cases import give_gradients, make_params, twins
from tests.support.foreign import dict_of, ones, refused_and_unchanged

MOMENTS = dict(exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3))


def loaded_group(optimizer, **options: Any) -> dict[str, Any]:
    optimizer.load_state_dict(dict_of({}, **options))
    return optimizer.param_groups[0]


def test_no_clipping_is_said_by_none_in_a_group_of_others(backend, device):
    """Where our own dict says None, the variant's limit goes on."""
    for options, limit in ((dict(max_grad_norm=None), math.inf), (dict(max_grad_norm=0.5), 0.5), ({}, 1.0)):
        params = ones(device)
        optimizer = LAMB(params, lr=0.1, variant="timm", tile=16, backend=backend)
        loaded_group(optimizer, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, **options)
        optimizer.step()
        norm = math.sqrt(3)
        g = 1 / max(1, norm / limit)
        torch.testing.assert_close(params[0].tolist(), [-0.1 * g / (g + 1)] * 3, rtol=1e-5, atol=0)
    optimizer = LAMB(ones(device), lr=0.1, variant="timm", tile=16, backend=backend)
    own = optimizer.state_dict()
    assert own["param_groups"][0]["max_grad_norm"] is None
    optimizer.load_state_dict(own)
    assert optimizer.param_groups[0]["max_grad_norm"] is None


@pytest.mark.parametrize("variant", ["paper", "timm", "deepspeed"])
def test_timms_options_of_lamb(device, variant):
    made = LAMB(ones(device), lr=0.1, variant=variant)
    group = loaded_group(made, trust_clip=True, always_adapt=True)
    assert group["trust_clamp"] == (0, 1) and group["not_adapted"] == "nothing"
    hyper = made._spec.hyper(group)
    assert (hyper.ratio_low, hyper.ratio_high) == (0, 1) and hyper.adapt == 2.0
    group = loaded_group(made, trust_clip=False, always_adapt=False, weight_decay=0.0)
    hyper = made._spec.hyper(group)
    assert (hyper.ratio_low, hyper.ratio_high) == (0, formulas.LARGEST_RATIO) and hyper.adapt == 0.0
    assert not {"trust_clip", "always_adapt"} & set(group)


def test_timms_options_of_lars(device):
    made = LARS(ones(device), lr=0.1)
    group = loaded_group(made, trust_coeff=0.02, trust_clip=True, always_adapt=False, weight_decay=0.0)
    hyper = made._spec.hyper(group)
    assert (hyper.trust_coefficient, hyper.trust_clip, hyper.adapt) == (0.02, 1.0, 0.0)
    hyper = made._spec.hyper(loaded_group(made, always_adapt=True, weight_decay=0.0))
    assert (hyper.trust_coefficient, hyper.trust_clip, hyper.adapt) == (0.02, 1.0, 1.0)


def test_options_of_others_that_have_another_name_here(device):
    group = loaded_group(AdamW(ones(device)), weight_decouple=False)
    assert group["decoupled_weight_decay"] is False and "weight_decouple" not in group
    group = loaded_group(
        LAMB(ones(device), variant="deepspeed"), min_coeff=0.1, max_coeff=5.0, bias_correction=True, max_grad_norm=None
    )
    assert (group["trust_clamp"], group["bias_correction"]) == ((0.1, 5.0), "step_size")


@pytest.mark.parametrize("cls", [SGD, LARS, Adam, AdamW, AdamP, LAMB])
def test_options_that_no_update_here_has(backend, device, cls):
    params = ones(device)
    optimizer = cls(params, lr=0.1, tile=16, backend=backend)
    optimizer.step()
    neutral = dict(grad_averaging=True, caution=False, corrected_weight_decay=False, clipping_threshold=None)
    for name, other in dict(grad_averaging=False, caution=True, clipping_threshold=1.0).items():
        message = rf"the state dict's param_groups\[0\]: {name}={other} is not supported, only {name}={neutral[name]}"
        refused_and_unchanged(optimizer, params, dict_of({}, **{name: other}), ValueError, message)
    group = loaded_group(optimizer, **neutral)
    assert not neutral.keys() & group.keys()


@pytest.mark.parametrize("cls", [Adam, AdamW, AdamP])
def test_adam_without_bias_correction_is_refused(device, cls):
    optimizer = cls(ones(device))
    with pytest.raises(ValueError, match="bias_correction=False is not supported"):
        optimizer.load_state_dict(dict_of(MOMENTS, bias_correction=False, step=3))
    assert "bias_correction" not in loaded_group(optimizer, bias_correction=True)
    assert loaded_group(LAMB(ones(device)), bias_correction=False)["bias_correction"] is False


def test_dicts_of_our_own_keep_every_option(device):
    for cls in (LARS, LAMB):
        made = cls(make_params(torch.float32, device), lr=0.1, variant="timm")
        made.param_groups[0].update(step=3, caution=True, always_adapt=True, mine="x")
        before = made.state_dict()["param_groups"]
        made.load_state_dict(made.state_dict())
        assert made.state_dict()["param_groups"] == before


@pytest.mark.peers
@pytest.mark.parametrize("options", [dict(), dict(trust_clip=True), dict(always_adapt=True, max_grad_norm=None)])
def test_timms_lamb_goes_on_here(backend, device, options):
    from tests.contract.test_peers import bare

    theirs_params = make_params(torch.float64, device, [(5, 7), (9,)])
    decay = [dict(params=theirs_params[:1], weight_decay=0.1), dict(params=theirs_params[1:], weight_decay=0.0)]
    theirs = bare("timm", "timm.optim.lamb").Lamb(decay, lr=0.1, **options)
    for step in range(3):
        give_gradients(step, theirs_params, skip=False)
        theirs.step()
    params = twins(theirs_params)
    ours = LAMB([dict(params=[p]) for p in params], lr=0.1, variant="timm", tile=16, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3, 9):
        give_gradients(step, theirs_params, params, skip=False)
        theirs.step()
        ours.step()
    torch.testing.assert_close(params, theirs_params, rtol=1e-7, atol=1e-9)
