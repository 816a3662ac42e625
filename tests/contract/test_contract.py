"""torch.optim's contract beyond results: edited groups, AMP, DDP, compilation, default devices."""

from __future__ import annotations

import pytest
import torch

from fused_legw import SGD
from tests.support.cases import give_gradients, legw, make_params, twins


def _torch_and_ours(backend: str, device: str, **options):
    params = make_params(torch.float64, device, [(4,), (5,), (6,)])
    plain = twins(params)
    pairs = [(params, SGD, dict(tile=16, backend=backend)), (plain, torch.optim.SGD, {})]
    return [
        (ps, cls([dict(params=ps[:1]), dict(params=ps[1:2], lr=1.0)], lr=0.1, **options, **own))
        for ps, cls, own in pairs
    ]


def _append(params, optimizer):
    optimizer.param_groups[0]["params"].append(params[2])


def _replace(params, optimizer):
    optimizer.param_groups[0]["params"][0] = params[2]


def _remove(params, optimizer):
    optimizer.param_groups[1]["params"].pop()


def _move(params, optimizer):
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


def _remove_group(params, optimizer):
    optimizer.param_groups.pop(0)


@pytest.mark.parametrize("edit", [_append, _replace, _remove, _move, _remove_group])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_edited_groups_are_followed(backend, device, edit, momentum):
    """Pruning and densification code edits param_groups in place."""
    both = _torch_and_ours(backend, device, momentum=momentum)
    for step in range(6):
        give_gradients(step, *(ps for ps, _ in both), skip=False)
        for ps, optimizer in both:
            if step == 3:
                edit(ps, optimizer)
            optimizer.step()
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-12, atol=1e-14)


def test_an_empty_group(backend, device):
    optimizer = SGD([dict(params=[])], lr=legw(), tile=16, backend=backend)
    optimizer.step()
    assert optimizer.steps_applied == 0 and optimizer.state_dict()["param_groups"][0]["params"] == []
    p = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    optimizer.add_param_group(dict(params=[p]))
    p.grad = -torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == pytest.approx([legw()(0)] * 3, rel=1e-12)


def test_a_step_skipped_by_the_grad_scaler_advances_nothing(backend, device):
    """Where a scheduler object would have advanced (pytorch#44511)."""
    (p,) = make_params(torch.float64, device, [(4,)])
    optimizer = SGD([p], lr=legw(), momentum=0.9, tile=16, backend=backend)
    scaler = torch.amp.GradScaler(device)
    for step in range(4):
        optimizer.zero_grad()
        loss = (p * (torch.inf if step == 1 else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps_applied == 3
    assert optimizer.get_last_lr() == [legw()(2)]


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_dtensors_are_refused(one_process):
    """The norm or the update of a shard would be silently wrong."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"\[1\] is a DTensor: sharded and other subclass tensors are not supported"):
        SGD([torch.zeros(2, requires_grad=True), torch.nn.Parameter(sharded)], lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("wrap_first", [False, True])
def test_ddp(one_process, backend, device, views, wrap_first):
    """With bucket views, gradients stand in DDP's own buffer, at addresses of any alignment."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    model, plain = torch.nn.Linear(5, 3).to(device), torch.nn.Linear(5, 3).to(device)
    plain.load_state_dict(model.state_dict())
    options = dict(lr=legw(), momentum=0.9, tile=16, backend=backend)
    optimizer = None if wrap_first else SGD(model.parameters(), **options)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = optimizer or SGD(wrapped.parameters(), **options)
    other = SGD(plain.parameters(), **options)
    for step in range(4):
        x = torch.randn(2, 5, device=device, generator=torch.Generator(device).manual_seed(step))
        for m, o in ((wrapped, optimizer), (plain, other)):
            o.zero_grad(set_to_none=not views)
            m(x).square().sum().backward()
            o.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-6, atol=1e-7)


def test_torch_compile_breaks_the_graph(device):
    """As around torch's own: the step runs as it is."""
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = SGD([p], lr=0.5, backend="aten")
    p.grad = torch.ones_like(p)
    torch.compile(optimizer.step, backend="aot_eager")()
    assert p.tolist() == [0.5] * 3


def test_another_default_device(triton_device):
    p = torch.ones(3, device=triton_device, requires_grad=True)
    p.grad = torch.ones_like(p)
    with torch.device("meta"):
        for backend in ("triton", "aten"):
            SGD([p], lr=0.25, tile=16, momentum=0.9, backend=backend).step()
    assert p.tolist() == [0.5] * 3
