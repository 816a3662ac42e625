"""torch.set_default_dtype changes no bit of ours: every tensor that we make names its dtype."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fused_legw
from fused_legw import LAMB, LARS, SGD, Adam, AdamP, AdamW, GradientNoiseScale, MicroBatchNorms
from tests.support.cases import legw, twins

FAMILY = [
    (SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    (LARS, dict(weight_decay=0.1)),
    (Adam, dict(amsgrad=True)),
    (AdamW, dict(max_grad_norm=2.0)),
    (AdamP, dict(weight_decay=0.1, delta=0.5)),
    (LAMB, dict(variant="apex")),
]
family = pytest.mark.parametrize(("cls", "options"), FAMILY, ids=[cls.__name__ for cls, _ in FAMILY])
DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]
SCALERS = {"ours": fused_legw.GradScaler, "torch's": torch.amp.GradScaler}
ROOT = Path(fused_legw.__file__).parent
# Functions of torch that give the default dtype to what they make, if they are told no other.
MAKERS = (
    {"tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace"}
    | {"rand", "randn", "range", "empty_strided", "Tensor"}
)  # fmt: skip


@pytest.fixture(autouse=True)
def _float32_afterwards():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=DEFAULTS, ids=str)
def default(request) -> torch.dtype:
    return request.param


def _both(run, default: torch.dtype):
    """What `run` gives under float32 and under another default dtype."""
    results = []
    for dtype in torch.float32, default:
        torch.set_default_dtype(dtype)
        results.append(run())
    torch.set_default_dtype(torch.float32)
    return results


def _random(seed: int, params: list[tuple[torch.dtype, tuple[int, ...]]], device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for dtype, s in params]


MIXED = [
    (torch.float32, (5, 3)),
    (torch.float32, ()),
    (torch.float32, (0,)),
    (torch.bfloat16, (4, 4)),
    (torch.float16, (7,)),
    (torch.float64, (3,)),
]


def _step(optimizer, params: list[torch.Tensor], seed: int) -> None:
    for p, g in zip(params, _random(seed, MIXED, params[0].device), strict=True):
        p.grad = g
    optimizer.step()


def _trained(cls, options, backend: str, device: str, updates: range):
    """Everything that steps leave behind. The first ones are given as a number of updates in a state dict."""
    params = twins(_random(0, MIXED, device))
    optimizer = cls(params, lr=legw(), tile=16, backend=backend, **options)
    _step(optimizer, params, 1)
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.update({"step": float(updates.start)} if "step" in own else {})
    optimizer.load_state_dict(state)
    for step in updates:
        _step(optimizer, params, step)
    reports = [optimizer.grad_norm, *optimizer.trust_ratios().values()] if cls in (LARS, LAMB) else []
    return params, optimizer.state_dict()["state"], [*reports, optimizer.steps_skipped], optimizer.get_last_lr()


@family
@pytest.mark.parametrize("start", [0, 2048])
def test_updates_keep_their_bits(device, cls, options, default, start):
    """257 is none of bfloat16's numbers, 2,049 none of float16's."""
    updates = range(start, start + (300 if start == 0 else 3))
    plain, other = _both(lambda: _trained(cls, options, "aten", device, updates), default)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


@family
def test_updates_by_triton_keep_their_bits(triton_device, cls, options):
    plain, other = _both(lambda: _trained(cls, options, "triton", triton_device, range(255, 258)), torch.bfloat16)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


@pytest.mark.parametrize("how", SCALERS)
def test_scalers_keep_their_bits(backend, device, how, default):
    def run():
        params = twins(_random(0, MIXED[:2], device))
        optimizer, scales = Adam(params, lr=0.1, tile=16, backend=backend), []
        scaler = SCALERS[how](device, init_scale=1024.0, growth_interval=2)
        for step in range(6):
            loss = sum(p.square().sum() for p in params) * (torch.inf if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return params, scales, optimizer.state_dict()["state"]

    plain, other = _both(run, default)
    assert plain[1] == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_the_noise_scale_keeps_its_bits(device, default):
    def run():
        w, noise = torch.zeros(2, requires_grad=True, dtype=torch.float32, device=device), GradientNoiseScale(1, 2)
        with MicroBatchNorms(noise, [w]) as norms:
            for _ in range(3):
                for sample in [3.0, 0.1], [0.2, 4.0]:
                    ((w * torch.tensor(sample, dtype=torch.float32, device=device)).sum() / 2).backward()
                norms.step()
                w.grad = None
        listed = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in noise.state_dict().items()}
        resumed = GradientNoiseScale(1, 2)
        resumed.load_state_dict(listed)  # as from JSON
        assert resumed.state_dict().keys() == listed.keys()
        return noise.state_dict(), resumed.state_dict(), noise.interval()

    plain, other = _both(run, default)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)
    torch.testing.assert_close(other[1], other[0], rtol=0, atol=0, check_device=False)


def test_verification_keeps_its_bits(default):
    """Which gradients are None is drawn at random."""
    from fused_legw import verify

    plain, other = _both(lambda: verify(lambda params: Adam(params, lr=0.01), [(3, 5), (7,), ()], 20), default)
    assert other == plain


def _made_without_dtype(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        f"{path.name}:{call.lineno}: {ast.unparse(call.func)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in MAKERS
        and "dtype" not in {word.arg for word in call.keywords}
    ]


def test_every_tensor_names_its_dtype():
    """Also where today's values are integers and the default dtype would not be used."""
    import legw_kernels

    files = [*ROOT.rglob("*.py"), *Path(legw_kernels.__file__).parent.rglob("*.py")]
    assert len(files) > 60
    assert [line for path in files for line in _made_without_dtype(path)] == []
