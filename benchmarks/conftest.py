"""Where the benchmarks run, what is recorded about it, and the table printed after them."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
RESULTS = pytest.StashKey[list[Any]]()


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str:
    """The commit measured, "-dirty" after it if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@pytest.fixture(scope="session")
def facts() -> dict[str, str | None]:
    """What a result is only comparable within."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {"device": device_name(), "torch": torch.__version__, "triton": triton, "commit": commit()}


@pytest.fixture(autouse=True)
def _record(request: pytest.FixtureRequest, facts: dict[str, str | None], benchmark: Any) -> Iterator[None]:
    """Adds the facts to a case's extra_info, keeps it for the table, and frees its tensors before the next."""
    benchmark.extra_info.update(facts)
    yield
    if benchmark.stats:
        request.config.stash.setdefault(RESULTS, []).append(benchmark.stats)
        # Schedulers and optimizers refer to each other: without this the next case would not find its memory.
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A table per model: compare within one, not between them."""
    recorded: list[Any] = config.stash.get(RESULTS, [])
    for group, results in groupby(recorded, key=lambda result: result.group):
        terminalreporter.section(f"{group}, {device_name()}")
        heads = ("median ms", "min ms", "GB/s", "copy GB/s", "of a copy", "host us")
        terminalreporter.line(" " * 20 + "".join(f"{head:>12}" for head in heads))
        for result in results:
            info = result.extra_info
            times = f"{1e3 * result.stats.median:12.3f}{1e3 * result.stats.min:12.3f}"
            rates = f"{info['gb_per_s']:12.1f}{info['copy_gb_per_s']:12.1f}{info['share_of_copy']:12.0%}"
            terminalreporter.line(f"{result.params['contender'].name:20}{times}{rates}{info['host_us']:12.0f}")
