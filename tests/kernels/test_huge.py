"""Buffers of more than 2^31 elements, on a GPU with the memory for them; elsewhere of a few thousand.

A tensor repeats a pattern, and so must its update: that of the pattern alone, whose norms have the same ratios. The
period divides no power of two, so an element that is read or written elsewhere has another value.
"""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from fused_legw import LAMB, LARS, SGD, AdamW, reference
from tests.support.machine import DEVICE

pytestmark = pytest.mark.gpu

GPU = DEVICE == "cuda"
PERIOD = 1000
ONE = [2_147_488_000] if GPU else [5_000]  # 2^31 is 2,147,483,648
SEVERAL = [1_073_743_000, 1_073_745_000, 5_000, 1_000] if GPU else [3_000, 2_000, 1_000]
CASES = {
    "one tensor, SGD, bfloat16 without masters": (SGD, torch.optim.SGD, dict(), torch.bfloat16, False, ONE),
    "one tensor, LARS, bfloat16": (LARS, reference.LARS, dict(momentum=0.9), torch.bfloat16, True, ONE),
    "one tensor, AdamW": (AdamW, torch.optim.AdamW, dict(), torch.float32, True, ONE),
    "one tensor, LAMB": (LAMB, reference.LAMB, dict(), torch.float32, True, ONE),
    "several tensors, SGD": (SGD, torch.optim.SGD, dict(momentum=0.9), torch.float32, True, SEVERAL),
    "several tensors, LAMB": (LAMB, reference.LAMB, dict(), torch.float32, True, SEVERAL),
}
BYTES = 16  # an element, at most: weight, gradient and two states


def _needs_memory(elements: int) -> None:
    if not GPU:
        return
    gc.collect()  # optimizers refer to themselves
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = BYTES * elements + 2**32  # and what comparing takes
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def _repeat(pattern: Tensor, elements: int) -> Tensor:
    """Not by `repeat`, which would not fill a storage that is the tensor's alone."""
    x = torch.empty(elements, dtype=pattern.dtype, device=pattern.device)
    x.view(-1, PERIOD).copy_(pattern)
    return x


@pytest.mark.parametrize("case", CASES)
def test_more_than_2_to_the_31_elements(triton_device, case):
    cls, other, options, dtype, masters, sizes = CASES[case]
    _needs_memory(sum(sizes))
    weight, gradient = torch.randn(2, PERIOD, device=triton_device).to(dtype)
    params = [_repeat(weight, n).requires_grad_() for n in sizes]
    optimizer = cls(params, lr=0.125, weight_decay=0.1, master_weights=masters, backend="triton", **options)
    assert len(optimizer._run.layout.buckets) == 1
    for p in params:
        p.grad = _repeat(gradient, p.numel())
    exact = weight.double().requires_grad_()
    exact.grad = gradient.double()
    twin = other([exact], lr=0.125, weight_decay=0.1, **options)
    for _ in range(2):
        optimizer.step()
        twin.step()
    rtol, atol = (2**-6, 2**-8) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    expected = exact.detach().to(dtype)
    for p in params:
        for rows in p.detach().view(-1, PERIOD).split(2**17):
            torch.testing.assert_close(rows, expected.expand_as(rows), rtol=rtol, atol=atol)
    if cls in (LARS, LAMB):
        norm = gradient.double().norm().item() * math.sqrt(sum(sizes) / PERIOD)
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)
