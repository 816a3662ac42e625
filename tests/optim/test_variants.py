"""Every variant of LARS and LAMB against an independent implementation, over a whole schedule. See oracles.py."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import tests.support.oracles as o
from fused_legw import LAMB, LARS, Constant, Cosine, Exponential, MultiStep, Polynomial, reference
from tests.support.cases import error, legw, make_params, same, twins
from tests.support.machine import INTERPRETED

DECAYS = [Cosine(), Polynomial(2), MultiStep([3, 5.5, 8]), Constant(), Exponential(0.7, 2), Cosine(0.01)]
WD, NO_DECAY = dict(weight_decay=0.05), dict(weight_decay=0.0)
MATRIX, ZEROS, VECTOR = "matrix", "zeros", "vector"
SMALL = {MATRIX: (5, 8), ZEROS: (4, 6), VECTOR: (6,)}
LARGE = {MATRIX: (24, 40), ZEROS: (20, 30), VECTOR: (700,)}


class Row(NamedTuple):
    """A param group: ours with its options beside an oracle with its own names for them."""

    oracle: type[o.Oracle]
    variant: str
    ours: dict = {}  # noqa: RUF012  # never changed
    told: dict | None = None
    both: dict = WD
    shapes: tuple = (MATRIX,)
    float32: Callable[..., o.Oracle] | None = None  # whose rounding ours is held to, if not `oracle`'s

    def options(self) -> dict:
        return dict(variant=self.variant) | self.both | self.ours

    def make_oracle(self, dtype: torch.dtype) -> o.Oracle:
        make = self.float32 if self.float32 and dtype == torch.float32 else self.oracle
        return make(**self.both | (self.ours if self.told is None else self.told))


plain = functools.partial(Row, shapes=(MATRIX, ZEROS, VECTOR))
bias = functools.partial(Row, both=NO_DECAY, shapes=(VECTOR,))
LARS_ROWS = [
    plain(o.PaperLARS, "paper"),
    plain(o.TensorFlowLARS, "tensorflow"),
    plain(o.SimCLRLARS, "simclr"),
    plain(o.SimCLRLARS, "simclr-popular", told=dict(classic_momentum=False)),
    # Ours keeps the buffer without the LR, which is equal. Theirs multiplies by 0.9 * lr / last_lr, whose rounding
    # averages out; 0.9 in float32 is always off by the same 3e-8, here and in every other variant.
    plain(o.NvidiaLARS, "nvidia", float32=functools.partial(o.TorchLARS, eps=0.0)),
    plain(o.ApexLARC, "apex-larc"),
    plain(o.RocmLARS, "rocm"),
    plain(o.TorchLARS, "torchlars"),
    plain(o.TimmLARS, "timm"),
    plain(o.BoltsLARS, "bolts"),
    plain(o.MocoLARS, "moco"),
    plain(o.OptaxLARS, "optax"),
    *(bias(oracle, name) for oracle, name in [(o.TimmLARS, "timm"), (o.BoltsLARS, "bolts"), (o.ApexLARC, "apex-larc")]),
]
LAMB_ROWS = [
    plain(o.PaperLAMB, "paper"),
    plain(o.AuthorLAMB, "author-tf"),
    plain(o.ApexLAMB, "apex"),
    plain(o.TimmLAMB, "timm"),
    plain(o.DeepSpeedLAMB, "deepspeed"),
    plain(o.OptaxLAMB, "optax"),
    *(bias(oracle, name) for oracle, name in [(o.AuthorLAMB, "author-tf"), (o.ApexLAMB, "apex"), (o.TimmLAMB, "timm")]),
]
NESTEROV = dict(nesterov=True)
DAMPENED = dict(dampening=0.3)
BOTH = (MATRIX, VECTOR)
LARS_OPTIONS = [
    Row(o.TensorFlowLARS, "tensorflow", NESTEROV),
    Row(o.SimCLRLARS, "simclr", NESTEROV, dict(use_nesterov=True)),
    Row(o.SimCLRLARS, "simclr-popular", NESTEROV, dict(use_nesterov=True, classic_momentum=False)),
    *(Row(oracle, name, NESTEROV) for oracle, name in [(o.OptaxLARS, "optax"), (o.MocoLARS, "moco")]),
    *(Row(oracle, name, NESTEROV) for oracle, name in [(o.TimmLARS, "timm"), (o.BoltsLARS, "bolts")]),
    *(Row(oracle, name, DAMPENED) for oracle, name in [(o.TimmLARS, "timm"), (o.BoltsLARS, "bolts")]),
    *(Row(oracle, name, NESTEROV) for oracle, name in [(o.ApexLARC, "apex-larc"), (o.TorchLARS, "torchlars")]),
    *(Row(oracle, name, DAMPENED) for oracle, name in [(o.ApexLARC, "apex-larc"), (o.TorchLARS, "torchlars")]),
    *(Row(oracle, name, dict(momentum=0.0)) for oracle, name in [(o.PaperLARS, "paper"), (o.TimmLARS, "timm")]),
    *(Row(oracle, name, dict(momentum=0.5)) for oracle, name in [(o.NvidiaLARS, "nvidia"), (o.RocmLARS, "rocm")]),
    # single axes: what makes one source of another
    Row(
        o.TimmLARS,
        "timm",
        dict(trust_clip=True, trust_coefficient=0.3),
        dict(trust_clip=True, trust_coeff=0.3),
        shapes=(MATRIX, ZEROS),
    ),
    Row(o.TimmLARS, "timm", dict(not_adapted="nothing"), dict(always_adapt=True), both=NO_DECAY),
    Row(o.ApexLARC, "apex-larc", dict(trust_clip=False), dict(clip=False)),
    Row(o.ApexLARC, "apex-larc", dict(trust_coefficient=0.5, eps=1e-3)),
    Row(o.TpuLARS, "tensorflow", dict(form="unscaled"), {}),
    Row(o.TpuLARS, "tensorflow", dict(form="unscaled") | NESTEROV, NESTEROV),
    Row(o.NvidiaLARS, "rocm", dict(form="corrected"), {}),
    Row(o.TorchLARS, "nvidia", dict(form="torch", eps=1e-8), {}),
    Row(o.OptaxLARS, "optax", dict(eps=0.1, trust_coefficient=0.02)),
    Row(o.SimCLRLARS, "tensorflow", dict(denominator="norm_of_sum"), {}),
    Row(o.TensorFlowLARS, "optax", dict(denominator="sum_of_norms"), {}),
    Row(o.MocoLARS, "optax", dict(form="torch", not_adapted="vectors"), {}, shapes=BOTH),
    Row(o.PytorchOptimizerLARS, "moco", dict(denominator="sum_of_norms", zero_norm="denominator"), {}, shapes=BOTH),
    Row(o.TensorFlowLARS, "paper", dict(zero_norm="one"), {}),
    Row(o.PaperLARS, "rocm", dict(zero_norm="denominator"), {}),
    Row(o.BoltsLARS, "timm", dict(zero_norm="plain"), {}, shapes=(MATRIX, ZEROS)),
    Row(o.TimmLARS, "torchlars", dict(not_adapted="no_decay"), {}, both=NO_DECAY),
    Row(o.SimCLRLARS, "simclr", dict(form="popular"), dict(classic_momentum=False), shapes=(MATRIX, ZEROS)),
    Row(o.RocmLARS, "rocm", dict(adapt=False), dict(is_skipped=True)),
    Row(o.NvidiaLARS, "nvidia", dict(adapt=False), dict(skipped=True)),
    Row(o.TensorFlowLARS, "tensorflow", dict(adapt=False), dict(skipped=True), both=NO_DECAY),
]
LAMB_OPTIONS = [
    Row(o.PaperLAMB, "paper", dict(weight_norm_clamp=(0.5, 2.0)), dict(phi=(0.5, 2.0)), shapes=(MATRIX, ZEROS)),
    Row(o.PaperLAMB, "paper", dict(betas=(0.8, 0.95), eps=1e-3)),
    Row(o.ApexLAMB, "apex", dict(decoupled_weight_decay=False), dict(adam_w_mode=False)),
    Row(o.ApexLAMB, "apex", dict(decoupled_weight_decay=False), dict(adam_w_mode=False), both=NO_DECAY),
    Row(o.ApexLAMB, "apex", dict(bias_correction=False)),
    Row(o.ApexLAMB, "apex", dict(not_adapted="nothing"), dict(use_nvlamb=True), both=NO_DECAY),
    Row(o.ApexLAMB, "apex", dict(max_grad_norm=0.1)),
    Row(o.TimmLAMB, "timm", dict(trust_clamp=(0.0, 1.0)), dict(trust_clip=True), shapes=(MATRIX, ZEROS)),
    Row(o.TimmLAMB, "timm", dict(max_grad_norm=math.inf), dict(max_grad_norm=None)),
    Row(o.TimmLAMB, "timm", dict(not_adapted="nothing"), dict(always_adapt=True), both=NO_DECAY),
    Row(o.DeepSpeedLAMB, "deepspeed", dict(trust_clamp=(0.1, 0.5)), dict(min_coeff=0.1, max_coeff=0.5)),
    Row(o.DeepSpeedLAMB, "deepspeed", both=NO_DECAY),
    Row(o.OptaxLAMB, "deepspeed", dict(bias_correction=True, trust_clamp=(0.0, math.inf), eps=1e-6), {}),
    Row(o.AuthorLAMB, "timm", dict(bias_correction=False), {}),
    Row(
        o.PytorchOptimizerLAMB,
        "author-tf",
        dict(weight_norm_clamp=(0.0, 10.0), eps=1e-30, max_grad_norm=math.inf),
        dict(epsilon=1e-30),
    ),
    Row(o.OptaxLAMB, "optax", both=NO_DECAY),
]


VARIANTS = {LARS: sorted({row.variant for row in LARS_ROWS}), LAMB: sorted({row.variant for row in LAMB_ROWS})}
ROWS = {LARS: LARS_ROWS, LAMB: LAMB_ROWS}
OPTIONS = {LARS: LARS_OPTIONS, LAMB: LAMB_OPTIONS}
# NumPy's, in the interpreter: squares that are then not used, and infinities that stay where they are.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
both_classes = pytest.mark.parametrize("cls", [LARS, LAMB])


def slow(backend: str) -> bool:
    return INTERPRETED and backend == "triton"


def start(rows: list[Row], sizes: dict, dtype: torch.dtype, device: str) -> list[Tensor]:
    kinds = [kind for row in rows for kind in row.shapes]
    params = make_params(dtype, device, [sizes[kind] for kind in kinds])
    with torch.no_grad():
        for kind, p in zip(kinds, params, strict=True):
            p.mul_(kind != ZEROS)
    return params


def gradients(step: int, params: list[Tensor]) -> list[Tensor | None]:
    """Sizes from 0.001 to 10; some zero, some None; now and then all so small that no global clip applies."""
    generator = torch.Generator().manual_seed(1000 + step)
    grads: list[Tensor | None] = []
    for j, p in enumerate(params):
        size = 10.0 ** ((step + j) % 5 - 3) * (1e-5 if step % 10 == 3 else 1) * ((step + 2 * j) % 11 != 7)
        g = torch.randn(p.shape, generator=generator) * size
        grads.append(None if (step + j) % 7 == 4 else g)
    return grads


@torch.no_grad()
def run(cls: type, rows: list[Row], params: list[Tensor], copies: list[list[Tensor]], steps: int, **options) -> None:
    """One optimizer with a group a row over `params`, and every row's oracle over its part of each of the copies."""
    base_lr = {"LARS": 0.5, "LAMB": 0.02}[cls.__name__]
    ends = [0, *itertools.accumulate(len(row.shapes) for row in rows)]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    schedules = [legw(DECAYS[i % len(DECAYS)], base_lr=base_lr) for i in range(len(rows))]
    groups = [
        dict(params=params[part], lr=schedule) | row.options()
        for row, part, schedule in zip(rows, parts, schedules, strict=True)
    ]
    optimizer = cls(groups, lr=1.0, **options)
    oracles = [[row.make_oracle(tensors[0].dtype) for row in rows] for tensors in copies]
    for step in range(steps):
        grads = gradients(step, params)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.to(p.device, p.dtype)
        optimizer.step()
        for tensors, theirs in zip(copies, oracles, strict=True):
            cast = [None if g is None else g.to(tensors[0].dtype) for g in grads]
            total = o.global_norm(cast)
            for oracle, part, schedule in zip(theirs, parts, schedules, strict=True):
                oracle.step(tensors[part], cast[part], schedule(step), over_all=total)


def copies_of(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [p.detach().to("cpu", dtype, copy=True) for p in params]


def assert_equal(rows: list[Row], params: list[Tensor], exact: list[Tensor], bound: float) -> None:
    names = [(row.options(), kind) for row in rows for kind in row.shapes]
    errors = error(copies_of(params, torch.float64), exact)
    bad = [(name, e) for name, e in zip(names, errors, strict=True) if not e < bound]
    assert not bad, bad


def over_a_schedule(cls: type, backend: str) -> list[Row]:
    """All of it, or, where a tile takes 10 ms, one tensor of each variant; the next test but one has the others."""
    return [row._replace(shapes=(MATRIX,)) for row in ROWS[cls] if row.both == WD] if slow(backend) else ROWS[cls]


@both_classes
def test_200_scheduled_steps_in_float64(backend, device, cls):
    rows = over_a_schedule(cls, backend)
    params = start(rows, SMALL, torch.float64, device)
    exact = copies_of(params, torch.float64)
    run(cls, rows, params, [exact], 200, backend=backend, tile=64 if slow(backend) else 32)
    assert_equal(rows, params, exact, 1e-10)


@both_classes
def test_200_scheduled_steps_in_float32(backend, device, cls):
    """Per tensor at most twice the float32 oracle's error plus 2 ulp; tensors so large that it is not luck."""
    rows = over_a_schedule(cls, backend)
    params = start(rows, LARGE, torch.float32, device)
    single, exact = copies_of(params, torch.float32), copies_of(params, torch.float64)
    run(cls, rows, params, [single, exact], 200, backend=backend, tile=1024)
    names = [(row.options(), kind) for row in rows for kind in row.shapes]
    errors = zip(names, error(copies_of(params, torch.float32), exact), error(single, exact), strict=True)
    bad = [(name, ours, theirs) for name, ours, theirs in errors if not ours <= 2 * theirs + 2 * 2**-23]
    assert not bad, bad


@both_classes
def test_every_tensor_option_and_single_axis(backend, device, cls):
    rows = ROWS[cls] + OPTIONS[cls]
    params = start(rows, SMALL, torch.float64, device)
    exact = copies_of(params, torch.float64)
    run(cls, rows, params, [exact], 15 if slow(backend) else 200, backend=backend, tile=64)
    assert_equal(rows, params, exact, 1e-10)


@both_classes
def test_the_reference(cls):
    rows = ROWS[cls] + OPTIONS[cls]
    params = start(rows, SMALL, torch.float64, "cpu")
    exact = copies_of(params, torch.float64)
    run(getattr(reference, cls.__name__), rows, params, [exact], 200)
    assert_equal(rows, params, exact, 1e-10)


def step_once(params: list[Tensor], grads: list[Tensor], cls: type, **options) -> torch.optim.Optimizer:
    optimizer = cls(params, **dict(lr=0.1, weight_decay=0.05, tile=16) | options)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    return optimizer


def numbers(values: dict[Tensor, Tensor], params: list[Tensor]) -> list[float]:
    return [values[p].item() for p in params]


@both_classes
def test_norms_far_apart_side_by_side(backend, device, cls):
    """A ratio belongs to its tensor: bit for bit what a tensor alone gives, at norms from 1e-6 to 1e6 in one buffer."""
    weights = [10.0**e for e in range(-6, 7, 2)]
    slopes = weights[::-1]
    params, grads = (make_params(torch.float32, device, [(40,)] * 7) for _ in range(2))
    with torch.no_grad():
        for tensors, sizes in [(params, weights), (grads, slopes)]:
            for x, size in zip(tensors, sizes, strict=True):
                x.mul_(size / x.norm())
    grads = [g.detach().flip(0) for g in grads]
    before = [p.detach().double() for p in params]
    alone = twins(params)
    ours = step_once(params, grads, cls, backend=backend)
    singles = [step_once([p], [g], cls, backend=backend) for p, g in zip(alone, grads, strict=True)]
    same(params, alone)
    for name in ("param_norms", "grad_norms", "trust_ratios"):
        each = [getattr(single, name)()[p].item() for single, p in zip(singles, alone, strict=True)]
        assert numbers(getattr(ours, name)(), params) == each
    assert numbers(ours.param_norms(), params) == pytest.approx(weights, rel=1e-6)
    assert numbers(ours.grad_norms(), params) == pytest.approx(slopes, rel=1e-6)
    if cls is LARS:
        ratios = [0.001 * w / (s + 0.05 * w) for w, s in zip(weights, slopes, strict=True)]
    else:
        updates = [g.double() / (g.double().abs() + 1e-6) + 0.05 * w for g, w in zip(grads, before, strict=True)]
        ratios = [(w.norm() / u.norm()).item() for w, u in zip(before, updates, strict=True)]
    assert numbers(ours.trust_ratios(), params) == pytest.approx(ratios, rel=2e-6)


@both_classes
def test_a_norm_beyond_float16(backend, device, cls):
    p = torch.full((70_000,), 300.0, dtype=torch.float16, device=device, requires_grad=True)
    optimizer = step_once([p], [p.detach().clone()], cls, lr=10.0, backend=backend, tile=1024)
    assert numbers(optimizer.param_norms(), [p]) == pytest.approx([300 * 70_000**0.5], rel=1e-6)
    assert numbers(optimizer.grad_norms(), [p]) == pytest.approx([300 * 70_000**0.5], rel=1e-6)
    assert p.isfinite().all() and (p < 300).all()


@overflows
@pytest.mark.parametrize(("cls", "variant"), [(LARS, "paper"), (LAMB, "paper"), (LAMB, "apex")])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_values_whose_squares_overflow_or_vanish(backend, device, cls, variant, size):
    p = torch.full((40,), size, device=device, requires_grad=True)
    optimizer = step_once([p], [-p.detach()], cls, variant=variant, backend=backend)
    norm = pytest.approx([size * 40**0.5], rel=1e-6)
    assert numbers(optimizer.param_norms(), [p]) == norm
    assert numbers(optimizer.grad_norms(), [p]) == norm
    if variant == "apex":
        assert [optimizer.grad_norm.item()] == norm
    assert p.isfinite().all() and (p > 0).all()


ZERO_GRADIENT = dict.fromkeys(["paper", "simclr", "simclr-popular", "moco", "optax"], 0.001 / 0.05)


@pytest.mark.parametrize(("cls", "variant"), [(cls, name) for cls in (LARS, LAMB) for name in VARIANTS[cls]])
def test_zero_norms(backend, device, cls, variant):
    """The ratio is 1, or, where only the gradient is zero and the denominator is not, the formula's."""
    params = make_params(torch.float32, device, [(2, 3)] * 3)
    with torch.no_grad():
        params[0].zero_()
        params[1].zero_()
    grads = [torch.zeros_like(params[0]), torch.ones_like(params[1]), torch.zeros_like(params[2])]
    optimizer = step_once(params, grads, cls, variant=variant, backend=backend)
    ratio = ZERO_GRADIENT.get(variant, 1.0) if cls is LARS else (10.0 if variant == "deepspeed" else 20.0)
    assert numbers(optimizer.trust_ratios(), params) == [1, 1, pytest.approx(ratio, rel=1e-6)]
    assert (params[0] == 0).all() and (params[1] < 0).all() and all(p.isfinite().all() for p in params)


@both_classes
def test_the_same_bits_every_time(backend, device, cls):
    original = make_params(torch.float32, device, [(40,), (3, 5)])
    grads = [g.detach() for g in make_params(torch.float32, device, [(3, 5), (40,)])[::-1]]
    results = []
    for _ in range(100):
        params = twins(original)
        step_once(params, grads, cls, max_grad_norm=0.5, tile=32, backend=backend)
        results.append(params)
    for params in results[1:]:
        same(params, results[0])


@both_classes
def test_the_order_of_the_parameters(backend, device, cls):
    shapes = [(40,), (3, 5), (), (17,)]
    original, grads = make_params(torch.float32, device, shapes), make_params(torch.float32, device, shapes[::-1])
    expected = twins(original)
    step_once(expected, [g.detach() for g in grads[::-1]], cls, backend=backend).step()
    for order in [(3, 2, 1, 0), (1, 3, 0, 2)]:
        params = twins(original)
        optimizer = step_once([params[i] for i in order], [grads[3 - i].detach() for i in order], cls, backend=backend)
        optimizer.step()
        same(params, expected)


@overflows
@both_classes
def test_a_non_finite_gradient_stays_in_its_tensor(backend, device, cls):
    params = make_params(torch.float32, device, [(20,)] * 3)
    grads = [torch.ones_like(p) for p in params]
    clean = twins(params)
    step_once(clean, grads, cls, backend=backend)
    step_once(params, [grads[0], torch.full_like(grads[1], torch.inf), grads[2]], cls, backend=backend)
    same(params[::2], clean[::2])


@both_classes
def test_an_unknown_variant(cls):
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="'papre'") as caught:
        cls([p], lr=0.1, variant="papre", backend="aten")
    for name in VARIANTS[cls]:
        assert re.search(rf"'{name}'", str(caught.value)), name
    optimizer = cls([p], lr=0.1, backend="aten")
    with pytest.raises(ValueError, match="'papre'"):
        optimizer.add_param_group(dict(params=[torch.zeros(3, requires_grad=True)], variant="papre"))
    assert len(optimizer.param_groups) == 1


def test_how_many_variants_there_are():
    assert (len(VARIANTS[LARS]), len(VARIANTS[LAMB])) == (12, 6)


@pytest.mark.parametrize("variant", ["nvidia", "rocm"])
@pytest.mark.parametrize("option", [dict(nesterov=True), dict(dampening=0.1)], ids=str)
def test_what_a_source_does_not_define(variant, option):
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=f"{next(iter(option))}.*{variant}|{variant}.*{next(iter(option))}"):
        LARS([p], lr=0.1, variant=variant, backend="aten", **option)


LARS_AXES = [dict(form="x"), dict(denominator="x"), dict(not_adapted="x"), dict(zero_norm="x")]
LAMB_AXES = [
    dict(bias_correction="x"),
    dict(not_adapted="x"),
    dict(trust_clamp="x"),
    dict(weight_norm_clamp=(2.0, 1.0)),
]


@pytest.mark.parametrize(
    ("cls", "option"), [*((LARS, option) for option in LARS_AXES), *((LAMB, option) for option in LAMB_AXES)], ids=str
)
def test_an_unknown_axis(cls, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=re.escape(repr(value))) as caught:
        cls([torch.zeros(3, requires_grad=True)], lr=0.1, backend="aten", **option)
    assert name in str(caught.value)


@pytest.mark.parametrize("n", [16, 20])
def test_an_epsilon_of_zero_does_not_measure_padding(backend, device, n):
    """Past the end of a tensor moments are 0, and 0 / 0 would be its update's norm."""
    p = torch.full((n,), 3.0, device=device, requires_grad=True)
    p.grad = torch.full((n,), 0.5, device=device)
    optimizer = LAMB([p], lr=0.1, eps=0.0, weight_decay=0.0, tile=16, backend=backend)
    optimizer.step()
    assert optimizer.trust_ratios()[p].item() == pytest.approx(3)
    torch.testing.assert_close(p.detach(), torch.full_like(p, 2.7))
