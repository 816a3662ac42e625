"""What is kept from step to step while gradients look alike, and that every other look is seen."""

from __future__ import annotations

import weakref

import pytest
import torch

from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW
from fused_legw.buffers.gradients import GradientLayout, GradientReader, PythonGuards
from fused_legw.torch_private import TensorGuards
from tests.support.cases import legw, make_params, same, twins
from tests.support.machine import OTHER_GRAD_DTYPES

EVERY = [(SGD, dict(momentum=0.9)), (LARS, dict()), (Adam, dict()), (AdamW, dict()), (AdamP, dict()), (LAMB, dict())]
SHAPES = [(6, 8), (5,), (2, 3, 2, 2)]


@pytest.fixture(params=["torch", "python"])
def guards(request, monkeypatch):
    """torch's private class, and what stands in for it."""
    if request.param == "torch":
        assert GradientLayout.guards is TensorGuards is not None
    else:
        monkeypatch.setattr(GradientLayout, "guards", PythonGuards)


def _like(gradients):
    return [None if g is None else torch.randn_like(g) for g in gradients]


class _Subclass(torch.Tensor):
    pass


OTHERS = {
    "a dtype": lambda g: g.double(),
    "a shape": lambda g: g.new_ones(8, 6),
    "a layout": lambda g: g.new_ones(8, 6).t(),
    "a dimension": lambda g: g[None],
    "a device": lambda g: g.to("meta"),
    "sparse": lambda g: g.to_sparse(),
    "a class": lambda g: g.as_subclass(_Subclass),
    "none": lambda g: None,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("missing", [[], [1]])
def test_a_look_fits_what_looks_the_same_and_nothing_else(guards, other, missing):
    with torch.no_grad():
        gradients = [None if i in missing else torch.randn(6, 8) for i in range(3)]
        seen = GradientLayout(gradients)
        assert seen.fits(gradients) and seen.fits(_like(gradients))
        for at in {0, 1, 2} - set(missing):
            changed = _like(gradients)
            changed[at] = OTHERS[other](changed[at])
            assert not seen.fits(changed)
        for at in missing:
            changed = _like(gradients)
            changed[at] = torch.randn(6, 8)
            assert not seen.fits(changed)


def test_a_look_keeps_no_gradient(guards):
    gradient = torch.ones(3)
    seen, gone = GradientLayout([gradient]), weakref.ref(gradient)
    seen.fits([gradient])
    del gradient
    assert gone() is None


LOOKS = {
    "as ever": torch.randn_like,
    "another dtype": lambda p: torch.randn_like(p).to(torch.bfloat16 if p.dtype == torch.float32 else torch.float32),
    "transposed": lambda p: torch.randn(tuple(reversed(p.shape))).to(p).permute(*reversed(range(p.ndim))),
    "expanded": lambda p: p.new_ones(()).expand(p.shape),
    "none": lambda p: None,
}
if not OTHER_GRAD_DTYPES:
    del LOOKS["another dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), EVERY, ids=lambda x: getattr(x, "__name__", None))
def test_gradients_of_every_look_in_turn(backend, device, monkeypatch, cls, options, dtype):
    """Two steps with each, and two as ever: the same bits as of an optimizer that keeps nothing.

    In float32 a step that skips itself comes before either two: it sees their look, and makes nothing of it.
    """
    skips = dtype == torch.float32
    params = make_params(dtype, device, SHAPES)
    plain = twins(params)
    for p in (*params, *plain):
        p.grad_dtype = None
    made = [
        cls(tensors, lr=legw(), tile=16, backend=backend, skip_nonfinite=skips, **options)
        for tensors in (params, plain)
    ]
    alike, asked = GradientReader.alike, []

    def step(optimizer, keeps):
        answer = (lambda *args: keep(alike(*args))) if keeps else (lambda *args: False)
        monkeypatch.setattr(GradientReader, "alike", answer)
        optimizer.step()

    def keep(answer):
        asked.append(answer)
        return answer

    for name, gradient in LOOKS.items():
        for k, now in enumerate([gradient] * 3 + [torch.randn_like] * 3):
            if k % 3 == 0 and not skips:
                continue
            for i, (p, q) in enumerate(zip(params, plain, strict=True)):
                p.grad = q.grad = (torch.randn_like if i == 1 else now)(p.detach())
            if k % 3 == 0:
                params[1].grad[0] = torch.inf
            step(made[0], True)
            step(made[1], False)
            same(params, plain)
        if name == "as ever":
            assert asked == [False] + [True] * (5 if skips else 3)  # or the test would not test it
    assert made[0].steps_skipped == (2 * len(LOOKS) if skips else 0)
    for p, q in zip(params, plain, strict=True):
        for key, value in made[0].state[p].items():
            assert torch.equal(value, made[1].state[q][key]), key


def test_a_step_written_between_steps_alike_counts(backend, device):
    """The user's number in state["step"] holds, though the gradients look as before."""
    params = make_params(torch.float32, device, SHAPES)
    optimizer = Adam(params, lr=1e-3, tile=16, backend=backend)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.state[params[1]]["step"].fill_(100)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 101, 4]


@pytest.mark.parametrize("cls", [SGD, LARS])
def test_momentum_that_begins_between_steps_alike(backend, device, cls):
    """Its first update is the gradient's alone, whatever the dampening: torch's rule."""
    params = make_params(torch.float32, device, SHAPES)
    optimizer = cls(params, lr=0.1, momentum=0.0, dampening=0.5, tile=16, backend=backend)
    for momentum in (0.0, 0.0, 0.9, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    expected = 0.9 * 1 + 0.5
    for p in params:
        buffer = optimizer.state[p]["momentum_buffer"]
        if cls is SGD:
            torch.testing.assert_close(buffer, torch.full_like(p, expected))
        assert (buffer != 0).all()


def test_a_step_that_fails_leaves_nothing_behind(backend, device, monkeypatch):
    """Its gradients have another look, of which nothing was made; they are not kept."""
    params = make_params(torch.float32, device, SHAPES)
    plain = twins(params)
    optimizer, twin = (SGD(tensors, lr=0.1, tile=16, backend=backend) for tensors in (params, plain))
    params[0].grad = torch.ones_like(params[0])
    plain[0].grad = torch.ones_like(params[0])
    for made in (optimizer, twin):
        made.step()
    with monkeypatch.context() as broken:
        for name in ("begin", "run" if backend == "triton" else "_update_all"):
            for p in params:
                p.grad = torch.ones_like(p)
            gone = weakref.ref(params[0].grad)
            broken.setattr(type(optimizer._run.engine.devices[0]), name, _fails(gone))
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            broken.undo()
            for p in params:
                p.grad = None
            assert gone() is None
    for _ in range(2):
        for p in (*params, *plain):
            p.grad = torch.ones_like(p)
        for made in (optimizer, twin):
            made.step()
    same(params, plain)


def _fails(gone):
    def method(*args, **kwargs):
        assert gone() is not None
        raise ZeroDivisionError

    return method


def test_state_that_changes_places_is_seen(backend, device):
    """The same dicts in the same order, of other parameters."""
    params = make_params(torch.float32, device, [(4,), (4,)])
    plain = twins(params)
    ours = SGD(params, lr=0.1, momentum=0.9, tile=16, backend=backend)
    torchs = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    for optimizer, tensors in ((ours, params), (torchs, plain)):
        for _ in range(3):
            for scale, p in enumerate(tensors, 1):
                p.grad = scale * torch.ones_like(p)
            optimizer.step()
        state, (p, q) = optimizer.state, tensors
        first, second = state.pop(p), state.pop(q)
        state[q], state[p] = first, second
        optimizer.step()
    torch.testing.assert_close(params, plain)


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=lambda x: getattr(x, "__name__", None))
def test_a_first_step_under_inference_mode(backend, device, cls, options):
    """What it makes and keeps is of use to the steps after it."""
    params = make_params(torch.float32, device, SHAPES)
    optimizer = cls(
        params, lr=1e-3, tile=16, backend=backend, **{**options, **({"momentum": 0.0} if cls is SGD else {})}
    )
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.inference_mode():
        optimizer.step()
    if cls is SGD:
        optimizer.param_groups[0]["momentum"] = 0.9
        with torch.inference_mode():
            optimizer.step()
    optimizer.step()
    assert optimizer.steps_applied == (3 if cls is SGD else 2)
    assert not any(value.is_inference() for state in optimizer.state.values() for value in state.values())
