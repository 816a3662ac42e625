"""LEGW: linear-epoch gradual warm-up (You et al. 2019, arXiv 1901.08256)."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import KW_ONLY, asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from legw_kernels import scalars

from .decays import DECAYS, Constant, Decay, Run, assign, count, exact, fail, number

_SCALINGS = {"sqrt": math.sqrt, "linear": lambda k: k, "none": lambda k: 1.0}


@dataclass(frozen=True)
class LEGW:
    """The learning rate of a recipe tuned at one batch size, at another batch size, with nothing retuned.

    With k = batch_size / base_batch_size: the peak LR is sqrt(k) * base_lr, the warm-up lasts k * base_warmup_epochs
    epochs, and the recipe's own decay keeps its epochs. `schedule(t)` is the LR of the update made after t completed
    ones: peak * min(1, (t + 1) / warmup_steps), times the decay once t >= warmup_steps.

    Args:
        base_lr: peak LR of the tuned recipe.
        base_batch_size: its global batch, in samples.
        base_warmup_epochs: its warm-up, in epochs; 0 for none.
        batch_size: this run's global, effective batch: all workers, all accumulated micro-batches.
        dataset_size: samples per epoch.
        epochs: length of the run; needed by decays that end (Polynomial, Cosine).
        decay: Constant(), MultiStep(...), Exponential(...), Polynomial(...) or Cosine(...).
        scaling: "sqrt" (LEGW), "linear" (Goyal et al. 2017) or "none".
        steps_per_epoch: updates per epoch; dataset_size / batch_size unless given. With a real loader pass
            `len(loader)`, else the last updates of a run fall past its end.

    Raises:
        ValueError: naming the argument and its value.

    >>> schedule = LEGW(0.1, 16, 0.5, batch_size=512, dataset_size=1280, epochs=60)
    >>> round(schedule.peak_lr, 4), schedule.warmup_epochs, schedule.warmup_steps
    (0.5657, 16.0, 40.0)
    >>> schedule(0) == schedule.peak_lr / 40
    True
    """

    base_lr: float
    base_batch_size: int
    base_warmup_epochs: float
    _: KW_ONLY
    batch_size: int
    dataset_size: int
    epochs: float | None = None
    decay: Decay = Constant()  # noqa: RUF009  # frozen, so it can be shared
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    steps_per_epoch: float = None  # type: ignore[assignment]  # a number once made

    def __post_init__(self) -> None:
        assign(
            self,
            base_lr=number("base_lr", self.base_lr),
            base_batch_size=count("base_batch_size", self.base_batch_size),
            base_warmup_epochs=number("base_warmup_epochs", self.base_warmup_epochs, zero=True),
            batch_size=count("batch_size", self.batch_size),
            dataset_size=count("dataset_size", self.dataset_size),
            epochs=None if self.epochs is None else number("epochs", self.epochs),
        )
        if not isinstance(self.decay, tuple(DECAYS.values())):
            fail("decay", self.decay, f"an object of one of {', '.join(DECAYS)}")
        if not isinstance(self.scaling, str) or self.scaling not in _SCALINGS:
            fail("scaling", self.scaling, f"one of {', '.join(map(repr, _SCALINGS))}")
        if self.steps_per_epoch is None:
            assign(self, steps_per_epoch=self.dataset_size / self.batch_size)
        else:
            assign(self, steps_per_epoch=number("steps_per_epoch", self.steps_per_epoch))
        if not math.isfinite(self.peak_lr):
            fail("base_lr", self.base_lr, f"small enough for a finite peak LR at batch_size={self.batch_size}")
        _ = self.recipe  # made now, so that a decay's objections come now

    @cached_property
    def exact_steps_per_epoch(self) -> Fraction:
        """`steps_per_epoch` without its rounding to a float."""
        ratio = Fraction(self.dataset_size, self.batch_size)
        return ratio if self.steps_per_epoch == float(ratio) else exact(self.steps_per_epoch)

    @property
    def _run(self) -> Run:
        return Run(
            self.peak_lr,
            self.warmup_epochs,
            self.warmup_steps,
            self.epochs,
            self.total_steps,
            self.exact_steps_per_epoch,
        )

    @cached_property
    def recipe(self) -> scalars.Recipe:
        """The schedule's constants in updates, as the host formula and the kernels take them."""
        peak, steps = self.peak_lr, self.warmup_steps
        warmup = scalars.Recipe(peak_lr=peak, warmup_steps=steps, slope=peak / steps if steps else 0.0)
        return warmup._replace(**self.decay.recipe(self._run))

    @cached_property
    def milestones(self) -> tuple[int, ...]:
        """The updates at which a MultiStep decay passes its milestones."""
        return self.decay.boundaries(self._run)

    @property
    def scale(self) -> float:
        """k, this batch over the recipe's."""
        return self.batch_size / self.base_batch_size

    @property
    def peak_lr(self) -> float:
        """The LR at the end of the warm-up."""
        return float(_SCALINGS[self.scaling](self.scale)) * self.base_lr

    @property
    def warmup_epochs(self) -> float:
        """The warm-up in epochs: k times the recipe's."""
        return self.scale * self.base_warmup_epochs

    @property
    def warmup_steps(self) -> float:
        """W, the warm-up in updates, may be fractional; without `steps_per_epoch` the same at every batch size."""
        scale = Fraction(self.batch_size, self.base_batch_size)
        return float(exact(self.base_warmup_epochs) * scale * self.exact_steps_per_epoch)

    @property
    def total_steps(self) -> float | None:
        """T, the run in updates, may be fractional; None without `epochs`."""
        return None if self.epochs is None else float(exact(self.epochs) * self.exact_steps_per_epoch)

    def __call__(self, t: int) -> float:
        """The float64 LR of the update made after t completed ones (t = 0, 1, 2, ...)."""
        t = count("t", t, zero=True)
        passed = bisect_right(self.milestones, t)
        return float(scalars.learning_rate(float(t), float(passed), self.recipe))

    def with_batch_size(self, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """The same recipe at another batch size. steps_per_epoch belongs to a batch, so it is not carried over."""
        return replace(self, batch_size=batch_size, steps_per_epoch=steps_per_epoch)  # type: ignore[arg-type]

    def plot(self, ax: Any = None, **line: Any) -> Any:
        """Draw LR against epochs with matplotlib (the extra `fused-legw[plot]`); returns the Axes.

        ax: matplotlib Axes to draw on, else a new figure's. line: passed to `ax.plot`, for instance label or color.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(layout="constrained").gca()
        last = math.ceil(
            self.total_steps or max(3 * self.warmup_steps, self.steps_per_epoch, *self.milestones, 1) * 1.2
        )
        joints = {math.floor(self.warmup_steps), math.ceil(self.warmup_steps), *self.milestones}
        updates = sorted({round(last * i / 1000) for i in range(1000)} | {t + d for t in joints for d in (-1, 0)})
        updates = [t for t in updates if 0 <= t < last]
        line.setdefault("label", f"batch {self.batch_size}")
        ax.plot([t / self.steps_per_epoch for t in updates], [self(t) for t in updates], **line)
        ax.set(xlabel="epoch", ylabel="learning rate")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """The schedule as primitives, for checkpoints and JSON."""
        return {**asdict(self), "decay": {"name": type(self.decay).__name__, **asdict(self.decay)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LEGW:
        """The inverse of `to_dict`; a ValueError names what is not a schedule's."""
        try:
            decay = dict(values["decay"])
            name = decay.pop("name")
            if name not in DECAYS:
                fail("decay", name, f"one of {', '.join(DECAYS)}")
            return cls(**{**values, "decay": DECAYS[name](**decay)})
        except (TypeError, KeyError) as error:
            raise ValueError(f"schedule must be what LEGW.to_dict() gives, got {values!r}: {error}") from error
