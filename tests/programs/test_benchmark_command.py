"""`pytest benchmarks/` as people who know pytest-benchmark expect it: it measures, shows, and leaves the tree alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUP = "lars-flat-1e4-float32-plain"  # three contenders that need nothing but torch
ONE = f"benchmarks/test_steps.py::test_step[{GROUP}-ours-aten-eager]"
CSV = "benchmarks/results/machine.csv"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(tree: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *args]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose only test fails, so that no run begins if it is asked; with a recorded file."""
    tree = tmp_path_factory.mktemp("checkout") / "tree"
    for name in ("benchmarks", "fused_legw", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_gate.py").write_text("def test_gate():\n    assert False\n")
    (tree / CSV).parent.mkdir()
    (tree / CSV).write_text("recorded\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        git(tree, *command)
    return tree


def bench(tree: Path, *args: str, status: int = 0, also: Path | None = None) -> str:
    """The output of pytest with some arguments; the tree is as it was, but for what is ignored.

    also: a folder whose modules come before installed ones.
    """
    path = os.pathsep.join(map(str, [*([also] if also else []), tree, tree / "kernels"]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", *args]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert git(tree, "status", "--porcelain") == ""
    assert (tree / CSV).read_text() == "recorded\n"
    return done.stdout + done.stderr


def medians(file: Path) -> dict[str, float]:
    cases = json.loads(file.read_text())["benchmarks"]
    return {case["params"]["contender"]: case["stats"]["median"] for case in cases}


def test_a_plain_run_measures_shows_and_writes_nothing(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    rounds = ["--benchmark-min-rounds=60", "--benchmark-max-time=0.001", "--benchmark-precision=0.1"]
    out = bench(tree, "benchmarks/", "--benchmark-only", "-k", GROUP, f"--benchmark-json={file}", *rounds)
    assert "3 passed" in out and "tests/test_gate.py" not in out
    assert f"benchmark '{GROUP}': 3 tests" in out and "Median" in out and "nothing is recorded" in out
    assert "without effect here: --benchmark-precision=0.1" in out
    assert not (tree / ".benchmarks").exists()
    cases = json.loads(file.read_text())["benchmarks"]
    assert {case["params"]["contender"] for case in cases} == {"ours-aten", "torch-foreach", "reference"}
    assert {case["group"] for case in cases} == {GROUP}
    for case in cases:
        stats = case["stats"]
        assert stats["rounds"] == len(stats["data"]) == 60 and stats["iterations"] == 1
        assert 1e-6 < stats["min"] < stats["median"] < stats["max"] < 10 and stats["stddev"] > 0
        assert len(set(stats["data"])) > 10  # measured one by one
        assert 1e6 * stats["median"] == pytest.approx(float(case["extra_info"]["median_us"]), rel=1e-4)
        assert case["params"]["family"] == "lars" and case["params"]["mode"] == "eager"
        assert case["options"]["timer"] == "measured_rounds" and "0x" not in json.dumps(case)


def test_what_was_saved_is_compared(tree: Path) -> None:
    """The saved time is made a thousandth, so the second run has to be seen as slower."""
    try:
        bench(tree, ONE, "--benchmark-autosave", "--benchmark-max-time=0.02")
        (saved,) = (tree / ".benchmarks").rglob("*.json")
        assert list(medians(saved)) == ["ours-aten"] and medians(saved)["ours-aten"] > 1e-6
        content = json.loads(saved.read_text())
        content["benchmarks"][0]["stats"]["median"] /= 1e3
        saved.write_text(json.dumps(content))
        options = ["--benchmark-columns=median", "--benchmark-group-by=param:family,param:model"]
        out = bench(tree, ONE, "--benchmark-compare", "--benchmark-compare-fail=median:1000%", *options, status=1)
        assert "(NOW)" in out and "(0001_" in out and "benchmark 'family=lars model=flat-1e4': 2 tests" in out
        assert "Performance has regressed" in out
        assert [saved] == list((tree / ".benchmarks").rglob("*.json"))
    finally:
        shutil.rmtree(tree / ".benchmarks", ignore_errors=True)


def test_disabled_every_case_runs_once_and_small(tree: Path, modules: Path) -> None:
    """Plain SGD in all sizes: BERT-large alone would take seconds at its own size. A package that is broken, too."""
    picked = f"sgd and float32 and plain and (ours or reference) or {GROUP} and timm"
    out = bench(tree, "benchmarks/", "-p", "count_steps", "--benchmark-disable", "-k", picked, also=modules)
    steps = [line.split() for line in out.splitlines() if line.startswith("step of")]
    assert len(steps) == int(out.split(" passed")[0].split()[-1]) > 10
    assert all(int(tensors) <= 4 and int(elements) < 10**6 for _, _, tensors, _, _, elements, _ in steps)
    assert "Median" not in out and "1 xfailed" in out


def test_absent_and_broken_packages_do_not_fail_a_run(tree: Path, modules: Path) -> None:
    picked = f"{GROUP} and (timm or ours) or apex and any"
    out = bench(tree, "benchmarks/", "--benchmark-max-time=0.001", "-k", picked, also=modules)
    assert "1 passed" in out and "1 xfailed" in out and "ImportError: broken timm" in out
    assert find_spec("apex") or "not installed" in out


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A timm that cannot be imported, and a plugin that prints a line for every optimizer step."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('broken timm')\n")
    (tmp_path / "count_steps.py").write_text(COUNT_STEPS)
    return tmp_path


COUNT_STEPS = """
from torch.optim.optimizer import register_optimizer_step_pre_hook

seen = []

def note(optimizer, args, kwargs):
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    seen.append(f"step of {len(sizes)} tensors with {sum(sizes)} elements")

def pytest_configure():
    register_optimizer_step_pre_hook(note)

def pytest_terminal_summary(terminalreporter):
    for line in seen:
        terminalreporter.write_line(line)
"""


@pytest.mark.parametrize("option", ["--benchmark-skip", "--collect-only"])
def test_nothing_is_measured_where_nothing_is_asked(tree: Path, option: str) -> None:
    out = bench(tree, "benchmarks/", option, "-q", "-k", "sgd and not compile")
    assert "Median" not in out and " passed" not in out
    assert not (tree / ".benchmarks").exists()


def test_a_profile_is_of_the_step(tree: Path) -> None:
    out = bench(tree, ONE, "--benchmark-cprofile=cumtime", "--benchmark-max-time=0.001")
    assert "cProfile" in out and "optim/base.py" in out


def test_a_recorded_run_asks_the_tests_first(tree: Path) -> None:
    assert "tests fail: nothing is measured" in bench(tree, ONE, "--record", status=4)


def test_a_package_that_is_absent_is_skipped_and_a_stand_in_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something left under a package's name in sys.modules has no spec, which `find_spec` complains about."""
    from benchmarks.peers import Peer

    assert Peer("none", "no_such_package_anywhere", "sgd", "SGD").installed is False
    monkeypatch.setitem(sys.modules, "no_such_package_anywhere", SimpleNamespace(__spec__=None))
    assert Peer("none", "no_such_package_anywhere", "sgd", "SGD").installed is False
