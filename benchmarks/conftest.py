"""A run of the benchmarks: its options, what it refuses, and its groups, measured one after another."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import provenance, results
from .cases import Case, CaseGroup
from .least_bytes import FAMILIES
from .rounds import Outcome, Setting, time_contenders
from .shapes import shapes_of, smaller

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then everything runs on the CPU, without Triton's kernels
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-legw benchmarks")
    add = group.addoption
    add("--part", action="append", choices=FAMILIES, help="only this family; can be given again")
    add("--results", type=Path, help="folder of the CSV file (benchmarks/results)")
    add("--append", action="store_true", help="add to the CSV file instead of starting it anew")
    add("--commit", help="the commit measured, where the source tree has no git")
    add("--allow-dirty", action="store_true", help="measure files that differ from the commit; rows say so")
    add("--tests-passed", action="store_true", help="do not run the tests first: they have passed")
    add(
        "--budget", type=float, default=480.0, help="seconds, tests included, after which no other group is begun (480)"
    )
    add("--seconds-per-case", type=float, default=0.5, help="for how long to time each contender (0.5)")
    add("--smoke", action="store_true", help="small tensors, to try the suite itself; writes only where --results says")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse before anything is measured. Every row must belong to a commit that can be looked up."""
    began, config = time.monotonic(), session.config
    if config.option.collectonly:
        return
    commit = config.getoption("commit") or provenance.commit()
    dirty = [] if config.getoption("commit") else provenance.changed_files()
    if commit is None:
        raise pytest.UsageError("no commit is known here: give --commit")
    if dirty and not config.getoption("allow_dirty"):
        raise pytest.UsageError(f"files differ from the commit: commit them or give --allow-dirty\n{_listed(dirty)}")
    if not config.getoption("tests_passed") and not provenance.tests_pass():
        raise pytest.UsageError("tests fail: nothing is measured")
    config.stash[RUN] = BenchmarkRun(config, commit + ("-dirty" if dirty else ""), began)


def _listed(lines: list[str]) -> str:
    return "\n".join(lines[:10] + ["..."] * (len(lines) > 10))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parts = config.getoption("part")
    out = [item for item in items if parts and (case := case_of(item)) and case.group.family not in parts]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def case_of(item: pytest.Item) -> Case | None:
    spec = getattr(item, "callspec", None)
    return spec.params.get("case") if spec else None


class BenchmarkRun:
    """What a run has measured so far, and the file it writes."""

    def __init__(self, config: pytest.Config, commit: str, began: float) -> None:
        self.config, self.facts = config, provenance.facts(DEVICE, commit)
        self.deadline = began + config.getoption("budget")
        self.measured: dict[CaseGroup, dict[Case, tuple[Outcome, results.Row]]] = {}
        self.smoke: bool = config.getoption("smoke")
        folder = config.getoption("results") or (None if self.smoke else provenance.RESULTS)
        self.file = folder and folder / f"{provenance.file_name(self.facts['device'])}.csv"
        if self.file and not config.getoption("append"):
            self.file.unlink(missing_ok=True)

    def result(self, case: Case, items: list[pytest.Item]) -> tuple[Outcome, results.Row]:
        """A case's result. The first case of a group has all cases of the group measured that were asked for."""
        if case.group not in self.measured:
            cases = [other for item in items if (other := case_of(item)) and other.group == case.group]
            self.measured[case.group] = self._measure(cases)
        return self.measured[case.group][case]

    def _measure(self, cases: list[Case]) -> dict[Case, tuple[Outcome, results.Row]]:
        group = cases[0].group
        late = "not run: time" if time.monotonic() > self.deadline else ""
        if why := cases[0].status or late:
            outcomes = [Outcome(status=case.status or why) for case in cases]
            rows = [{**results.empty_row(case), "status": o.status} for case, o in zip(cases, outcomes, strict=True)]
        else:
            shapes = smaller(shapes_of(group.model), 32) if self.smoke else shapes_of(group.model)
            limit = 0.0 if self.smoke else self.config.getoption("seconds_per_case")
            setting = Setting(shapes, getattr(torch, group.dtype), group.bookkeeping, DEVICE, limit)
            outcomes = time_contenders([case.contender for case in cases if case.contender], setting, self._say)
            rows = results.rows_of(cases, outcomes, shapes)
        rows = [{**row, **self.facts} for row in rows]
        if self.file:
            results.append(self.file, rows)
        return dict(zip(cases, zip(outcomes, rows, strict=True), strict=True))

    def _say(self, name: str) -> None:
        """Name the contender being made ready, on a terminal: compiling takes a while."""
        plugin: Any = self.config.pluginmanager.get_plugin
        reporter = plugin("terminalreporter")
        if reporter and reporter.isatty:
            with plugin("capturemanager").global_and_fixture_disabled():
                reporter.write(f"[{name}] ")


RUN = pytest.StashKey[BenchmarkRun]()


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """With -v the line of a case ends in its numbers."""
    said = dict(report.user_properties).get("said") if report.when == "call" else None
    return (report.outcome, ".", str(said)) if said and report.passed else None
