"""The step kernel from outside: launches, traffic, alignment, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_legw import SGD, Cosine
from legw_kernels import formulas
from tests.support.cases import give_gradients, legw, make_params, twins
from tests.support.machine import INTERPRETED, needs_other_grad_dtypes

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")


@pytest.mark.parametrize(("tensors", "groups"), [(3, 1), (60, 20)])
def test_one_launch_a_step_however_many_tensors_and_groups(triton_device, launches, tensors, groups):
    params = make_params(torch.float32, triton_device, [(7,)] * tensors)
    each = tensors // groups
    options = [
        dict(nesterov=True),
        dict(maximize=True, dampening=0.1),
        dict(lr=0.3, weight_decay=0.1),
        dict(momentum=0),
    ]
    split = [dict(params=params[i * each : (i + 1) * each], **options[i % 4]) for i in range(groups)]
    optimizer = SGD(split, lr=legw(), momentum=0.9, tile=16, backend="triton")
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    assert len(launches) == 3


def test_one_launch_for_each_pair_of_dtypes_and_one_count(triton_device, launches):
    params = make_params(torch.float32, triton_device, [(7,), (8,)]) + make_params(
        torch.bfloat16, triton_device, [(9,)]
    )
    optimizer = SGD(params, lr=legw(), tile=16, backend="triton")
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.steps_applied == step + 1
    dtypes = [(str(x["PARAM"]), x["LAST"]) for _, x in launches]
    assert dtypes == 3 * [("fp32", False), ("bf16", True)]
    assert optimizer.get_last_lr() == [legw()(2)]


@needs_other_grad_dtypes
def test_a_gradient_of_another_dtype(triton_device, launches):
    """Each pair of dtypes is a launch; both see the same t, and a tensor is updated by one of them."""
    params = make_params(torch.float64, triton_device, [(7,), (40,)])
    twin = twins(params)
    optimizer = SGD(params, lr=legw(), momentum=0.9, tile=16, backend="triton")
    other = SGD(twin, lr=legw(), momentum=0.9, tile=16, backend="triton")
    for step in range(4):
        give_gradients(step, params, twin)
        if params[1].grad is not None:
            narrow = params[1].grad.float()
            twin[1].grad = narrow.double()
            params[1].grad_dtype = None
            params[1].grad = narrow
        optimizer.step()
        other.step()
    torch.testing.assert_close(params, twin, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("flatten", [True, False])
def test_unaligned_gradients_take_the_element_path(triton_device, n, shift, flatten):
    """DDP's bucket views come at any element; a 16-byte access there faults on a GPU, which no value can show here."""
    p = torch.randn(n, device=triton_device, requires_grad=True)
    expected = p.detach() - 0.1
    room = torch.full((n + 16,), 7.0, device=triton_device)
    p.grad = room[shift : shift + n]
    p.grad.fill_(1.0)
    optimizer = SGD([p], lr=0.1, momentum=0.9, tile=16, backend="triton", flatten=flatten)
    if INTERPRETED:
        from tests.support.traffic import counted

        with counted() as traffic:
            optimizer.step()
        assert all(address % 16 == 0 for address in traffic.wide)
        # Of each tile the state, loaded and stored; of a full one the weight if aligned, then the gradient if it is.
        full = 0 if p.data_ptr() % 16 else 3 if shift % 4 == 0 else 2
        assert len(traffic.wide) == 2 * -(-n // 16) + full * (n // 16)
    else:
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected)
    assert (room[shift + n :] == 7).all() and (room[:shift] == 7).all()


def test_parameters_in_place_are_written_to_their_end_and_no_further(triton_device):
    room = torch.full((200,), 7.0, device=triton_device)
    params = [room[3:40].requires_grad_(), room[41:105].requires_grad_()]
    optimizer = SGD(params, lr=1.0, tile=16, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.full((200,), 7.0, device=triton_device)
    expected[3:40] = expected[41:105] = 6
    assert torch.equal(room, expected)


@interpreted
@pytest.mark.parametrize(
    ("shapes", "limit"),
    [([(1024,)] * 6 + [(4096, 8), (61 * 1024,)], 20.5), ([(1000, 100)], 20.5), ([(333, 3), (100, 1000), (100,)], 21)],
    ids=["whole tiles", "one odd tensor", "odd tensors"],
)
def test_counted_traffic(shapes, limit):
    """20 bytes per float32 parameter is the least: read p, g, m; write p, m."""
    from tests.support.traffic import counted

    params = make_params(torch.float32, "cpu", shapes)
    optimizer = SGD(params, lr=legw(Cosine()), momentum=0.9, weight_decay=1e-4, backend="triton")
    give_gradients(0, params, skip=False)
    with counted() as traffic:
        optimizer.step()
    assert 20 <= traffic.bytes / sum(p.numel() for p in params) <= limit


@interpreted
def test_counted_traffic_without_momentum():
    from tests.support.traffic import counted

    params = make_params(torch.float32, "cpu", [(100, 1024)])
    optimizer = SGD(params, lr=legw(Cosine()), backend="triton")
    give_gradients(0, params, skip=False)
    with counted() as traffic:
        optimizer.step()
    assert 12 <= traffic.bytes / params[0].numel() <= 12.5


def test_counts_and_ticket(triton_device):
    """t counts steps, each tensor its own updates, and the ticket is back at zero for the next launch."""
    params = make_params(torch.float32, triton_device, [(70,), (5,), (200,)] + [(1,)] * 150)
    optimizer = SGD(params, lr=legw(), momentum=0.9, tile=16, backend="triton")
    times = [0] * len(params)
    for step in range(6):
        give_gradients(step, params)
        times = [n + (p.grad is not None) for n, p in zip(times, params, strict=True)]
        optimizer.step()
    (bucket,), (device,) = optimizer._run.layout.buckets, optimizer._run.engine.devices
    assert bucket.tensor_steps.tolist() == times
    assert device.step_counts.tolist() == [6, 0]
    assert [ticket.item() for _, ticket in device._address_tables.values()] == [0]


def test_twenty_scheduled_steps_compile_once(triton_device):
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from legw_kernels.update_pass import update_kernel

    (p,) = make_params(torch.float32, triton_device, [(2048,)])
    optimizer = SGD([p], lr=legw(Cosine()), momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    cache = update_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for _ in range(20):
        optimizer.step()
    assert len(cache) == before


def test_host_tables_change_only_when_values_do(triton_device, monkeypatch):
    """Scheduled steps with gradients at the same addresses upload nothing."""
    from fused_legw.backends import device_table

    uploads: list[Tensor] = []
    copy = device_table._Staging.copy
    monkeypatch.setattr(device_table._Staging, "copy", lambda self, *a, **k: (uploads.append(a), copy(self, *a, **k)))
    params = make_params(torch.float32, triton_device, [(7,), (8,)])
    optimizer = SGD(params, lr=legw(Cosine()), momentum=0.9, tile=16, backend="triton")
    give_gradients(0, params)
    optimizer.step()
    uploads.clear()
    for _ in range(3):
        optimizer.step()
    assert uploads == []
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.step()
    assert len(uploads) == 1
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert len(uploads) == 2


def test_rows_match_the_columns_of_their_tables():
    from legw_kernels import launch, tables

    for hyper in (formulas.MomentumHyper(), formulas.AdamHyper()):
        row = launch.group_row(formulas.ScheduleConstants(), None, (0, 0), 1, (1.0, False), False, hyper)
        assert len(row) == tables.GROUP_WIDTH
        assert tuple(row[tables.HYPER :][: len(hyper)]) == hyper
        assert tuple(row[: tables.LR_ADDRESS]) == formulas.ScheduleConstants()
        assert row[tables.STATES : tables.HYPER] == [1, 1.0, False, False]
    assert len(launch.segment_row(torch.zeros(1), 0, 0, 4, 0)) == tables.SEGMENT_WIDTH
