"""The benchmarks themselves: that they compare what they say they compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.contenders import CONTENDERS, FLOOR, SCHEDULE, contenders
from benchmarks.shapes import MODELS, smaller

ROOT = Path(__file__).parent.parent


def run_benchmarks(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    # One thread: a fork and join per tensor takes milliseconds where other tests hold the cores.
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    # torchvision's and transformers' own counts; ptb-large: 15,000,000 + 36,024,000 + 15,010,000.
    [("resnet50", 161, 25_557_032), ("ptb-large", 11, 66_034_000), ("bert-large", 391, 335_141_888)],
)
def test_shapes_are_the_models(model: str, tensors: int, parameters: int) -> None:
    shapes = MODELS[model]()
    assert (len(shapes), sum(map(prod, shapes))) == (tensors, parameters)
    assert len(smaller(shapes, 32)) == tensors


def test_smaller_keeps_every_dimension() -> None:
    assert smaller([(64, 3, 7), (10,)], 4) == [(16, 1, 1), (2,)]


def test_a_family_has_a_floor() -> None:
    assert {row.family for row in CONTENDERS} == set(FLOOR)


@pytest.mark.parametrize("family", FLOOR)
def test_contenders_compute_the_same(family: str, device: str) -> None:
    after = {}
    for row in contenders(family, torch.device(device)):
        torch.manual_seed(0)
        params = timing.build([(5, 3), (17,), (1,)], torch.device(device))
        step = row.make(params, SCHEDULE)
        for _ in range(20):
            step()
        after[row.name] = torch.cat([p.detach().flatten() for p in params])
    assert len(after) >= 5
    for name, values in after.items():
        torch.testing.assert_close(
            values, after["reference"], rtol=2e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_rates() -> None:
    rates = timing.rates(20 * 10**9, 0.5, 8 * 10**9, 0.1)
    assert rates == pytest.approx({"gb_per_s": 40.0, "copy_gb_per_s": 80.0, "share_of_copy": 0.5})


def test_device_clock_subtracts_to_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        recorded, waited = 0, 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 250.0 * Event.recorded  # ms
            Event.recorded += 1

        def synchronize(self) -> None:
            Event.waited += 1

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.clock_of(torch.device("cuda"))
    start, end = clock(), clock()
    assert Event.waited == 0  # reading the clock must not hold up the host
    assert end - start == 0.25
    assert Event.waited == 1


def test_every_contender_runs_once_on_every_model(device: str) -> None:
    out = run_benchmarks("--benchmark-disable", "-v")
    for row in contenders("sgd", torch.device(device)):
        for model in MODELS:
            assert out.count(f"test_step[{model}-{row.name}] PASSED") == 1, out


def test_a_measured_case_records_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    out = run_benchmarks("--benchmark-only", "-k", "resnet50 and torch-fused", f"--benchmark-json={path}")
    (case,) = json.loads(path.read_text())["benchmarks"]
    info, median = case["extra_info"], case["stats"]["median"]
    assert case["group"] == "SGD, resnet50"
    assert (info["parameters"], info["tensors"], info["bytes_moved"]) == (25_557_032, 161, 20 * 25_557_032)
    assert info["gb_per_s"] == pytest.approx(20 * 25_557_032 / median / 1e9)
    assert info["share_of_copy"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
    assert info["host_us"] > 0
    assert info["torch"] == torch.__version__
    assert {"device", "triton", "commit"} <= info.keys()
    assert "of a copy" in out
