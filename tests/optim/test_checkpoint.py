"""State dicts: to and from torch.optim.SGD in mid-run, bitwise through a file, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch

from fused_legw import LAMB, LARS, LEGW, SGD, Adam, AdamP, Cosine, MultiStep
from tests.support.cases import give_gradients, legw, make_params, twins

OPTIONS = dict(momentum=0.9, dampening=0.3, weight_decay=0.01)


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_save_load_continue_is_bitwise(backend, device, dtype):
    params = make_params(dtype, device)

    def make(tensors) -> SGD:
        groups = [dict(params=tensors[:3], lr=legw(MultiStep([1, 2.5]))), dict(params=tensors[3:], lr=0.05)]
        return SGD(groups, tile=16, backend=backend, **OPTIONS)

    optimizer = make(params)
    for step in range(7):
        give_gradients(step, params)
        optimizer.step()
    state, resumed = through_a_file(optimizer.state_dict()), twins(params)
    other = make(resumed)
    other.param_groups[0]["weight_decay"] = 0.5  # overwritten by the dict's
    other.load_state_dict(state)
    assert other.steps_applied == 7
    assert other.param_groups[0]["schedule"] == legw(MultiStep([1, 2.5]))
    for step in range(7, 60):
        give_gradients(step, params, resumed)
        optimizer.step()
        other.step()
    torch.testing.assert_close(params, resumed, rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_moves_to_and_from_torch_in_mid_run(backend, device, direction):
    """The trajectory goes on as if nothing had happened, tensors never updated so far included."""
    params = make_params(torch.float64, device)
    plain = twins(params)
    torchs, ours = torch.optim.SGD(plain, lr=0.1, **OPTIONS), SGD(params, lr=0.1, tile=16, backend=backend, **OPTIONS)
    source, ps, target, qs = (ours, params, torchs, plain) if direction == "to torch" else (torchs, plain, ours, params)
    moved = [q for i, q in enumerate(qs) if i != 2]
    for step in range(4):
        give_gradients(step, ps)
        ps[2].grad = None
        source.step()
    for p, q in zip(ps, qs, strict=True):
        q.data.copy_(p)
    target.load_state_dict(through_a_file(source.state_dict()))
    for step in range(4, 12):
        give_gradients(step, ps, qs)
        source.step()
        target.step()
    assert len(moved) == len(qs) - 1
    torch.testing.assert_close(ps, qs, rtol=1e-12, atol=1e-14)


def test_a_legw_run_moves_to_torch_and_back(backend, device):
    """torch.optim drives the same schedule by hand, then gives the run back."""
    params = make_params(torch.float64, device)
    plain = twins(params)
    ours = SGD(params, lr=legw(Cosine()), momentum=0.9, tile=16, backend=backend)
    torchs = torch.optim.SGD(plain, lr=1.0, momentum=0.9)
    for step in range(3):
        give_gradients(step, params)
        ours.step()
    for p, q in zip(params, plain, strict=True):
        q.data.copy_(p)
    torchs.load_state_dict(ours.state_dict())
    for step in range(3, 6):
        torchs.param_groups[0]["lr"] = legw(Cosine())(step)
        give_gradients(step, params, plain)
        torchs.step()
        ours.step()
    torch.testing.assert_close(params, plain, rtol=1e-12, atol=1e-14)

    back = twins(plain)
    again = SGD(back, lr=legw(Cosine()), momentum=0.9, tile=16, backend=backend)
    foreign = torchs.state_dict()
    for group in foreign["param_groups"]:
        del group["schedule"], group["steps_applied"]  # as if torch had made it
    with pytest.raises(ValueError, match=r"has no 'steps_applied'.*set optimizer\.steps_applied"):
        again.load_state_dict(foreign)
    assert not again.state, "nothing was loaded"
    again.steps_applied = 6
    again.load_state_dict(foreign)
    for step in range(6, 9):
        give_gradients(step, params, back)
        again.step()
        ours.step()
    torch.testing.assert_close(params, back, rtol=1e-12, atol=1e-14)
    assert again.get_last_lr() == [legw(Cosine())(8)]


def test_a_dict_is_primitives_and_tensors_of_their_own(backend, device):
    params = make_params(torch.bfloat16, device)
    optimizer = SGD(params, lr=legw(), momentum=0.9, tile=16, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert LEGW.from_dict(state_dict["param_groups"][0]["schedule"]) == legw()
    assert state_dict["param_groups"][0]["steps_applied"] == 1
    for values in state_dict["state"].values():
        for value in values.values():
            assert value.dtype == torch.float32
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_low_precision_state_from_torch_is_widened_and_ours_is_not_rounded(backend, device):
    params = make_params(torch.bfloat16, device)
    plain = twins(params)
    torchs = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    give_gradients(0, plain)
    torchs.step()
    ours = SGD(params, lr=0.1, momentum=0.9, tile=16, backend=backend)
    ours.load_state_dict(torchs.state_dict())
    for p, q in zip(params, plain, strict=True):
        if "momentum_buffer" in torchs.state[q]:
            assert ours.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(ours.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"].float())


def test_what_cannot_be_loaded_changes_nothing(backend, device):
    params = make_params(torch.float32, device)
    optimizer = SGD(params, lr=legw(), momentum=0.9, tile=16, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    good = optimizer.state_dict()

    def changed(**group) -> dict:
        return {**good, "param_groups": [{**good["param_groups"][0], **group}]}

    cases = [
        (changed(steps_applied=-1), "steps_applied must be an integer, zero or more, got -1"),
        (changed(steps_applied=2**63), "steps_applied must be an integer"),
        (changed(steps_applied=True), "steps_applied must be an integer"),
        ({**good, "param_groups": []}, "different number of parameter groups"),
        (changed(steps_applied=2.5), "steps_applied must be an integer"),
        (changed(momentum=-1), "Invalid momentum value: -1"),
        (changed(schedule={"base_lr": 1}), r"schedule must be what LEGW.to_dict\(\) gives"),
        (changed(schedule={**legw().to_dict(), "base_lr": -1}), "base_lr must be a finite positive number, got -1"),
        (changed(params=[0]), "doesn't match the size"),
        ({**good, "param_groups": good["param_groups"] * 2}, "different number of parameter groups"),
        (
            {**good, "state": {1: {"momentum_buffer": torch.zeros(4)}}},
            r"state\[1\]\['momentum_buffer'\] has shape \(4,\)",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], good["state"], rtol=0, atol=0)
    assert after["param_groups"] == good["param_groups"]
    optimizer.step()


def test_hooks_run_in_torchs_order(backend, device):
    """A user's state-dict hook sees the packed dict; a load hook's changes are what is loaded."""
    params = make_params(torch.float32, device)
    optimizer = SGD(params, lr=legw(), momentum=0.9, tile=16, backend=backend)
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append(d["param_groups"][0]["steps_applied"]))

    def later(o, state_dict):
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "steps_applied": 77}]}

    optimizer.register_load_state_dict_pre_hook(later)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.steps_applied))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0, 77]


def test_torchs_old_dicts_say_none(backend, device):
    """torch 1 stored `momentum_buffer: None` for tensors without one."""
    params = make_params(torch.float64, device, [(4,), (5,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5, tile=16, backend=backend)
    old = optimizer.state_dict()
    old["state"] = {0: {"momentum_buffer": None}, 1: {"momentum_buffer": torch.ones(5)}}
    optimizer.load_state_dict(old)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"].tolist() == [1.0] * 4
    assert optimizer.state[params[1]]["momentum_buffer"].tolist() == [1.4] * 5


def test_a_checkpoint_without_a_schedule_keeps_the_optimizers(backend, device):
    """Tune with a number, resume with LEGW: what the constructor says is not silently dropped."""
    params = make_params(torch.float32, device, [(4,)])
    plain = SGD(params, lr=0.1, momentum=0.9, tile=16, backend=backend)
    give_gradients(0, params)
    plain.step()
    optimizer = SGD(twins(params), lr=legw(), momentum=0.9, tile=16, backend=backend)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["schedule"] == legw()
    assert optimizer.steps_applied == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9 itself uses it there
@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("cls", [SGD, LARS, Adam, AdamP, LAMB], ids=lambda cls: cls.__name__)
def test_distributed_checkpoint(backend, device, tmp_path, flattened, scheduled, cls):
    """torch.distributed.checkpoint's recipe: its template is a fresh optimizer's state dict, made by a step at LR 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dsd

    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flattened)

    options_of_class = dict(momentum=0.9) if cls is SGD else {}

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).to(device)
        lr = legw(Cosine()) if scheduled else 0.1
        return model, cls(model.parameters(), lr=lr, tile=16, backend=backend, **options_of_class)

    model, optimizer = make()
    for step in range(4):
        give_gradients(step, list(model.parameters()), skip=False)
        optimizer.step()
    saved = dict(m=dsd.get_model_state_dict(model), o=dsd.get_optimizer_state_dict(model, optimizer, options=options))
    resumed, other = make()
    if flattened:
        dsd.set_model_state_dict(resumed, saved["m"])
        dsd.set_optimizer_state_dict(resumed, other, saved["o"], options=options)
    else:
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        template = dict(m=dsd.get_model_state_dict(resumed), o=dsd.get_optimizer_state_dict(resumed, other))
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
        dsd.set_model_state_dict(resumed, template["m"])
        dsd.set_optimizer_state_dict(resumed, other, template["o"])
    assert other.steps_applied == 4
    for step in range(4, 8):
        for m, o in ((model, optimizer), (resumed, other)):
            give_gradients(step, list(m.parameters()), skip=False)
            o.step()
    torch.testing.assert_close(list(model.parameters()), list(resumed.parameters()), rtol=0, atol=0)
