"""How often a step launches, and what it moves, for every optimizer: counted, not timed."""

from __future__ import annotations

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, Cosine
from fused_legw.buffers import bucket as flat
from tests.support.cases import give_gradients, legw, make_params
from tests.support.machine import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")
CLIP = dict(max_grad_norm=1.0)
SKIP = dict(skip_nonfinite=True)
MOMENTUM = dict(momentum=0.9)
MOMENTUM_OF = {SGD: MOMENTUM, LARS: MOMENTUM, LAMB: {}}

# Class, options, and the launches of a step on one (device, parameter dtype, gradient dtype).
LAUNCHES = [
    (SGD, MOMENTUM, 1),
    (Adam, dict(), 1),
    (AdamW, dict(amsgrad=True), 1),
    (SGD, {**MOMENTUM, **CLIP}, 2),
    (SGD, SKIP, 2),
    (Adam, {**CLIP, **SKIP}, 2),
    (LARS, dict(), 2),
    (LARS, dict(variant="simclr-popular", **SKIP), 2),
    (LARS, {**CLIP, **SKIP}, 2),
    (LAMB, dict(), 2),
    (LAMB, dict(variant="apex"), 3),
    (LAMB, {**CLIP, **SKIP}, 3),
    # |g + weight_decay * w| of clipped gradients is summed only once the global norm is known.
    (LARS, dict(variant="moco", **CLIP), 3),
]


@pytest.mark.parametrize(("cls", "options", "expected"), LAUNCHES, ids=str)
def test_launches(triton_device, launches, cls, options, expected):
    """As many for 3 tensors as for 60, for one group as for 20 with different options."""
    for tensors, groups in ((3, 1), (60, 20)):
        params = make_params(torch.float32, triton_device, [(7,)] * tensors)
        each = tensors // groups
        split = [dict(params=params[i * each : (i + 1) * each], weight_decay=i / 100) for i in range(groups)]
        optimizer = cls(split, lr=legw(), tile=16, backend="triton", **options)
        launches.clear()
        for step in range(2):
            give_gradients(step, params)
            optimizer.step()
        assert len(launches) == 2 * expected
        assert sum(constants.get("LAST", False) for _, constants in launches) == 2


def test_launches_for_3000_tensors(triton_device, monkeypatch):
    """Counted, not run: the interpreter would take half a minute for values that other tests look at."""
    from legw_kernels import launch

    launches = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *args, **constants: launches.append(kernel.fn.__name__))
    params = make_params(torch.float32, triton_device, [(1,)] * 3000)
    optimizer = Adam(params, tile=16, backend="triton")
    give_gradients(4, params)
    optimizer.step()
    assert launches == ["update_kernel"]


@pytest.mark.parametrize("cls", [SGD, LARS, LAMB])
def test_tensors_however_programs_share_them(triton_device, monkeypatch, cls):
    """Many chunks a tensor and many tensors a run; the bits depend neither on the programs nor on their runs."""
    from legw_kernels import launch, tuning

    results = []
    for most_programs, chunks_of_a_run, most_chunks in ((1, 1000, 4096), (3, 2, 4096), (50, 1, 4096), (3, 2, 3)):
        monkeypatch.setattr(launch, "most_programs", lambda *args, most=most_programs: most)
        monkeypatch.setattr(tuning, "CHUNKS_OF_A_RUN", chunks_of_a_run)
        monkeypatch.setattr(flat, "MOST_CHUNKS", most_chunks)
        params = make_params(torch.float32, triton_device, [(7,), (1000,), (0,), (64,), (3, 5), (650,), (129,)])
        optimizer = cls(params, lr=legw(Cosine()), weight_decay=0.1, tile=16, backend="triton", **MOMENTUM_OF[cls])
        for step in range(4):
            give_gradients(step, params)
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:3]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[3], results[0])  # partial norms of other lengths


def test_amp_with_an_inf_check_from_outside_takes_no_norms(triton_device, launches):
    params = make_params(torch.float32, triton_device, [(7,), (20,)])
    optimizer = SGD(params, lr=legw(), tile=16, backend="triton")
    give_gradients(0, params)
    optimizer.grad_scale = torch.full((1,), 8.0, device=triton_device)
    optimizer.found_inf = torch.zeros(1, device=triton_device)
    optimizer.step()
    assert len(launches) == 1


# Class, options, the least bytes per float32 parameter; with clipping and AMP.
TRAFFIC = [
    (SGD, MOMENTUM, 20, 24),
    (Adam, dict(), 28, 32),
    (AdamW, dict(), 28, 32),
    (Adam, dict(amsgrad=True), 36, 40),
    (LARS, dict(), 28, 28),
    (LARS, dict(variant="simclr"), 28, 32),
    (LARS, dict(variant="simclr-popular"), 32, 36),
    (LARS, dict(variant="apex-larc"), 28, 28),
    (AdamP, dict(nesterov=True), 44, 48),
    (LAMB, dict(), 40, 44),
    (LAMB, dict(variant="apex"), 44, 44),
    (LAMB, dict(variant="deepspeed"), 40, 44),
]


@interpreted
@pytest.mark.parametrize(("cls", "options", "plain", "everything"), TRAFFIC, ids=str)
def test_counted_traffic(cls, options, plain, everything):
    from tests.support.traffic import counted

    for scaled, least in ((False, plain), (True, everything)):
        shapes = [(96, 1024)] if cls is AdamP else [(1024,)] * 6 + [(4096, 8), (61 * 1024,)]  # short rows cost more
        params = make_params(torch.float32, "cpu", shapes)
        clip = dict(max_grad_norm=1.0, skip_nonfinite=True) if scaled else {}
        # One decay for all: LARS's rows without a decay would have nothing to measure.
        optimizer = cls(params, lr=legw(Cosine()), weight_decay=1e-4, backend="triton", **options, **clip)
        give_gradients(0, params, skip=False)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 8.0), torch.zeros(1)
        with counted() as traffic:
            optimizer.step()
        per_parameter = traffic.bytes / sum(p.numel() for p in params)
        assert least <= per_parameter <= least + 0.2


@pytest.mark.parametrize("cls", [SGD, LARS, LAMB])
@pytest.mark.parametrize("kinds", ["triton triton", "aten aten", "triton aten"])
def test_devices_share_norm_and_decision(triton_device, cls, kinds):
    """Two backends, as for two devices, clip by one norm and skip together; here both stand for the same device."""
    from fused_legw.backends.engine import make_backend

    results = []
    for split in (False, True):
        params = make_params(torch.float32, triton_device, [(20,), (7,)])
        params += make_params(torch.float64, triton_device, [(9,)])
        optimizer = cls(params, lr=legw(Cosine()), max_grad_norm=0.5, skip_nonfinite=True, tile=16, backend="triton")
        engine = optimizer._run.engine
        if split:
            engine.devices = [
                make_backend(kind, optimizer._spec, [bucket], 0)
                for kind, bucket in zip(kinds.split(), optimizer._run.layout.buckets, strict=True)
            ]
        for step in range(4):
            give_gradients(step, params, skip=False)
            if step == 2:
                params[2].grad[3] = torch.inf
            optimizer.step()
        results.append([p.detach() for p in params])
        assert all(device.step_counts.tolist() == [3, 1] for device in engine.devices)
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)
