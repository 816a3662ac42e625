"""`verify`: compares a fused optimizer with its reference twin, schedule included, on the user's parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import SUPPORTED_DTYPES
from ..optim.base import FusedOptimizer
from ..spec import group_lr

Named = list[tuple[str, nn.Parameter]]
_NONE_PROBABILITY = 1 / 8  # probability that a gradient is None in a step


@dataclass(frozen=True)
class TensorError:
    """The error of one tensor."""

    name: str
    shape: tuple[int, ...]
    error: float  # the largest difference from the float64 reference, over the reference's largest value; of all steps
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance  # a NaN fails


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. It prints as a table."""

    optimizer: str  # name of the class
    backend: str
    dtype: str
    steps: int  # updates made
    steps_applied: int  # updates that the optimizer counted; must equal `steps`
    lr_error: float  # the largest difference of `get_last_lr()` from the schedule; must be 0
    tensors: tuple[TensorError, ...]

    @property
    def passed(self) -> bool:
        """Whether all steps counted, every LR was exact, and every tensor is within its tolerance."""
        return self.steps_applied == self.steps and self.lr_error == 0 and all(t.passed for t in self.tensors)

    @property
    def worst(self) -> TensorError:
        """The tensor with the largest error relative to its tolerance."""
        return max(self.tensors, key=lambda t: (not t.passed, t.error / t.tolerance))

    def __str__(self) -> str:
        width = max(len("tensor"), *(len(t.name) for t in self.tensors))
        shapes = ["×".join(map(str, t.shape)) or "scalar" for t in self.tensors]
        shape_width = max(len("shape"), *map(len, shapes))
        lines = [
            f"{self.optimizer} ({self.backend}, {self.dtype}) against the float64 reference: "
            f"{'passed' if self.passed else 'FAILED'}",
            f"{self.steps_applied} of {self.steps} steps counted, LR error {self.lr_error:.1e}",
            f"{'tensor':{width}}  {'shape':{shape_width}}  {'error':>8}  {'tolerance':>9}",
        ]
        for t, shape in zip(self.tensors, shapes, strict=True):
            mark = "" if t.passed else "  FAILED"
            lines.append(f"{t.name:{width}}  {shape:{shape_width}}  {t.error:8.1e}  {t.tolerance:9.1e}{mark}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The result as primitives, for JSON."""
        return {"passed": self.passed, "worst": asdict(self.worst), **asdict(self)}


def verify(
    make_optimizer: Callable[[list[nn.Parameter]], FusedOptimizer],
    module_or_shapes: nn.Module | Sequence[Sequence[int]],
    steps: int = 200,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Verification:
    """Run a fused optimizer and its twin from `fused_legw.reference` in float64, and compare them at every step.

    Both get the same random gradients, rounded to `dtype`. From the second step on, one gradient in eight is None. The
    twin has the same param groups: hyper-parameters, learning rates and schedules.

    Errors are relative to each tensor's largest value. The tolerance is 1e-12 in float64. In other dtypes it is twice
    the error of the reference run in float32, with parameters rounded to the dtype after each step, plus two units in
    the last place: two correct orders of rounding differ.

    Args:
        make_optimizer: takes a list of parameters and returns a fused optimizer of exactly these.
        module_or_shapes: a module, whose trainable parameters are copied and do not change; or a list of shapes.
        steps: number of updates.
        dtype: dtype of the parameters.
        device: device of the parameters; by default the module's, or the CPU.
        seed: seed of the gradients, and of parameters made from shapes. The global generators are not used.

    Raises:
        TypeError: `make_optimizer` does not return a fused optimizer.
        ValueError: an argument is not valid, or the optimizer does not have exactly the given parameters.

    >>> from fused_legw import LEGW, SGD, verify
    >>> schedule = LEGW(0.1, 16, 0.5, batch_size=512, dataset_size=1280)
    >>> verify(lambda params: SGD(params, lr=schedule, momentum=0.9), [(3, 5), (7,), ()], 20).passed
    True
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype!r}")
    generator = torch.Generator().manual_seed(seed)
    named = _parameters(module_or_shapes, dtype, device, generator)
    params = [p for _, p in named]
    optimizer = make_optimizer(list(params))
    _check(optimizer, params)
    exact = _Twin(optimizer, params, torch.float64)
    rounded = None if dtype == torch.float64 else _Twin(optimizer, params, torch.float32, stored=dtype)

    start, lr_error = optimizer.steps_applied, 0.0
    ours, theirs = _Errors(params, exact), _Errors(rounded.params, exact) if rounded else None
    for t, gradients in enumerate(_gradients(params, steps, generator), start):
        for p, g in zip(params, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        exact.step(gradients)
        if rounded and theirs:
            rounded.step(gradients)
            theirs.update()
        ours.update()
        lr_error = max(lr_error, _lr_error(optimizer, t))
    rows = [
        TensorError(name, tuple(p.shape), error, _tolerance(dtype, theirs.relative[i] if theirs else 0.0))
        for i, ((name, p), error) in enumerate(zip(named, ours.relative, strict=True))
    ]
    return Verification(
        optimizer=type(optimizer).__name__,
        backend=optimizer.backend,
        dtype=str(dtype).removeprefix("torch."),
        steps=steps,
        steps_applied=optimizer.steps_applied - start,
        lr_error=lr_error,
        tensors=tuple(rows),
    )


def _parameters(source: Any, dtype: torch.dtype, device: Any, generator: torch.Generator) -> Named:
    if isinstance(source, nn.Module):
        module = copy.deepcopy(source).to(device=device, dtype=dtype)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    else:
        if isinstance(source, str) or not all(isinstance(shape, Sequence) for shape in source):
            raise ValueError(f"module_or_shapes must be a module or a list of shapes, got {source!r}")
        named = []
        for i, shape in enumerate(source):
            value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
            named.append((str(i), nn.Parameter(value.to(device=device or "cpu", dtype=dtype))))
    if not named:
        raise ValueError(f"module_or_shapes must have trainable parameters, got {source!r}")
    return named


def _check(optimizer: object, params: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"make_optimizer must return an optimizer of fused_legw, got {optimizer!r}")
    theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing, other = len({id(p) for p in params} - theirs), len(theirs - {id(p) for p in params})
    if missing or other:
        raise ValueError(
            "make_optimizer must return an optimizer of exactly the parameters it is given, got one "
            f"without {missing} of them and with {other} others"
        )


class _Twin:
    """The reference twin of a fused optimizer, on copies of the parameters in one dtype."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        params: list[nn.Parameter],
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
    ) -> None:
        """stored: the dtype that parameters are rounded to after each step."""
        self._stored = stored
        self.params = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
        copies = dict(zip(map(id, params), self.params, strict=True))
        groups = []
        for group in optimizer.param_groups:
            lr = group["schedule"] or float(group["lr"])
            groups.append({**group, "lr": lr, "params": [copies[id(p)] for p in group["params"]]})
        # All options of the fused optimizer: the twin ignores those about layout. Schedules go to it as `lr`.
        options = {**optimizer.defaults, **optimizer._run.options, "skip_nonfinite": optimizer.skip_nonfinite}
        del options["schedule"]
        self.optimizer = _twin_class(optimizer)(groups, **options)
        self.optimizer.steps_applied = optimizer.steps_applied

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)
        self.optimizer.step()
        if self._stored is not None:
            for p in self.params:
                p.data.copy_(p.data.to(self._stored))


def _twin_class(optimizer: FusedOptimizer) -> Any:
    """The class of the same name in `reference`; for a user's subclass, that of its base class."""
    for base in type(optimizer).__mro__:
        twin = getattr(reference, base.__name__, None)
        if issubclass(base, FusedOptimizer) and isinstance(twin, type) and issubclass(twin, torch.optim.Optimizer):
            return twin
    raise TypeError(f"fused_legw.reference has no twin of {type(optimizer).__name__}")


def _gradients(params: Sequence[Tensor], steps: int, generator: torch.Generator) -> Iterator[list[Tensor | None]]:
    """The gradients of each step. At the first none is None, later some are, but never all."""
    for step in range(steps):
        values = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]
        absent = (torch.rand(len(params), generator=generator, dtype=torch.float32) < _NONE_PROBABILITY).tolist()
        some = step > 0 and not all(absent)
        yield [None if some and a else g for g, a in zip(values, absent, strict=True)]


class _Errors:
    """The largest error and the largest float64 value of each tensor over all steps.

    Relative to its last value alone, the error of a scalar that ends near 0 would look large.
    """

    def __init__(self, params: Sequence[Tensor], exact: _Twin) -> None:
        self._params, self._exact = params, exact.params
        self._errors, self._scales = torch.zeros(2, len(params), dtype=torch.float64)

    @torch.no_grad()
    def update(self) -> None:
        for i, (p, q) in enumerate(zip(self._params, self._exact, strict=True)):
            if p.numel():
                now = torch.stack([(p.double() - q).abs().max(), q.abs().max()]).cpu()
                # torch.maximum, unlike Python's max, keeps a NaN.
                self._errors[i] = torch.maximum(self._errors[i], now[0])
                self._scales[i] = torch.maximum(self._scales[i], now[1])

    @property
    def relative(self) -> list[float]:
        ratios = torch.where(self._errors == 0, 0.0, self._errors / self._scales)
        return [float(ratio) for ratio in ratios]


def _lr_error(optimizer: FusedOptimizer, t: int) -> float:
    """The difference of the optimizer's reported LR at update t from the schedule's LR."""
    wanted = [group_lr(group, t) for group in optimizer.param_groups]
    return max(abs(a - b) for a, b in zip(optimizer.get_last_lr(), wanted, strict=True))


def _tolerance(dtype: torch.dtype, of_reference: float) -> float:
    return 1e-12 if dtype == torch.float64 else 2 * of_reference + 2 * torch.finfo(dtype).eps
