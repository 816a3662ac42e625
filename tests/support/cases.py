"""What the tests share: parameters, gradients, schedules, and comparisons."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_legw import LEGW, SGD, Constant, Cosine

SHAPES = [(5,), (3, 7), (100,), (), (0,), (64,), (2, 3, 3, 3)]


def legw(decay=Constant(), **changes) -> LEGW:  # noqa: B008
    """200 updates in 10 epochs, 40 of them warm-up."""
    return LEGW(
        **dict(
            base_lr=0.1,
            base_batch_size=16,
            base_warmup_epochs=0.5,
            batch_size=64,
            dataset_size=1280,
            epochs=10,
            decay=decay,
        )
        | changes
    )


def make_params(dtype: torch.dtype, device: str, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def twins(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [p.detach().to(dtype or p.dtype, copy=True).requires_grad_() for p in params]


def give_gradients(step: int, *lists: list[Tensor], skip: bool = True) -> None:
    """The same random gradients to every list, rounded to the first one's dtype; now and then one is None."""
    generator = torch.Generator().manual_seed(1000 + step)
    for j, same in enumerate(zip(*lists, strict=True)):
        g = torch.randn(same[0].shape, generator=generator).to(same[0].device, same[0].dtype)
        for p in same:
            p.grad = None if skip and (step + j) % 5 == 4 else g.to(p.dtype)


def error(params: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Per tensor, max|a - ref64| / max|ref64|."""
    pairs = [(p.double(), q.double()) for p, q in zip(params, exact, strict=True) if q.numel()]
    return [((p - q).abs().max() / q.abs().max()).item() for p, q in pairs]


def make(params, backend, **options) -> SGD:
    return SGD(
        params,
        **dict(lr=legw(Cosine()), momentum=0.9, weight_decay=0.01, dampening=0.2, tile=16, backend=backend) | options,
    )


def run(optimizer: SGD, steps: range, *lists: list[Tensor]) -> None:
    for step in steps:
        give_gradients(step, *lists)
        optimizer.step()


def same(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def goes_on_like_one_resumed(optimizer: SGD, params: list[Tensor], steps: range, backend: str) -> None:
    """A new optimizer, loaded with this one's state dict, makes the same bits of the parameters as they are now."""
    values = twins(params)
    twin = make(values, backend)
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, steps, params)
    run(twin, steps, values)
    same(params, values)
