"""A recorded run of the benchmarks as a whole: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import conftest, provenance, results, run
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_command_without_git(tmp_path: Path) -> None:
    """From a copy of the source tree: SGD on ResNet-50, and what this machine leaves out."""
    copy = tmp_path / "tree"
    for name in ("benchmarks", "fused_legw", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "-p", "no:cacheprovider", "--benchmark-only"]
    command += ["--record", "--smoke", "--tests-passed", "--part=sgd"]
    command += ["-k", "(resnet50 and float32-plain) or (gpt and plain)"]
    # One thread: a fork and join per tensor takes milliseconds where other tests hold the cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--commit=0123456789ab", f"--results={tmp_path}", f"--benchmark-json={tmp_path / 'rounds.json'}"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of a copy" in done.stdout
    (file,) = tmp_path.glob("*.csv")
    rows = results.read(file)
    assert {row["commit"] for row in rows} == {"0123456789ab"}
    ran = [row for row in rows if row["status"] == "ok"]
    assert {(row["family"], row["model"], row["tensors"]) for row in ran} >= {("sgd", "resnet50", "161")}
    assert {row["contender"] for row in ran} >= {"ours-aten", "torch-fused", "torch-foreach", "reference"}
    assert {row["status"] for row in rows} <= {"ok", "not run: GPU only"}
    medians = [
        1e6 * case["stats"]["median"] for case in json.loads((tmp_path / "rounds.json").read_text())["benchmarks"]
    ]
    assert sorted(medians) == pytest.approx(sorted(float(row["median_us"]) for row in ran), rel=1e-4)


class Config(dict):
    """pytest's, as far as a run's beginning asks."""

    option = SimpleNamespace(collectonly=False)

    def __init__(self, **options: object) -> None:
        super().__init__(commit=None, allow_dirty=False, tests_passed=False, budget=1.0, smoke=True, append=True)
        self.update({"record": True, "benchmark_disable": False, "benchmark_skip": False, "results": None, **options})
        self.stash = pytest.Stash()

    def getoption(self, name: str, default: object = None) -> object:
        return self.get(name, default)


def item_of(case: Case) -> SimpleNamespace:
    """A case's test, as far as a run asks."""
    return SimpleNamespace(callspec=SimpleNamespace(params=dict(zip(results.KEY, case.key, strict=True))))


def start(**options: object) -> str:
    """Begin a run; the commit that its rows would have."""
    config = Config(**options)
    conftest.pytest_sessionstart(SimpleNamespace(config=config))
    return config.stash[run.RUN].facts["commit"]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "abc")
    monkeypatch.setattr(provenance, "changed_files", list)
    monkeypatch.setattr(provenance, "tests_pass", lambda: False)
    with pytest.raises(pytest.UsageError, match="tests fail"):
        start()
    assert start(tests_passed=True) == "abc"
    monkeypatch.setattr(provenance, "tests_pass", lambda: True)
    assert start() == "abc"
    monkeypatch.setattr(provenance, "changed_files", lambda: [" M fused_legw/sgd.py"])
    with pytest.raises(pytest.UsageError, match=r"differ from the commit.*\n M fused_legw/sgd\.py"):
        start()
    assert start(allow_dirty=True) == "abc-dirty"
    monkeypatch.setattr(provenance, "commit", lambda: None)
    with pytest.raises(pytest.UsageError, match="give --commit"):
        start()
    assert start(commit="def") == "def"
    for option in ("benchmark_disable", "benchmark_skip"):
        with pytest.raises(pytest.UsageError, match=f"--{option.replace('_', '-')}: nothing would be measured"):
            start(**{option: True})
    with pytest.raises(pytest.UsageError, match="--dist: nothing would be measured"):
        start(dist="load")


@pytest.mark.parametrize("option", ["results", "append", "commit", "allow_dirty", "tests_passed"])
def test_a_plain_run_asks_nothing_and_refuses_what_is_about_records(
    monkeypatch: pytest.MonkeyPatch, option: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: None)
    monkeypatch.setattr(provenance, "changed_files", lambda: [" M fused_legw/sgd.py"])
    monkeypatch.setattr(provenance, "tests_pass", lambda: False)
    assert start(record=False, append=False, smoke=False) == ""
    with pytest.raises(pytest.UsageError, match=f"--{option.replace('_', '-')} is about recorded runs"):
        start(**{"record": False, "append": False, option: tmp_path})


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_changed_files_are_seen_but_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
    (tmp_path / "code.py").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "machine.csv").write_text("")
    assert len(provenance.commit() or "") == 12 and provenance.changed_files() == []
    (tmp_path / "code.py").write_text("changed")
    (tmp_path / "new.py").write_text("")
    assert [line.split()[-1] for line in provenance.changed_files()] == ["code.py", "new.py"]


def test_tests_run_before_a_run_and_their_failure_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = codegen\n")
    (tmp_path / "tests").mkdir()
    for text, passes in (("pass", True), ("assert False", False)):
        (tmp_path / "tests" / "test_it.py").write_text(f"def test_it():\n    {text}\n")
        assert provenance.tests_pass() is passes


def test_after_the_budget_nothing_else_is_begun(tmp_path: Path) -> None:
    late = run.BenchmarkRun(Config(results=tmp_path, budget=-1.0), "abc", time.monotonic())
    case = next(case for case in run.CASES.values() if case.contender)
    outcome, row = late.result(case, [item_of(case)])
    assert (outcome.status, row["status"]) == ("not run: time", "not run: time")
    (file,) = tmp_path.glob("*.csv")
    assert [r["contender"] for r in results.read(file)] == [case.name]


def test_the_recorded_file_is_replaced_no_sooner_than_there_are_rows(tmp_path: Path) -> None:
    late = run.BenchmarkRun(Config(results=tmp_path, append=False, budget=-1.0), "abc", time.monotonic())
    file = tmp_path / f"{provenance.file_name(late.facts['device'])}.csv"
    file.write_text("the last run's")
    late = run.BenchmarkRun(Config(results=tmp_path, append=False, budget=-1.0), "abc", time.monotonic())
    assert file.read_text() == "the last run's"
    first, *_, last = [case for case in run.CASES.values() if case.contender]
    for case in (first, last):
        late.result(case, [item_of(case)])
    assert [row["status"] for row in results.read(file)] == ["not run: time"] * 2
