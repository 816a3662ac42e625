"""Param groups: what is refused and when, and how a LEGW group shows its LR."""

from __future__ import annotations

import pytest
import torch

from fused_legw import LEGW, SGD, Cosine, MultiStep
from tests.support.cases import give_gradients, legw, make_params, twins


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(lr=-0.1), ValueError, "Invalid learning rate: -0.1"),
        (dict(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
        (dict(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (dict(momentum=-1), ValueError, "Invalid momentum value: -1"),
        (dict(weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
        (dict(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (dict(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "Nesterov momentum requires"),
        (dict(foreach=True, fused=True), RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        (dict(differentiable=True), ValueError, "differentiable=True is not supported"),
        (dict(backend="cuda"), ValueError, "backend must be 'triton', 'aten' or None, got 'cuda'"),
        (dict(tile=100), ValueError, "tile must be a power of two, 16 or more, got 100"),
    ],
    ids=str,
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        SGD([torch.zeros(2, requires_grad=True)], **options)
    optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    if not options.keys() & {"differentiable", "backend", "tile"}:
        with pytest.raises(kind, match=message):
            optimizer.add_param_group(dict(params=[torch.zeros(3, requires_grad=True)], **options))
        assert len(optimizer.param_groups) == 1


def _shared() -> list[torch.Tensor]:
    whole = torch.zeros(10)
    return [whole[:6].requires_grad_(), whole[5:].requires_grad_()]


def _with_gradient(dtype: torch.dtype) -> torch.Tensor:
    x = torch.zeros(2, dtype=dtype)
    x.grad = torch.ones_like(x)
    return x


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ([], ValueError, "empty parameter list"),
        ([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], TypeError, r"\[0\] has dtype torch.complex64"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.complex64, requires_grad=True)], TypeError, r"\[1\] has dtype"),
        ([torch.zeros(1).expand(5).requires_grad_()], ValueError, "has elements that share memory"),
        ([torch.zeros(9).as_strided((2, 3), (1, 1)).requires_grad_()], ValueError, "has elements that share memory"),
        (_shared(), ValueError, r"\[0\] and param_groups\[0\]\['params'\]\[1\] share memory"),
        ([("w", torch.zeros(2)), ("b", _with_gradient(torch.int64))], TypeError, "b has dtype torch.int64"),
        ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ],
)  # fmt: skip
def test_bad_parameters(params, kind, message):
    with pytest.raises(kind, match=message):
        SGD(params, lr=0.1)


def test_subclass_parameters_are_refused():
    class Odd(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with pytest.raises(TypeError, match="is a Odd: sharded and other subclass tensors are not supported"):
        SGD([torch.zeros(2).as_subclass(Odd).requires_grad_()], lr=0.1)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_bad_gradients_change_nothing(backend, device):
    params = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = SGD(params, lr=legw(), momentum=0.9, backend=backend, tile=16)
    give_gradients(0, params)
    optimizer.step()
    before = twins(params), optimizer.state_dict()
    params[1].grad = torch.ones(5, device=device).to_sparse()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\].grad has layout torch.sparse_coo"):
        optimizer.step()
    torch.testing.assert_close(params, before[0], rtol=0, atol=0)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before[1]["state"], rtol=0, atol=0)
    assert after["param_groups"] == before[1]["param_groups"]


def test_triton_on_cpu_is_an_error_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = torch.zeros(3, requires_grad=True)
    address = p.data_ptr()
    with pytest.raises(ValueError, match=r"backend='triton' cannot run on cpu: .*TRITON_INTERPRET=1"):
        SGD([p], lr=0.1, backend="triton")
    assert p.data_ptr() == address
    assert SGD([p], lr=0.1).backend == "aten"


def test_the_shown_lr_follows_the_host(backend, device):
    (p,) = make_params(torch.float32, device, [(4,)])
    schedule = legw(Cosine())
    optimizer = SGD([p], lr=schedule, backend=backend, tile=16)
    assert optimizer.param_groups[0]["lr"] == schedule(0)
    assert optimizer.param_groups[0]["schedule"] is schedule
    for t in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == schedule(t)
        assert optimizer.get_last_lr() == [schedule(t)]


def test_steps_applied_can_be_set(backend, device):
    p = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    schedule = legw(Cosine())
    optimizer = SGD([p], lr=schedule, backend=backend, tile=16)
    optimizer.steps_applied = 123
    assert optimizer.param_groups[0]["lr"] == schedule(122)
    p.grad = -torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == pytest.approx([schedule(123)] * 3, rel=1e-12)
    assert optimizer.steps_applied == 124
    for bad in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match=f"steps_applied must be an integer, zero or more, got {bad}"):
            optimizer.steps_applied = bad


def test_writing_the_lr_of_a_legw_group(backend, device):
    params = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = SGD(
        [dict(params=params[:1]), dict(params=params[1:], lr=legw())], lr=0.5, momentum=0.9, backend=backend, tile=16
    )
    give_gradients(0, params)
    before = twins(params)
    optimizer.param_groups[1]["lr"] = 0.25
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['lr'\] was set to 0.25, but the group follows LEGW"):
        optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert optimizer.steps_applied == 0


def test_an_lr_of_zero_makes_state_and_moves_nothing(backend, device):
    """torch.distributed.checkpoint brings an optimizer's state into being with such a step, then restores the LR."""
    params = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = SGD(params, lr=legw(), momentum=0.9, dampening=0.5, weight_decay=0.1, backend=backend, tile=16)
    before, shown = twins(params), optimizer.param_groups[0]["lr"]
    give_gradients(0, params)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert optimizer.steps_applied == 0
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in params)
    optimizer.param_groups[0]["lr"] = shown
    twin = SGD(before, lr=legw(), momentum=0.9, dampening=0.5, weight_decay=0.1, backend=backend, tile=16)
    for step in range(3):
        give_gradients(step, params, before)
        optimizer.step()
        twin.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_a_torch_scheduler_on_a_legw_group_is_an_error(device):
    params = make_params(torch.float32, device, [(4,)])
    optimizer = SGD(params, lr=legw(), momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    give_gradients(0, params)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] follows LEGW.*a torch LR scheduler was made"):
        optimizer.step()


def test_a_schedule_that_is_none(device):
    params = make_params(torch.float32, device, [(4,)])
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: schedule must be a LEGW, an AutoWU or None, got 'cosine'"
    ):
        SGD([dict(params=params, schedule="cosine")])
    optimizer = SGD(params, lr=legw())
    optimizer.param_groups[0]["schedule"] = 0.1
    give_gradients(0, params)
    with pytest.raises(ValueError, match=r"must be a LEGW, an AutoWU or None, got 0\.1"):
        optimizer.step()


def test_another_schedule_in_mid_run(backend, device):
    p = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = SGD([p], lr=legw(), backend=backend, tile=16)
    p.grad = -torch.ones_like(p)
    optimizer.step()
    new = legw(MultiStep([0.1, 0.2]), base_warmup_epochs=0)
    optimizer.param_groups[0]["schedule"] = new
    for t in range(1, 5):
        p.data.zero_()
        optimizer.step()
        assert p.tolist() == pytest.approx([new(t)] * 3, rel=1e-12)


def test_a_group_added_later_joins_at_the_same_t(backend, device):
    params = make_params(torch.float64, device, [(4,), (40,)])
    optimizer = SGD(params[:1], lr=legw(), momentum=0.9, backend=backend, tile=16)
    for step in range(3):
        give_gradients(step, params[:1])
        optimizer.step()
    momentum = optimizer.state[params[0]]["momentum_buffer"].clone()
    optimizer.add_param_group(dict(params=params[1:], lr=legw(base_lr=1.0), momentum=0))
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum)
    assert optimizer.param_groups[1]["lr"] == legw(base_lr=1.0)(2)
    before = params[1].detach().clone()
    params[0].grad, params[1].grad = None, -torch.ones_like(params[1])
    optimizer.step()
    torch.testing.assert_close(params[1] - before, torch.full_like(before, legw(base_lr=1.0)(3)), rtol=1e-9, atol=0)
    assert optimizer.steps_applied == 4


def test_a_written_lr_outlives_a_rebuild(backend, device):
    params = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = SGD(params[:1], lr=legw(), tile=16, backend=backend)
    give_gradients(0, params)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    params[0].data = params[0].data.clone()
    before = twins(params)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.add_param_group(dict(params=params[1:], lr=0.1))
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['lr'\] was set to 5\.0"):
        optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_a_legw_written_to_the_lr_of_a_plain_group(device):
    params = make_params(torch.float32, device, [(4,)])
    optimizer = SGD(params, lr=0.1)
    optimizer.param_groups[0]["lr"] = legw()
    with pytest.raises(TypeError, match=r"set param_groups\[0\]\['schedule'\] instead"):
        optimizer.step()


def test_a_bad_option_in_a_later_group_changes_nothing(backend, device):
    params = make_params(torch.float32, device, [(4,), (5,)])
    optimizer = SGD([dict(params=[p]) for p in params], lr=0.1, tile=16, backend=backend)
    optimizer.param_groups[1]["weight_decay"] = "much"
    give_gradients(0, params)
    before = twins(params)
    with pytest.raises(TypeError, match=r"param_groups\[1\]: weight_decay must be a number, got 'much'"):
        optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_repr_and_defaults():
    optimizer = SGD([torch.zeros(2, requires_grad=True)])
    torchs = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    assert torchs.defaults.items() <= optimizer.defaults.items()
    assert "lr: 0.001" in repr(optimizer)
    assert isinstance(LEGW, type)
