"""LEGW: linear-epoch gradual warm-up (You et al. 2019, arXiv 1901.08256)."""

from __future__ import annotations

import math
import reprlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from legw_kernels import formulas

from ..checks import count, fail, number, plain
from .base import Schedule
from .clock import Clock, assign, exact
from .decays import DECAYS, Constant, Decay, RunLength

_SCALINGS = {"sqrt": math.sqrt, "linear": lambda k: k, "none": lambda k: 1.0}


class Stretch(NamedTuple):
    """A part of the run at one batch size, before a change."""

    end: int  # the update at which the batch size changed
    batch_size: int
    steps_per_epoch: float


def _stretches(earlier: Any) -> tuple[Stretch, ...]:
    """Check `LEGW.earlier`."""
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
    """Takes the learning rate of a recipe tuned at one batch size to another batch size, with nothing retuned.

    Let k = batch_size / base_batch_size. The peak LR is sqrt(k) * base_lr. The warm-up is linear and lasts k *
    base_warmup_epochs epochs. The recipe's decay keeps its epochs (You et al. 2019, arXiv 1901.08256). `schedule(t)` is
    the LR of the update made after t completed ones: peak_lr * min(1, (t + 1) / warmup_steps), times the decay once
    t >= warmup_steps.

    Args:
        base_lr: peak LR of the tuned recipe.
        base_batch_size: the recipe's global batch, in samples.
        base_warmup_epochs: the recipe's warm-up, in epochs; 0 for none.
        batch_size: this run's global batch, in samples: all workers, all accumulated micro-batches.
        dataset_size: samples per epoch.
        epochs: length of the run; Polynomial and Cosine need it.
        decay: Constant(), MultiStep(...), Exponential(...), Polynomial(...) or Cosine(...).
        scaling: how the peak LR grows with k: "sqrt" (LEGW), "linear" (Goyal et al. 2017) or "none".
        steps_per_epoch: updates per epoch; by default dataset_size / batch_size. With a data loader pass `len(loader)`:
            otherwise the last updates fall past the end of the schedule.
        earlier: the batch sizes before this one; `change_batch_size` fills it in.

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
    steps_per_epoch: float = None  # type: ignore[assignment]  # a number after __post_init__
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
            scaling=plain(self.scaling),
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
        _ = self.constants  # raises here if the decay does not fit the run

    def _exact_steps_per_epoch(self, batch_size: int, steps_per_epoch: float) -> Fraction:
        """`steps_per_epoch` as a fraction, without rounding."""
        ratio = Fraction(self.dataset_size, batch_size)
        return ratio if steps_per_epoch == float(ratio) else exact(steps_per_epoch)

    @cached_property
    def _clock(self) -> Clock:
        begins = (0, *(stretch.end for stretch in self.earlier))
        batches = (*(stretch[1:] for stretch in self.earlier), (self.batch_size, self.steps_per_epoch))
        return Clock([(t, self._exact_steps_per_epoch(*batch)) for t, batch in zip(begins, batches, strict=True)])

    @cached_property
    def _warmup_steps(self) -> Fraction:
        """The warm-up in updates, by the first batch size. At others it differs by rounding of steps_per_epoch only."""
        _, batch_size, steps_per_epoch = (*self.earlier, (0, self.batch_size, self.steps_per_epoch))[0]
        scale = Fraction(batch_size, self.base_batch_size)
        return exact(self.base_warmup_epochs) * scale * self._exact_steps_per_epoch(batch_size, steps_per_epoch)

    @property
    def _run(self) -> RunLength:
        end = self._clock.epoch(self._warmup_steps)
        return RunLength(self.peak_lr, self.warmup_steps, end, self.epochs, self._clock)

    @cached_property
    def constants(self) -> formulas.ScheduleConstants:  # type: ignore[override]
        """The schedule's constants, in updates, for the host formula and the kernels."""
        peak, steps = self.peak_lr, self.warmup_steps
        warmup = formulas.ScheduleConstants(peak_lr=peak, warmup_steps=steps, slope=peak / steps if steps else 0.0)
        return warmup._replace(**self.decay.constants(self._run))

    @cached_property
    def milestones(self) -> tuple[int, ...]:  # type: ignore[override]
        """The updates at which a MultiStep decay passes its milestones."""
        return self.decay.boundaries(self._run)

    @property
    def scale(self) -> float:
        """k: this run's batch size over the recipe's."""
        return self.batch_size / self.base_batch_size

    @property
    def peak_lr(self) -> float:
        """The LR at the end of the warm-up."""
        return float(_SCALINGS[self.scaling](self.scale)) * self.base_lr

    @property
    def warmup_epochs(self) -> float:
        """The warm-up in epochs: k times the recipe's, if the batch size never changes."""
        return float(self._clock.epoch(self._warmup_steps))

    @property
    def warmup_steps(self) -> float:
        """The warm-up in updates (W in formulas); may be fractional. The same at every batch size by default."""
        return float(self._warmup_steps)

    @property
    def total_steps(self) -> float | None:
        """The length of the run in updates (T in formulas); may be fractional. None without `epochs`."""
        return None if self.epochs is None else float(self._clock.update(exact(self.epochs)))

    @property
    def since(self) -> int:
        """The update at which the batch last changed; 0 if it never did."""
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
        """Whether this is the current batch."""
        batch_size = count("batch_size", batch_size)
        steps = (
            self.dataset_size / batch_size if steps_per_epoch is None else number("steps_per_epoch", steps_per_epoch)
        )
        return (batch_size, steps) == (self.batch_size, self.steps_per_epoch)

    def change_batch_size(self, t: int, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """The schedule of this run if it continues at another batch size after t updates.

        The warm-up continues by updates: its length in updates is the same at every batch size. The decay continues by
        epochs, from where it is: after t an update is batch_size / dataset_size of an epoch, or 1 / steps_per_epoch.
        The peak LR becomes that of the new batch. The LR of earlier updates does not change.
        `optimizer.set_batch_size` does this to a running optimizer.

        Args:
            t: updates made so far, no fewer than at an earlier change.
            batch_size: the global batch of the updates that follow, in samples.
            steps_per_epoch: updates per epoch at that batch; by default dataset_size / batch_size.

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
        # A batch size at which no update was made is not recorded.
        stretch = (Stretch(t, self.batch_size, self.steps_per_epoch),) if t > self.since else ()
        values = dict[str, Any](batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        return replace(self, **values, earlier=(*self.earlier, *stretch))

    def with_batch_size(self, batch_size: int, *, steps_per_epoch: float | None = None) -> LEGW:
        """The recipe at another batch size from the start. steps_per_epoch is not carried over.

        Raises:
            ValueError: naming the argument and its value.
        """
        values = dict[str, Any](batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        return replace(self, **values, earlier=())

    def plot(self, ax: Any = None, **line: Any) -> Any:
        """Draw the LR against epochs with matplotlib (the extra `fused-legw[plot]`).

        Args:
            ax: the matplotlib Axes to draw on; by default those of a new figure.
            **line: passed to `ax.plot`, for instance label or color.

        Returns:
            The Axes.
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
        decay = {"name": type(self.decay).__name__, **vars(self.decay)}
        return {**asdict(self), "decay": decay, "earlier": [list(stretch) for stretch in self.earlier]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LEGW:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming the entry that is missing or wrong.
        """
        try:
            decay = dict(values["decay"])
            name = decay.pop("name")
            if name not in DECAYS:
                fail("decay", name, f"one of {', '.join(DECAYS)}")
            return cls(**{**values, "decay": DECAYS[name](**decay)})
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"schedule must be what LEGW.to_dict() gives, got {reprlib.repr(values)}: {error}"
            ) from error
