"""What AdamP adds to Adam: which updates are projected, over rows of every length, and the authors' own package."""

from __future__ import annotations

import pytest
import torch

from fused_legw import AdamP, reference
from tests.support.cases import error, same, twins
from tests.support.machine import INTERPRETED

# Rows of one element, shorter and longer than a tile, across tiles and spans; more rows than are added up at a time.
SHAPES = [(40, 1), (1, 40), (3, 7), (300, 2), (5, 17), (2, 400), (3, 2, 3, 3), (0, 3), (3, 0), (9,), ()]
HOW = ["neither", "rows", "whole"]


def _params(device: str, dtype: torch.dtype = torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def _gradient(p, how: str, seed: int):
    """Tangent to each row of the weight; to the whole of it only; to neither."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p.device)
    if p.ndim < 2 or not p.numel():
        return g.to(p.dtype)
    w, rows = p.detach().double(), g.reshape(len(p), -1)
    v = w.reshape(len(p), -1)
    rows = rows - v * ((rows * v).sum(1) / v.square().sum(1))[:, None]
    if how == "neither":
        rows = rows + v
    if how == "whole":  # along the rows, in turn up and down
        weights = torch.ones(len(p), dtype=torch.float64, device=p.device)
        weights[1::2] = -1
        squares = v.square().sum(1)
        weights -= (weights * squares).sum() / squares.sum()
        rows = rows + weights[:, None] * v
    return rows.reshape(p.shape).to(p.dtype)


def _run(optimizers, lists, how, steps=2):
    for step in range(steps):
        for j, alike in enumerate(zip(*lists, strict=True)):
            g = _gradient(alike[-1], how, 100 * step + j)
            for p in alike:
                p.grad = g.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_rows_of_every_length(backend, device, how, nesterov, flatten):
    options = dict(lr=0.05, weight_decay=0.5, nesterov=nesterov)
    params = _params(device)
    exact, plain = twins(params), twins(params)
    ours = AdamP(params, backend=backend, tile=64, flatten=flatten, **options)
    _run([ours, reference.AdamP(exact, **options)], [params, exact], how)
    assert max(error(params, exact)) < 1e-12
    _run([AdamP(plain, backend="aten", **options | dict(delta=0))], [plain], how)
    projected = [not torch.allclose(p, q, rtol=1e-9) for p, q in zip(params, plain, strict=True)]
    assert any(projected) == (how != "neither")


def test_channels_last_has_the_rows_of_any_layout(backend, device):
    (p,) = _params(device, shapes=[(4, 3, 2, 5)])
    lists = [[p], [p.detach().to(memory_format=torch.channels_last).requires_grad_()]]
    assert not lists[1][0].is_contiguous()
    _run([AdamP(x, lr=0.1, weight_decay=0.5, backend=backend, tile=64) for x in lists], lists, "rows")
    torch.testing.assert_close(lists[0], lists[1], rtol=1e-12, atol=1e-13)


def test_rows_that_are_not_contiguous_are_refused(device):
    p = torch.ones(3, 4, device=device).t().requires_grad_()
    with pytest.raises(ValueError, match=r"not contiguous by rows: shape \(4, 3\) with strides \(1, 4\)"):
        AdamP([torch.ones(2, requires_grad=True), p])
    AdamP([torch.ones(4, 1).t().requires_grad_()])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_projected(backend, device, bad):
    params = _params(device, shapes=[(3, 20)])
    exact = twins(params)
    for tensors, make in ((params, lambda x: AdamP(x, backend=backend, tile=64)), (exact, reference.AdamP)):
        tensors[0].grad = _gradient(tensors[0], "rows", 0)
        tensors[0].grad[1, 3] = bad
        make(tensors).step()
    torch.testing.assert_close(params, exact, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="the same bits on a GPU are a test of stress")
def test_the_same_bits_beside_other_tensors(triton_device):
    shapes = [(5, 300), (9, 31), (3,)]
    alone, beside = (_params(triton_device, torch.float32, some) for some in (shapes[:1], shapes))
    for tensors in (alone, beside):
        _run([AdamP(tensors, lr=0.1, backend="triton", tile=64)], [tensors], "rows")
    same(alone, beside[:1])


@pytest.mark.peers
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_the_authors_package(backend, device, how, nesterov):
    """Its cosine fails on tensors without elements, so without those."""
    adamp = pytest.importorskip("adamp")
    shapes = [s for s in SHAPES if 0 not in s]
    params = _params(device, shapes=shapes)
    theirs = twins(params)
    options = dict(lr=0.05, weight_decay=0.5, nesterov=nesterov)
    _run([AdamP(params, backend=backend, tile=64, **options), adamp.AdamP(theirs, **options)], [params, theirs], how)
    assert max(error(params, theirs)) < 1e-12
