"""Times the contenders of one group in rounds. Each takes its turn in a round, so their ratios can be trusted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from .contenders import Contender
from .full_step import Step
from .shapes import Shape, smaller
from .timing import Before, Gradients, clock_of, free_bytes, host_seconds, launches, parameters, seconds, synchronize

MOST_ROUNDS, FEWEST_ROUNDS = 50, 5


@dataclass
class Outcome:
    """What came of one contender. Times are in seconds."""

    status: str = "ok"  # or "failed", or "skipped: memory"
    error: str = ""
    times: list[float] = field(default_factory=list)  # of its steps
    copies: list[float] = field(default_factory=list)  # of a copy in each of the same rounds
    copy_bytes: int = 0  # that a copy reads and writes
    host: float | None = None  # until the call returns
    launches: int | None = None  # of kernels, in a step

    def fail(self, error: Exception) -> None:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        self.status = "skipped: memory" if memory else "failed"
        self.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.times.clear()


@dataclass
class Setting:
    """What the contenders of a group have in common."""

    shapes: Sequence[Shape]
    dtype: torch.dtype
    bookkeeping: str
    device: torch.device
    seconds: float  # for how long each of them is timed, but for at most MOST_ROUNDS
    fewest_rounds: int = FEWEST_ROUNDS  # however long they take; may be above MOST_ROUNDS

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))


class Entrant:
    """A contender made ready: its state is made, its kernels are compiled, its number of rounds is known."""

    def __init__(self, contender: Contender, setting: Setting, gradients: Gradients, outcome: Outcome) -> None:
        self.outcome, self._gradients, self._device = outcome, gradients, setting.device
        self.step = contender.make(parameters(gradients), setting.bookkeeping)
        for _ in range(3):
            gradients.restore()
            start = time.perf_counter()
            self.step()
            synchronize(setting.device)
            took = time.perf_counter() - start
        self.rounds = max(setting.fewest_rounds, min(MOST_ROUNDS, int(setting.seconds / took)))
        outcome.host = self._host_seconds(contender, setting)
        try:
            outcome.launches = launches(self.step, setting.device)
        except RuntimeError:  # the profiler may not be allowed to count
            outcome.launches = None

    def _host_seconds(self, contender: Contender, setting: Setting) -> float | None:
        if setting.device.type == "cuda":
            return host_seconds(self.step, setting.device)
        if contender.name == "torch-compile":
            return None  # the tiny shapes would be compiled for this alone
        # On a CPU the host's part of a call only shows where there is next to nothing to compute.
        tiny = Gradients(smaller(setting.shapes, 2**62), setting.dtype, setting.device)
        step: Step = contender.make(parameters(tiny), setting.bookkeeping)
        host_seconds(step, setting.device, 3)
        return host_seconds(step, setting.device)

    def turn(self, before: Before) -> None:
        """One timed step."""
        self._gradients.restore()
        before.flush(hide=self.outcome.host or 0.0)
        self.outcome.times.append(seconds(self.step, clock_of(self._device)))


def time_contenders(
    contenders: Sequence[Contender], setting: Setting, progress: Callable[[str], None] = lambda name: None
) -> list[Outcome]:
    """An outcome for each contender. As many of them share rounds as fit into memory."""
    outcomes = [Outcome() for _ in contenders]
    try:
        gradients = Gradients(setting.shapes, setting.dtype, setting.device)
        before = Before(setting.elements, setting.device)
    except (RuntimeError, MemoryError) as error:
        for outcome in outcomes:
            outcome.fail(error)
        return outcomes
    waiting = list(zip(contenders, outcomes, strict=True))
    while waiting:
        entrants: list[Entrant] = []
        while waiting and (not entrants or _fits(waiting[0][0], setting)):
            contender, outcome = waiting.pop(0)
            progress(contender.name)
            try:
                if not _fits(contender, setting):
                    raise MemoryError("not enough of it")
                entrants.append(Entrant(contender, setting, gradients, outcome))
            except Exception as error:  # whatever a contender does, the others go on
                outcome.fail(error)
            if outcome.status == "skipped: memory" and entrants:  # alone it may fit
                outcome.status, outcome.error = "ok", ""
                waiting.insert(0, (contender, outcome))
                break
        _take_turns(entrants, before)
        entrants.clear()
        _free(setting.device)
    return outcomes


def _fits(contender: Contender, setting: Setting) -> bool:
    """Whether another contender fits into memory: its weights, its state, and a step's temporaries."""
    state = 4 if contender.family in ("sgd", "lars") else 8
    weights = 4 if setting.dtype == torch.float32 else 2 + 4 + 4  # with masters and their gradients
    temporary = 12
    return (weights + state + temporary) * setting.elements < 0.9 * free_bytes(setting.device)


def _take_turns(entrants: Sequence[Entrant], before: Before) -> None:
    """The rounds. Each begins with another contender. A slow one sits out some rounds, evenly spread."""
    rounds = max((entrant.rounds for entrant in entrants), default=0)
    before.copies.clear()
    for r in range(rounds):
        before.copy()
        for entrant in [*entrants[r % len(entrants) :], *entrants[: r % len(entrants)]]:
            due = (r + 1) * entrant.rounds // rounds > r * entrant.rounds // rounds
            if due and entrant.outcome.status == "ok":
                try:
                    entrant.turn(before)
                except Exception as error:
                    entrant.outcome.fail(error)
    for entrant in entrants:
        entrant.outcome.copies, entrant.outcome.copy_bytes = list(before.copies), before.copy_bytes


def _free(device: torch.device) -> None:
    gc.collect()  # schedulers and optimizers refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
