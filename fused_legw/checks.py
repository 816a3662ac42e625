"""Checks of arguments, which raise before anything has changed.

Errors are worded in two ways. An option that torch.optim has too gets torch's words, "Invalid momentum value: -1",
because torch's tests and other code match them. Every other argument gets "NAME must be WHAT, got VALUE".
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter


def fail(name: str, value: object, requirement: str) -> NoReturn:
    """Raise ValueError with what an argument must be and its value."""
    raise ValueError(f"{name} must be {requirement}, got {value!r}")


_PRIMITIVE = frozenset({type(None), bool, int, float, str})


def plain(value: Any) -> Any:
    """A number, flag or string of NumPy, or of another package, as Python's own, with the same value.

    State dicts hold what this returns: other types do not load under `weights_only=True`. A 0-dim array gives the
    number that it holds now. Tuples are converted by element. Everything else, tensors too, is returned as it is.
    """
    if type(value) in _PRIMITIVE:
        return value
    if type(value) is tuple:
        own = tuple(map(plain, value))
        return value if all(map(operator.is_, own, value)) else own
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Real) and type(value) not in _PRIMITIVE:
        try:
            return int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:
            return value
    return value


def number(name: str, value: object, *, zero: bool = False) -> float:
    """The value as a float. Raises unless it is finite and positive; `zero` allows 0."""
    value = plain(value)
    try:
        converted = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or converted < 0 or (converted == 0 and not zero):
        fail(name, value, "a finite number, zero or more" if zero else "a finite positive number")
    return converted


def count(name: str, value: object, *, zero: bool = False) -> int:
    """The value as an int. Raises unless it is a positive integer below 2**63; `zero` allows 0."""
    value = plain(value)
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < (0 if zero else 1):
        fail(name, value, "an integer, zero or more" if zero else "a positive integer")
    if int(value) >= 2**63:
        fail(name, value, "an integer below 2**63")
    return int(value)


SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor of the same shape, with its elements in the order of p's."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def is_dense(p: Tensor) -> bool:
    """Whether the elements fill one span of memory without gaps, in any order, as in channels_last and transposed."""
    return p.numel() == 0 or dense_strides(p) == p.stride()


def is_unmade(p: Tensor) -> bool:
    """Whether a parameter has no values yet: it is lazy, or on the meta device."""
    return isinstance(p, UninitializedParameter) or p.device.type == "meta"


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter that no update could write."""
    _check_plain(name, p)
    if not is_dense(p) and len(torch.unique(_units(p, p.element_size()))) < p.numel():
        raise ValueError(
            f"{name} has elements that share memory, pass a contiguous tensor: shape {tuple(p.shape)} with strides "
            f"{p.stride()}"
        )


def may_be_left(p: Tensor) -> bool:
    """Whether an optimizer can leave a parameter alone for now: it has no values, or is frozen without gradient."""
    return is_unmade(p) or (not p.requires_grad and p.grad is None)


def check_rows(name: str, p: Tensor) -> None:
    """Refuse a parameter whose slices along its first dimension are not contiguous in memory; gaps do not count."""
    if p.ndim > 1 and len(p) > 1 and p.numel() and dense_strides(p)[0] * len(p) != p.numel():
        raise ValueError(
            f"{name} is not contiguous by rows: shape {tuple(p.shape)} with strides {p.stride()}; pass a contiguous "
            "or channels_last tensor"
        )


def _span(p: Tensor) -> int:
    """The number of bytes from a tensor's first element to the end of its last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))) * p.element_size()


def _units(p: Tensor, size: int) -> Tensor:
    """The address of each unit of `size` bytes that a tensor's elements take. size: at most that of an element."""
    addresses = torch.tensor([p.data_ptr()], dtype=torch.int64, device="cpu")
    strides = [stride * p.element_size() for stride in p.stride()]
    for n, stride in [*zip(p.shape, strides, strict=True), (p.element_size() // size, size)]:
        addresses = (addresses[:, None] + stride * torch.arange(n, dtype=torch.int64, device="cpu")).flatten()
    return addresses


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans overlap have a byte in common."""
    if is_dense(a) and is_dense(b):
        return True
    size = min(a.element_size(), b.element_size())
    return bool(torch.isin(_units(a, size), _units(b, size)).any())


def overlapping(named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """The parameters that can be left alone for now and share memory with another one.

    Raises:
        ValueError: two others share memory: a step would update it twice. Disjoint views of one storage are fine.
    """
    left = list[Tensor]()
    before = list[tuple[str, Tensor]]()  # those whose spans may reach the next one's
    for name, p in sorted((x for x in named if x[1].numel()), key=lambda x: (str(x[1].device), x[1].data_ptr())):
        before = [x for x in before if x[1].device == p.device and x[1].data_ptr() + _span(x[1]) > p.data_ptr()]
        met = [x for x in before if _overlap(x[1], p)]
        if met and may_be_left(p):
            left.append(p)
            continue
        for other_name, other in met:
            if not may_be_left(other):
                same = (other.data_ptr(), _span(other)) == (p.data_ptr(), _span(p))
                what = (
                    "are the same memory: a parameter can be listed once"
                    if same
                    else ("share memory: pass one of them, or clone one")
                )
                raise ValueError(f"{other_name} and {name} {what}")
            left.append(other)
        before = [x for x in before if not any(x is y for y in met)] + [(name, p)]
    return left


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Prefix the errors of a block with a label, such as the group that they are about."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{label}: {error}") from None


def unread(value: Any) -> bool:
    """Whether this is a tensor on a GPU. Checks do not read it, because they would wait for the device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def check_number(name: str, value: Any, torchs: str = "", *, low: float = 0.0, below: float = math.inf) -> None:
    """Raise unless the value is finite and low <= value < below. torchs: the name in torch.optim's message."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value < below):
        raise ValueError(f"Invalid {torchs or name}: {value}")


def check_scalar(name: str, value: Any, torchs: str = "", *, low: float = 0.0, below: float = math.inf) -> None:
    """As `check_number`, but allow 1-element tensors. The value of a tensor on a GPU is not checked."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if unread(value):
            return
        value = value.item()
    check_number(name, value, torchs, low=low, below=below)


def check_flag(name: str, value: Any) -> None:
    """Raise unless the value is True or False, or equal to one, such as 1 and NumPy's bools."""
    # The set compares hashes first, so no tensor is read.
    if not (isinstance(value, Hashable) and value in {0, 1}):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_limit(name: str, value: Any) -> None:
    """Raise unless the value is a positive number, possibly infinite, or None."""
    if value is not None and not _is_number(value):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be greater than 0, or None, got {value!r}")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """The two values of a pair, such as betas."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two values, got {value!r}") from None
    return first, second


def check_range(name: str, value: Any) -> None:
    low, high = check_pair(name, value)
    if not (_is_number(low) and _is_number(high) and 0 <= low <= high):
        raise ValueError(f"{name} must be (low, high) with 0 <= low <= high, or None, got {value!r}")


def check_lr(lr: object, name: str, p: Tensor) -> None:
    """Refuse a tensor LR on a GPU that the kernel of parameter p cannot read. On the CPU it counts as a number."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        if lr.device != p.device:
            raise ValueError(f"lr is a tensor on {lr.device}, but {name} is on {p.device}: move it there")
        if lr.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lr is a tensor of {lr.dtype}: on a GPU it must be torch.float32 or torch.float64")


def check_state(label: str, state: Mapping[str, Any], names: Iterable[str], shape: torch.Size) -> None:
    """Refuse state that does not have its parameter's shape, which torch would broadcast, or that cannot be copied."""
    for name in names:
        value = state.get(name)
        if value is None:
            continue
        if not (isinstance(value, Tensor) and value.shape == shape):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value!r}"
            raise ValueError(f"{label}[{name!r}] has {found}, but its parameter has shape {tuple(shape)}")
        plain = is_dispatched_plainly(value) and value.layout == torch.strided
        if not plain or value.is_meta or value.is_complex() or value.is_quantized:
            found = f"{type(value).__name__} of {value.dtype} on {value.device}, layout {value.layout}"
            raise TypeError(f"{label}[{name!r}] must be a plain tensor of real numbers, got a {found}")


def check_gradient(name: str, p: Tensor) -> None:
    gradient = p.grad
    if gradient is not None:
        _check_plain(f"{name}.grad", gradient)
        if gradient.device != p.device or gradient.shape != p.shape:
            raise RuntimeError(
                f"{name}.grad has shape {tuple(gradient.shape)} on {gradient.device}, "
                f"but its parameter has shape {tuple(p.shape)} on {p.device}"
            )


def is_dispatched_plainly(x: Tensor) -> bool:
    """Whether this is no sharded or otherwise wrapped tensor."""
    return bool(type(x).__torch_dispatch__ is Tensor.__torch_dispatch__)


def _check_plain(name: str, x: Tensor) -> None:
    if not is_dispatched_plainly(x):
        raise TypeError(f"{name} is a {type(x).__name__}: sharded and other subclass tensors are not supported")
    if x.layout != torch.strided:
        raise RuntimeError(f"{name} has layout {x.layout}: sparse tensors are not supported, only torch.strided")
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: supported are {', '.join(map(str, SUPPORTED_DTYPES))}")


def step_count(value: Any) -> Any:
    """The number in a `step`: of a tensor or array of one element that element. None if it cannot be read."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # several elements, or none that are in memory
        return None


def check_step(label: str, value: Any) -> None:
    """Reject a `step` that is not a number of updates."""
    steps = step_count(value)
    if not (isinstance(steps, numbers.Real) and 0 <= float(steps) < 2.0**63):
        raise ValueError(f"{label}['step'] must be a number of updates, zero or more and below 2**63, got {value!r}")
