"""One run of the benchmarks: the cases asked for, their groups measured one after another, and what is recorded."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from . import provenance, results
from .cases import Case, CaseGroup, every_case
from .full_step import Step
from .rounds import Outcome, Setting, time_contenders
from .shapes import Shape, shapes_of, smaller
from .timing import Gradients, parameters

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then everything runs on the CPU, without Triton's kernels
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# The parameters of the one test, all text: pytest-benchmark writes them to its JSON, and groups by them.
CASES: dict[tuple[str, ...], Case] = {case.key: case for case in every_case(DEVICE)}
BUDGET = 480.0  # seconds of a recorded run, its tests included


def case_of(item: Any) -> Case | None:
    """The case of a test, or None of a test that is none of ours."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return CASES.get(tuple(params.get(name, "") for name in results.KEY))


class BenchmarkRun:
    """What a run has measured so far, and the file it writes.

    commit: what recorded rows belong to. None: nothing is written.
    """

    def __init__(self, config: pytest.Config, commit: str | None, began: float) -> None:
        self._config, self.facts = config, provenance.facts(DEVICE, commit or "")
        budget = config.getoption("budget")
        self._deadline = began + (budget if budget is not None else BUDGET if commit else float("inf"))
        self._measured: dict[CaseGroup, dict[Case, tuple[Outcome, results.Row]]] = {}
        self._smoke: bool = config.getoption("smoke")
        folder = config.getoption("results") or (None if self._smoke else provenance.RESULTS)
        self._file = folder / f"{provenance.file_name(self.facts['device'])}.csv" if commit and folder else None
        self._anew = not config.getoption("append")  # the next rows replace the file

    def result(self, case: Case, items: Sequence[Any]) -> tuple[Outcome, results.Row]:
        """A case's result. The first case of a group has all cases of the group measured that were asked for."""
        if case not in self._measured.get(case.group, {}):
            asked = {other: None for item in items if (other := case_of(item)) and other.group == case.group}
            self._measured[case.group] = self._measure(list(asked))
        return self._measured[case.group][case]

    def step_of(self, case: Case, *, once: bool) -> Step:
        """A step of a case outside its rounds: of few small tensors to run it once, or warm, for a profile."""
        assert case.contender
        shapes = smaller(shapes_of(case.group.model), 32)[:4] if once else self._shapes(case.group)
        gradients = Gradients(shapes, getattr(torch, case.group.dtype), DEVICE)
        step = case.contender.make(parameters(gradients), case.group.bookkeeping)
        for _ in range(0 if once else 3):
            gradients.restore()
            step()
        return step

    def _shapes(self, group: CaseGroup) -> list[Shape]:
        return smaller(shapes_of(group.model), 32) if self._smoke else shapes_of(group.model)

    def _measure(self, cases: list[Case]) -> dict[Case, tuple[Outcome, results.Row]]:
        group, option = cases[0].group, self._config.getoption
        late = "not run: time" if time.monotonic() > self._deadline else ""
        if why := cases[0].status or late:
            outcomes = [Outcome(status=case.status or why) for case in cases]
            rows = [{**results.empty_row(case), "status": o.status} for case, o in zip(cases, outcomes, strict=True)]
        else:
            shapes = self._shapes(group)
            limit = 0.0 if self._smoke else float(option("benchmark_max_time"))
            fewest = option("benchmark_min_rounds")
            setting = Setting(shapes, getattr(torch, group.dtype), group.bookkeeping, DEVICE, limit, fewest)
            with _without_gc(option("benchmark_disable_gc")):
                outcomes = time_contenders([case.contender for case in cases if case.contender], setting, self._say)
            rows = results.rows_of(cases, outcomes, shapes)
        rows = [{**row, **self.facts} for row in rows]
        self._write(rows)
        return dict(zip(cases, zip(outcomes, rows, strict=True), strict=True))

    def _write(self, rows: list[results.Row]) -> None:
        if self._file and self._anew:  # not before there is something to put in its place
            self._file.unlink(missing_ok=True)
        self._anew = False
        if self._file:
            results.append(self._file, rows)

    def _say(self, name: str) -> None:
        """Name the contender being made ready, on a terminal: compiling takes a while."""
        plugin: Any = self._config.pluginmanager.get_plugin
        reporter = plugin("terminalreporter")
        if reporter and reporter.isatty:
            with plugin("capturemanager").global_and_fixture_disabled():
                reporter.write(f"[{name}] ")


@contextmanager
def _without_gc(wanted: bool) -> Iterator[None]:
    """`--benchmark-disable-gc`, for a group's rounds."""
    was_on = gc.isenabled()
    if wanted:
        gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


RUN = pytest.StashKey[BenchmarkRun]()
