"""A full optimizer step at a scheduled LR: every case of `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .cases import Case
from .results import KEY
from .rounds import Outcome
from .run import CASES, RUN

_readings: list[float] = []  # of the clock below, the next one last


def measured_rounds() -> float:
    """A clock that repeats measured times. A group's cases are timed together, before pytest-benchmark asks."""
    return _readings.pop() if _readings else 0.0


def _replay(benchmark: Any, times: list[float], ready: Callable[[], Callable[[], object]]) -> None:
    """Hand measured rounds to pytest-benchmark's statistics. What it calls beside them is a step of `ready`'s.

    That is its only call under --benchmark-disable, and the profiled one under --benchmark-cprofile.
    """
    _readings[:] = [reading for seconds in reversed(times) for reading in (seconds, 0.0)]

    def arguments() -> tuple[tuple[Callable[[], object]], dict[str, object]]:
        return ((lambda: None) if _readings else ready(),), {}

    benchmark.pedantic(lambda step: step(), setup=arguments, rounds=max(1, len(times)))


def _judge(case: Case, outcome: Outcome) -> None:
    """The test's result, where there is no time to show. Only a failure of ours fails a run."""
    if outcome.status == "failed" and case.contender and case.contender.is_ours:
        pytest.fail(outcome.error)
    if outcome.status == "failed":
        pytest.xfail(outcome.error)
    if outcome.status != "ok":
        pytest.skip(outcome.status)


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.benchmark(timer=measured_rounds)
@pytest.mark.parametrize(KEY, list(CASES), ids=map(str, CASES.values()))
def test_step(
    benchmark: Any,
    family: str,
    model: str,
    dtype: str,
    bookkeeping: str,
    contender: str,
    mode: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    case, run = CASES[family, model, dtype, bookkeeping, contender, mode], request.config.stash[RUN]
    benchmark.group = str(case.group)
    once = benchmark.disabled
    outcome, row = (Outcome(case.status or "ok"), {}) if once else run.result(case, request.session.items)
    _judge(case, outcome)
    try:
        _replay(benchmark, outcome.times, lambda: run.step_of(case, once=once))
    except Exception as error:  # of a step that is made here; a repeated round has none
        outcome.fail(error)
        _judge(case, outcome)
    if row:
        benchmark.extra_info.update(row)
        best = f", {float(row['ratio_to_best_torch']):.2f} of the best torch" if row["ratio_to_best_torch"] else ""
        record_property("said", f"{float(row['median_us']):.1f} us, {float(row['share_of_copy']):.0%} of a copy{best}")
