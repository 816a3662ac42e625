"""The program that runs everything on a GPU: its parts, verdicts and summary. Here it runs other commands."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.least_bytes import FAMILIES
from tests import gpu

PYTHON = [sys.executable, "-c"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the program with these parts, on a machine it takes for one with a GPU: (status, output, folder)."""
    monkeypatch.setattr(gpu, "machine", lambda: "Some GPU, torch 1, triton 2")

    def start(parts: dict[str, list[list[str]]], *argv: str) -> tuple[int, str]:
        made = {name: gpu.Part(f"about {name}", lambda run, own=commands: own) for name, commands in parts.items()}
        monkeypatch.setattr(gpu, "PARTS", made)
        status = gpu.main([*argv, "--out", str(tmp_path / "new/folder")])
        return status, capsys.readouterr().out

    return start


def _says(text: str, status: int = 0) -> list[str]:
    return [*PYTHON, f"import sys; print({text!r}); sys.exit({status})"]


def test_all_parts_run_in_order_whatever_fails(run, tmp_path):
    status, out = run(
        {
            "first": [_says("=== 3 passed, 1 skipped in 2.00s ===")],
            "second": [_says("boom", 3), _says("=== 1 passed in 1.00s ===")],
            "third": [_says("== 2 skipped in 0.10s ==")],
            "fourth": [],
        },
        "--commit",
        "abc123",
    )
    assert status == 1
    head, *verdicts, last = out[out.rindex("\n\n") :].strip().splitlines()
    assert head == "Some GPU, torch 1, triton 2, commit abc123"
    assert [re.sub(r" +\d+ s ", "", line) for line in verdicts] == [
        "PASSED  first 3 passed, 1 skipped in 2.00s",
        "FAILED  second exit status 3; 1 passed in 1.00s",
        "SKIPPED third 2 skipped in 0.10s",
        "SKIPPED fourth not available",
    ]
    assert last == "failed: second"
    folder = tmp_path / "new/folder"
    assert (folder / "summary.txt").read_text() == "\n".join([head, *verdicts, last, ""])
    assert "boom" in (folder / "second.log").read_text() and "    boom" in out


def test_named_parts_alone_and_in_order(run):
    parts = {name: [_says("=== 1 passed in 1.00s ===")] for name in "abc"}
    status, out = run(parts, "--part", "c", "--part", "a")
    assert status == 0
    assert re.findall(r"^PASSED +(\w)", out, re.MULTILINE) == ["a", "c"] * 2  # as they end, and in the summary
    assert out.endswith("none of 2 failed\n")
    with pytest.raises(SystemExit):
        run(parts, "--part", "d")


def test_what_takes_too_long_is_stopped_with_all_it_started(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    status, out = run({"slow": [[*PYTHON, parent]], "next": [_says("=== 1 passed in 1.00s ===")]})
    assert status == 1 and time.monotonic() - start < 3
    assert "stopped after 1 s; " in out and "PASSED  next" in out
    time.sleep(3)
    assert not mark.exists()


def test_parts_see_the_sources_and_no_interpreter(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    code = "import os, fused_legw, legw_kernels, benchmarks; print(os.environ.get('TRITON_INTERPRET'), os.getcwd())"
    _, out = run({"environment": [[*PYTHON, code]]})
    assert f"None {gpu.ROOT}\n" in out


def test_without_a_gpu_it_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytest.importorskip("triton")
    with pytest.raises(SystemExit, match="this needs a CUDA GPU"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_parts_are_listed_and_cover_the_suite(capsys, tmp_path):
    assert gpu.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    suite = [f"tests-{i + 1}" for i in range(gpu.TESTS)]
    bench = [f"bench-{family}" for family in FAMILIES]
    assert listed == [*suite, "codegen", "stress", "replay", "huge", "sanitize", *bench, "report"]
    commands = {name: gpu.PARTS[name].commands(gpu.Run(tmp_path, "abc")) for name in gpu.PARTS}
    dealt = [file for name in suite for (command,) in [commands[name]] for file in command if file.endswith(".py")]
    assert sorted(dealt) == sorted(str(p.relative_to(gpu.ROOT)) for p in (gpu.ROOT / "tests").rglob("test_*.py"))
    named = {word for name in listed for command in commands[name] for word in command if word.endswith(".py")}
    assert all((gpu.ROOT / file).exists() for file in named)


def test_the_sanitizer_watches_every_kernel_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.PARTS["sanitize"].commands(gpu.Run(tmp_path, None)) == []
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    memcheck, racecheck = gpu.PARTS["sanitize"].commands(gpu.Run(tmp_path, None))
    assert "memcheck" in memcheck and "racecheck" in racecheck
    tests = memcheck[memcheck.index(sys.executable) :]
    command = [*tests, "--collect-only", "-q"]
    found = subprocess.run(command, cwd=gpu.ROOT, env=gpu.environment(), capture_output=True, text=True, check=True)
    assert found.stdout.count("test_every_kernel_once") == 18
