"""Where a result comes from: machine, versions, commit. And whether it may be recorded: clean tree, passing tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _output(*command: str) -> str | None:
    """The output of a command. None if the command is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """The commit of the source tree. None where there is no git."""
    return _output("git", "rev-parse", "--short=12", "HEAD")


def changed_files() -> list[str]:
    """Files that differ from the commit. Results do not count: a run in several parts writes them on the way."""
    return (_output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results") or "").splitlines()


def tests_pass() -> bool:
    """Run the tests of what is about to be measured. Their output goes to the terminal."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-x", "-m", "not codegen", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def file_name(name: str) -> str:
    """The name of a device's results file.

    >>> file_name("Intel(R) Xeon(R) Processor, 2 threads")
    'intel-xeon-processor-2-threads'
    """
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def facts(device: torch.device, commit: str) -> dict[str, str]:
    """The columns that are the same in all rows of a run."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    drivers = (_output(*query) or "").splitlines() if device.type == "cuda" else []
    return {
        "device": device_name(device),
        "driver": drivers[0] if drivers else "",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "",
        "commit": commit,
    }
