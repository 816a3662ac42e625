"""The options of a run, what a recorded run refuses, and what pytest prints."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from . import provenance
from .least_bytes import FAMILIES
from .run import BUDGET, DEVICE, RUN, BenchmarkRun, case_of

# Options about recorded runs alone, by their names in Python.
OF_RECORDS = ("results", "append", "commit", "allow_dirty", "tests_passed")
# pytest-benchmark's about how it times a function itself. Here a case is timed in turns with the others of its group.
NOT_USED = tuple(f"--benchmark-{name}" for name in ("timer", "min-time", "precision", "confidence", "cal", "warmup"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-legw benchmarks")
    add = group.addoption
    add("--part", action="append", choices=FAMILIES, help="only this family; can be given again")
    add("--smoke", action="store_true", help="small tensors, to try the suite itself; its times say nothing")
    add("--budget", type=float, help=f"seconds after which no other group is begun (none; {BUDGET:.0f} with --record)")
    add("--record", action="store_true", help="run the tests, refuse a dirty tree, write a CSV file: `make bench`")
    add("--results", type=Path, help="with --record: folder of the CSV file (benchmarks/results)")
    add("--append", action="store_true", help="with --record: add to the CSV file instead of starting it anew")
    add("--commit", help="with --record: the commit measured, where the source tree has no git")
    add("--allow-dirty", action="store_true", help="with --record: measure files that differ from the commit")
    add("--tests-passed", action="store_true", help="with --record: do not run the tests first: they have passed")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only a recorded run asks anything of the source tree."""
    began, config = time.monotonic(), session.config
    if config.option.collectonly:
        return
    if not config.getoption("record"):
        for name in OF_RECORDS:
            if config.getoption(name):
                raise pytest.UsageError(f"--{name.replace('_', '-')} is about recorded runs: give --record too")
    commit = _recorded_commit(config) if config.getoption("record") else None
    config.stash[RUN] = BenchmarkRun(config, commit, began)


def _recorded_commit(config: pytest.Config) -> str:
    """Refuse before anything is measured. Every recorded row must belong to a commit that can be looked up."""
    idle = [name for name in ("benchmark_disable", "benchmark_skip") if config.getoption(name)]
    if config.getoption("dist", "no") != "no":
        idle.append("dist")
    if idle:
        raise pytest.UsageError(f"--record with --{idle[0].replace('_', '-')}: nothing would be measured")
    commit = config.getoption("commit") or provenance.commit()
    dirty = [] if config.getoption("commit") else provenance.changed_files()
    if commit is None:
        raise pytest.UsageError("no commit is known here: give --commit")
    if dirty and not config.getoption("allow_dirty"):
        raise pytest.UsageError(f"files differ from the commit: commit them or give --allow-dirty\n{_listed(dirty)}")
    if not config.getoption("tests_passed") and not provenance.tests_pass():
        raise pytest.UsageError("tests fail: nothing is measured")
    return commit + ("-dirty" if dirty else "")


def _listed(lines: list[str]) -> str:
    return "\n".join(lines[:10] + ["..."] * (len(lines) > 10))


def pytest_report_header(config: pytest.Config) -> list[str]:
    what = "recorded" if config.getoption("record") else "nothing is recorded (`make bench` records)"
    unused = [arg for arg in map(str, config.invocation_params.args) if arg.startswith(NOT_USED)]
    return [f"fused-legw benchmarks: {DEVICE}, {what}", *(f"without effect here: {arg}" for arg in unused)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parts = config.getoption("part")
    out = [item for item in items if parts and (case := case_of(item)) and case.group.family not in parts]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder that pytest-benchmark makes also where nothing is saved. One with files stays."""
    with suppress(OSError):
        (config.invocation_params.dir / ".benchmarks").rmdir()


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """With -v the line of a case ends in its numbers."""
    said = dict(report.user_properties).get("said") if report.when == "call" else None
    return (report.outcome, ".", str(said)) if said and report.passed else None
