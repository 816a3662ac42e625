"""The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162) tells up to which batch size training gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..checks import count, fail, number

_STATE = "sums", "square_weight", "seen"


def time_and_samples(batch_size: float, critical_batch_size: float) -> tuple[float, float]:
    """(S / S_min, E / E_min): the updates S and the samples E that reach a given loss, each over the fewest possible.

    They satisfy (S / S_min - 1)(E / E_min - 1) = 1; at the critical batch size both are 2 (equation 2.11 of the paper).
    The noise scale estimates that batch size.

    >>> time_and_samples(100, 100), time_and_samples(300, 100)
    ((2.0, 2.0), (1.3333333333333333, 4.0))
    """
    return 1 + critical_batch_size / batch_size, 1 + batch_size / critical_batch_size


class GradientNoiseScale:
    """Estimates the gradient noise scale tr(Sigma) / |G|^2, in samples, from gradient norms at two batch sizes.

    G is the true gradient, and Sigma the covariance of a single sample's gradient. Let s be the squared norm of a
    gradient over small_batch samples and b that over big_batch samples, both of a *mean* loss. Then

        tr(Sigma) = (s - b) / (1 / small_batch - 1 / big_batch)
        |G|^2 = (big_batch * b - small_batch * s) / (big_batch - small_batch)

    are unbiased estimates, and may be negative. Each has a debiased exponential average of its own; only their ratio is
    clamped. Nothing waits for a device until a result is read. The ratio is B_simple of McCandlish et al. 2018.

    Args:
        small_batch, big_batch: the two batch sizes, in samples.
        decay: decay of the averages per update. 0.99 averages over about 100 updates, 0 takes the last one only.
        confidence: confidence level of `interval`.

    Raises:
        ValueError: naming the argument and its value.

    >>> noise = GradientNoiseScale(small_batch=10, big_batch=100)
    >>> noise.update(1.09, 1.0)  # as |G|^2 = 0.99 and tr(Sigma) = 1 give on average
    >>> round(noise.trace, 6), round(noise.grad_sq, 6), round(noise.noise_scale, 6)
    (1.0, 0.99, 1.010101)
    """

    def __init__(self, small_batch: int, big_batch: int, *, decay: float = 0.99, confidence: float = 0.95) -> None:
        self.small_batch = count("small_batch", small_batch)
        self.big_batch = count("big_batch", big_batch)
        if self.small_batch >= self.big_batch:
            fail("small_batch", small_batch, f"below big_batch={big_batch!r}")
        self.decay = number("decay", decay, zero=True)
        if self.decay >= 1:
            fail("decay", decay, "below 1")
        self.confidence = number("confidence", confidence)
        if self.confidence >= 1:
            fail("confidence", confidence, "below 1")
        # Averages of 1, trace, |G|^2, trace^2, trace |G|^2 and |G|^4, before debiasing.
        self._sums = torch.zeros(6, dtype=torch.float64, device="cpu")
        self._square_weight = torch.zeros((), dtype=torch.float64, device="cpu")  # sum of the squares of the weights
        self._seen = torch.zeros((), dtype=torch.int64, device="cpu")

    def update(
        self, small_sq_norm: float | Tensor, big_sq_norm: float | Tensor, *, big_batch: int | None = None
    ) -> None:
        """Add the squared norms of one update. It does not count if one is not finite, as after an overflow under AMP.

        Args:
            small_sq_norm, big_sq_norm: numbers, or 0-dim tensors on any device.
            big_batch: the samples behind big_sq_norm, if this update had fewer or more than all others.

        Raises:
            ValueError: a norm is neither, or is a negative number; or big_batch is not above small_batch.
        """
        big_batch = self.big_batch if big_batch is None else count("big_batch", big_batch)
        if big_batch <= self.small_batch:
            fail("big_batch", big_batch, f"above small_batch={self.small_batch}")
        small, big = _scalar("small_sq_norm", small_sq_norm), _scalar("big_sq_norm", big_sq_norm)
        device = next((x.device for x in (big, small) if x.device.type != "cpu"), self._sums.device)
        small, big = (x.detach().to(device, torch.float64) for x in (small, big))
        self._sums, self._square_weight, self._seen = (
            x.to(device) for x in (self._sums, self._square_weight, self._seen)
        )
        trace = (small - big) / (1 / self.small_batch - 1 / big_batch)
        grad_sq = (big_batch * big - self.small_batch * small) / (big_batch - self.small_batch)
        one = torch.ones_like(trace)
        new = torch.stack([one, trace, grad_sq, trace * trace, trace * grad_sq, grad_sq * grad_sq])
        finite = torch.isfinite(new).all()
        weight = 1 - self.decay
        self._sums = torch.where(finite, self.decay * self._sums + weight * new, self._sums)
        square = self.decay**2 * self._square_weight + weight**2
        self._square_weight = torch.where(finite, square, self._square_weight)
        self._seen = self._seen + finite

    def _averages(self) -> list[float]:
        """Debiased averages of [trace, |G|^2, trace^2, trace |G|^2, |G|^4]. Reads the device."""
        total, *sums = self._sums.tolist()
        if total == 0:
            raise RuntimeError("there is no noise scale before the first update(small_sq_norm, big_sq_norm)")
        return [x / total for x in sums]

    @property
    def updates(self) -> int:
        """The number of updates that counted. Reads the device."""
        return int(self._seen)

    @property
    def trace(self) -> float:
        """The average estimate of tr(Sigma); may be negative. Reads the device, as do all results.

        Raises:
            RuntimeError: there was no update yet, here and in all other results.
        """
        return self._averages()[0]

    @property
    def grad_sq(self) -> float:
        """The average estimate of |G|^2; may be negative."""
        return self._averages()[1]

    @property
    def noise_scale(self) -> float:
        """tr(Sigma) / |G|^2, in samples. A negative tr(Sigma) counts as 0; inf if |G|^2 is not above 0."""
        trace, grad_sq, *_ = self._averages()
        return max(trace, 0.0) / grad_sq if grad_sq > 0 else math.inf

    def interval(self) -> tuple[float, float]:
        """A confidence interval (low, high) of the noise scale, by Fieller's theorem for correlated averages.

        It assumes that the updates' estimates are independent and alike over the span of the average. If the noise
        scale grows, the interval is that of its recent average. With too few updates it is (0, inf). high is inf if
        |G|^2 cannot be told from 0.
        """
        s, g, ss, sg, gg = self._averages()
        # The effective number of updates n. A mean's variance is the weighted variance over n - 1.
        n = float(self._sums[0]) ** 2 / float(self._square_weight)
        if n < 3:
            return 0.0, math.inf
        t_sq = _student(0.5 + self.confidence / 2, n - 1) ** 2 / (n - 1)
        # All ratios R with (s - R g)^2 <= t^2 Var(s - R g), a quadratic in R.
        a = g * g - t_sq * (gg - g * g)
        b = s * g - t_sq * (sg - s * g)
        c = s * s - t_sq * (ss - s * s)
        root = b * b - a * c
        if a > 0 and g > 0:
            low, high = ((b + sign * math.sqrt(max(root, 0.0))) / a for sign in (-1, 1))
            return max(low, 0.0), max(high, 0.0)
        # |G|^2 may be 0. Then the solution is all ratios, or those outside of two bounds.
        if root <= 0 or a >= 0:
            return 0.0, math.inf
        inner, outer = sorted((b + sign * math.sqrt(root)) / a for sign in (-1, 1))
        return (outer, math.inf) if inner < 0 < outer else (0.0, math.inf)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the batch sizes and decay that they belong to."""
        batches = {"small_batch": self.small_batch, "big_batch": self.big_batch, "decay": self.decay}
        return {**batches, **{name: getattr(self, f"_{name}").clone() for name in _STATE}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the averages of a `state_dict`.

        Raises:
            ValueError: an entry is missing, or batch sizes or decay differ; nothing has changed.
        """
        if missing := [name for name in ("small_batch", "big_batch", "decay", *_STATE) if name not in state_dict]:
            raise ValueError(f"state_dict must be what GradientNoiseScale.state_dict() gives, {missing} are missing")
        for name in "small_batch", "big_batch", "decay":
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"state_dict has {name}={state_dict[name]!r}, but this one has {getattr(self, name)!r}"
                )
        own = {name: getattr(self, f"_{name}") for name in _STATE}
        loaded = {name: torch.as_tensor(state_dict[name], dtype=own[name].dtype) for name in _STATE}
        for name, value in loaded.items():
            if value.shape != (shape := own[name].shape):
                raise ValueError(f"state_dict[{name!r}] must have shape {tuple(shape)}, got {tuple(value.shape)}")
        for name, value in loaded.items():
            setattr(self, f"_{name}", value.clone())


def _scalar(name: str, value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got {value!r}") from error
        if value < 0:
            fail(name, value, "zero or more")
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if value.ndim != 0 or value.is_complex():
        fail(name, value, "a number or a 0-dim tensor")
    return value


def _student(p: float, freedom: float) -> float:
    """The p-quantile of Student's t by Abramowitz and Stegun 26.7.5, to 1 % for 3 or more degrees of freedom."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))
