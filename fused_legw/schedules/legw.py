"""LEGW: linear-epoch gradual warm-up (You et al. 2019, arXiv 1901.08256)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from legw_kernels import formulas

from ..checks import count, fail, number
from .base import Schedule
from .clock import Clock, assign, exact
from .decays import DECAYS, Constant, Decay, Run

_SCALINGS = {"sqrt": math.sqrt, "linear": lambda k: k, "none": lambda k: 1.0}


class Stretch(NamedTuple):
    """Updates that were made at another batch size than those after them. end: the update at which it changed."""

    end: int
    batch_size: int
    steps_per_epoch: float


def _stretches(earlier: Any) -> tuple[Stretch, ...]:
    """`LEGW.earlier`, checked."""
    if isinstance(earlier, str) or not isinstance(earlier, Sequence):
        fail("earlier", earlier, "a sequence of (end, batch_size, steps_per_epoch)")
    stretches = list[Stretch]()
    for entry in earlier:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
            fail("earlier", entry, "a sequence of (end, batch_size, steps_per_epoch)")
        end, batch_size, steps = entry
        stretches.append(Stretch(count("end", end), count("batch_size", batch_size), number("steps_per_epoch", steps)))
    if any(a.end >= b.end for a, b in pairwise(stretches)):
        fail("earlier", earlier, "in the order of its ends")
    return tuple(stretches)


@dataclass(frozen=True)
class LEGW(Schedule):
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
        earlier: what `change_batch_size` keeps of the batches before this one.

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
    earlier: tuple[Stretch, ...] = ()

    def __post_init__(self) -> None:
        assign(
            self,
            base_lr=number("base_lr", self.base_lr),
            base_batch_size=count("base_batch_size", self.base_batch_size),
            base_warmup_epochs=number("base_warmup_epochs", self.base_warmup_epochs, zero=True),
            batch_size=count("batch_size", self.batch_size),
            dataset_size=count("dataset_size", self.dataset_size),
            epochs=None if self.epochs is None else number("epochs", self.epochs),
            earlier=_stretches(self.earlier),
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
        _ = self.constants  # made now, so that a decay's objections come now

    def _exact_steps_per_epoch(self, batch_size: int, steps_per_epoch: float) -> Fraction:
        """`steps_per_epoch` without its rounding to a float."""
        ratio = Fraction(self.dataset_size, batch_size)
        return ratio if steps_per_epoch == float(ratio) else exact(steps_per_epoch)

    @cached_property
    def _clock(self) -> Clock:
        begins = (0, *(stretch.end for stretch in self.earlier))
        batches = (*(stretch[1:] for stretch in self.earlier), (self.batch_size, self.steps_per_epoch))
        return Clock([(t, self._exact_steps_per_epoch(*batch)) for t, batch in zip(begins, batches, strict=True)])

    @cached_property
    def _warmup_steps(self) -> Fraction:
        """W by the first batch: the same at all, but for the rounding of a steps_per_epoch that was given."""
        _, batch_size, steps_per_epoch = (*self.earlier, (0, self.batch_size, self.steps_per_epoch))[0]
        scale = Fraction(batch_size, self.base_batch_size)
        return exact(self.base_warmup_epochs) * scale * self._exact_steps_per_epoch(batch_size, steps_per_epoch)

    @property
    def _run(self) -> Run:
        end = self._clock.epoch(self._warmup_steps)
        return Run(self.peak_lr, self.warmup_steps, end, self.epochs, self._clock)

    @cached_property
    def constants(self) -> formulas.ScheduleConstants:  # type: ignore[override]
        """The schedule's constants in updates, as the host formula and the kernels take them."""
        peak, steps = self.peak_lr, self.warmup_steps
        warmup = formulas.ScheduleConstants(peak_lr=peak, warmup_steps=steps, slope=peak / steps if steps else 0.0)
        return warmup._replace(**self.decay.constants(self._run))

    @cached_property
    def milestones(self) -> tuple[int, ...]:  # type: ignore[override]
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
        """The warm-up in epochs: k times the recipe's, at one batch."""
        return float(self._clock.epoch(self._warmup_steps))

    @property
    def warmup_steps(self) -> float:
        """W, the warm-up in updates, may be fractional; without `steps_per_epoch` the same at every batch size."""
        return float(self._warmup_steps)

    @property
    def total_steps(self) -> float | None:
        """T, the run in updates, may be fractional; None without `epochs`."""
        return None if self.epochs is None else float(self._clock.update(exact(self.epochs)))

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 where it never did."""
        return self.earlier[-1].end if self.earlier else 0

    def epoch(self, t: int) -> float:
        """The epochs done after t updates."""
        return float(self._clock.epoch(count("t", t, zero=True)))

    def as_of(self, t: int) -> LEGW:
        """The schedule that update t followed, before later changes of the batch."""
        if t >= self.since:
            return self
        i = bisect_right([stretch.end for stretch in self.earlier], t)
        _, batch_size, steps_per_epoch = self.earlier[i]
        return replace(self, batch_size=batch_size, steps_per_epoch=steps_per_epoch, earlier=self.earlier[:i])

    def has_batch(self, batch_size: int, steps_per_epoch: float | None = None) -> bool:
        """Whether updates are made at this batch now."""
        batch_size = count("batch_size", batch_size)
        steps = (
            self.dataset_size / batch_size if steps_per_epoch is None else number("steps_per_epoch", steps_per_epoch)
        )
        return (batch_size, steps) == (self.batch_size, self.steps_per_epoch)

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """This run, going on at another batch size after t updates.

        The warm-up goes on by updates: its length W is the same at every batch. The decay goes on by epochs, from where
        it is; from t on an update is batch_size / dataset_size of one, or 1 / steps_per_epoch. The peak LR becomes the
        batch's. Up to t the LR stays what it was. `optimizer.set_batch_size` does this to a running optimizer.

        Args:
            t: updates made so far, no fewer than at an earlier change.
            batch_size: the global batch of the updates that follow.
            steps_per_epoch: as of the class.

        Raises:
            ValueError: naming the argument and its value; also where the run would now end inside its warm-up.

        >>> from fused_legw import Cosine
        >>> schedule = LEGW(0.1, 16, 0.5, batch_size=64, dataset_size=1280, epochs=10, decay=Cosine())
        >>> larger = schedule.change_batch_size(100, 256)  # half of the run: 5 epochs of 20 updates
        >>> larger.peak_lr / schedule.peak_lr, schedule.total_steps, larger.total_steps
        (2.0, 200.0, 125.0)
        >>> larger(99) == schedule(99)
        True
        """
        t = count("t", t, zero=True)
        if t < self.since:
            fail("t", t, f"at least {self.since}, where the batch size last changed")
        # A batch that made no update leaves no trace.
        stretch = (Stretch(t, self.batch_size, self.steps_per_epoch),) if t > self.since else ()
        values = dict[str, Any](batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        return replace(self, **values, earlier=(*self.earlier, *stretch))

    def with_batch_size(self, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """The recipe at another batch from the start; steps_per_epoch belongs to a batch and is not carried over."""
        values = dict[str, Any](batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        return replace(self, **values, earlier=())

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
        ax.plot([self.epoch(t) for t in updates], [self(t) for t in updates], **line)
        ax.set(xlabel="epoch", ylabel="learning rate")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """The schedule as primitives, for checkpoints and JSON."""
        decay = {"name": type(self.decay).__name__, **asdict(self.decay)}
        return {**asdict(self), "decay": decay, "earlier": [list(stretch) for stretch in self.earlier]}

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
