"""A full optimizer step at a scheduled LR: every case of `cases.py`."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case, every_case
from .conftest import DEVICE, RUN


class Replay:
    """A clock that repeats measured times. The cases of a group are timed together, before pytest-benchmark asks."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def load(self, times: list[float]) -> None:
        self.readings = [reading for seconds in reversed(times) for reading in (seconds, 0.0)]

    def __call__(self) -> float:
        return self.readings.pop() if self.readings else 0.0


CLOCK = Replay()


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", every_case(DEVICE), ids=str)
def test_step(
    benchmark: Any, case: Case, request: pytest.FixtureRequest, record_property: Any, pytestconfig: pytest.Config
) -> None:
    benchmark.group = str(case.group)
    outcome, row = pytestconfig.stash[RUN].result(case, request.session.items)
    if outcome.status == "failed" and case.contender and case.contender.is_ours:
        pytest.fail(outcome.error)
    if outcome.status == "failed":
        pytest.xfail(outcome.error)
    if outcome.status != "ok":
        pytest.skip(outcome.status)
    CLOCK.load(outcome.times)
    benchmark.pedantic(lambda: None, rounds=len(outcome.times))
    benchmark.extra_info.update(row)
    best = f", {float(row['ratio_to_best_torch']):.2f} of the best torch" if row["ratio_to_best_torch"] else ""
    record_property("said", f"{float(row['median_us']):.1f} us, {float(row['share_of_copy']):.0%} of a copy{best}")
