"""Everything that only a GPU can show, in parts of under nine minutes, each with a verdict of its own:

    python -m tests.gpu --commit COMMIT --out FOLDER                      all parts; `make gpu` is this
    python -m tests.gpu --commit COMMIT --out FOLDER --part stress        one; can be given again
    python -m tests.gpu --list

Needs a CUDA GPU, and a Python with torch, triton, numpy, pytest and pytest-benchmark; nothing has to be installed, and
the source tree needs no git. A failing part does not stop the others. FOLDER gets a log of each part and the summary.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.deal import files

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 530.0  # seconds, for a part
FAMILIES = ("sgd", "adam", "adamw", "lars", "lamb")
TESTS = 3  # parts that the suite is dealt to
PASSED, FAILED, SKIPPED = "PASSED", "FAILED", "SKIPPED"

Command = list[str]


@dataclass(frozen=True)
class Run:
    """What a part's commands are made of."""

    out: Path
    commit: str | None


@dataclass(frozen=True)
class Part:
    """Some commands, of which all are run; none: not available here, and `about` says what is missing."""

    about: str
    commands: Callable[[Run], list[Command]]


@dataclass(frozen=True)
class Verdict:
    part: str
    word: str
    seconds: float
    why: str

    def __str__(self) -> str:
        return f"{self.word:8}{self.part:12}{self.seconds:5.0f} s  {self.why}"


def _pytest(*args: str) -> Command:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *args]


def _suite(number: int) -> Callable[[Run], list[Command]]:
    """The suite's files, dealt to `TESTS` parts."""
    own = files(number, TESTS)
    return lambda run: [_pytest("-m", "not gpu and not codegen", *own)]


def _sanitize(run: Run) -> list[Command]:
    """The sanitizer's own bookkeeping needs every tensor to be an allocation, which torch's cache would hide."""
    if shutil.which("compute-sanitizer") is None:
        return []
    tiny = _pytest("tests/kernels/test_stress.py", "-k", "every_kernel")
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    tools = ("memcheck", "racecheck")
    return [[*uncached, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tiny] for tool in tools]


def _bench(family: str) -> Callable[[Run], list[Command]]:
    """The one place that says how benchmarks are run. Whether the tests passed is the other parts' to say."""
    options = ["-v", "--record", "--benchmark-only", "--benchmark-quiet", "--benchmark-max-time=0.5"]
    options += ["--tests-passed", "--append", "--part", family]
    return lambda run: [
        _pytest("benchmarks", *options, "--results", str(run.out), *(["--commit", run.commit] if run.commit else []))
    ]


def _report(run: Run) -> list[Command]:
    """The one place that says how the report is made of what `bench` left."""
    return [[sys.executable, "-m", "benchmarks.report", str(run.out)]]


PARTS = {
    **{
        f"tests-{i + 1}": Part(f"the suite without the interpreter, {i + 1} of {TESTS}", _suite(i))
        for i in range(TESTS)
    },
    "codegen": Part(
        "the kernels compiled ahead of time", lambda run: [_pytest("-m", "codegen", "tests/kernels/test_codegen.py")]
    ),
    "stress": Part(
        "what relies on order inside a launch, under load", lambda run: [_pytest("tests/kernels/test_stress.py")]
    ),
    "replay": Part(
        "graph replays against eager steps",
        lambda run: [_pytest("tests/backends/test_replay.py", "tests/backends/test_capture.py")],
    ),
    "huge": Part("buffers beyond 2^31 elements", lambda run: [_pytest("tests/kernels/test_huge.py")]),
    "sanitize": Part("every kernel on small tensors under compute-sanitizer", _sanitize),
    **{f"bench-{family}": Part(f"the benchmarks of {family}", _bench(family)) for family in FAMILIES},
    "report": Part("the report of the benchmarks", _report),
}


def environment() -> dict[str, str]:
    """Sources by path, nothing interpreted; subprocesses of a test find them too."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths)}


def execute(command: Command, log: Path, limit: float) -> int | None:
    """The exit status, or None where it took longer; what it says is added to the log."""
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also what it started, and also when this program is interrupted
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_part(name: str, run: Run) -> Verdict:
    log, start = run.out / f"{name}.log", time.monotonic()
    log.write_text("")
    commands = PARTS[name].commands(run)
    if not commands:
        return Verdict(name, SKIPPED, 0, "not available")
    broken = []
    for command in commands:
        status = execute(command, log, LIMIT - (time.monotonic() - start))
        if status != 0:
            broken.append(f"exit status {status}" if status is not None else f"stopped after {LIMIT:.0f} s")
    last = _last_line(log)
    word = FAILED if broken else SKIPPED if re.match(r"\d+ skipped", last) else PASSED
    return Verdict(name, word, time.monotonic() - start, "; ".join([*broken, last]))


def _last_line(log: Path) -> str:
    """Of a pytest run its counts."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _show(verdict: Verdict, run: Run) -> None:
    """The verdict, and the end of the log where that is needed."""
    print(verdict, flush=True)
    if verdict.word == FAILED:
        lines = (run.out / f"{verdict.part}.log").read_text(errors="replace").splitlines()
        print(*(f"    {line}" for line in lines[-40:]), sep="\n", flush=True)


def machine() -> str:
    """Which GPU and which versions; stops where there is no GPU."""
    try:
        import torch
        import triton
    except ImportError as error:
        sys.exit(f"{sys.executable} has no {error.name}: give a Python that has torch and triton, make gpu PYTHON=...")
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA GPU, and torch sees none here; without one `make test` runs everything that can")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; can be given again")
    parser.add_argument("--commit", help="the commit that is tested, where the source tree has no git")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of logs and results (out/gpu)")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.list:
        print(*(f"{name:12}{part.about}" for name, part in PARTS.items()), sep="\n")
        return 0
    head = f"{machine()}, commit {args.commit or 'not given'}"
    run = Run(args.out.resolve(), args.commit)
    run.out.mkdir(parents=True, exist_ok=True)
    print(head, flush=True)
    verdicts = []
    for name in PARTS:  # in this order, however they were asked for
        if args.part is None or name in args.part:
            verdicts.append(run_part(name, run))
            _show(verdicts[-1], run)
    failed = [verdict.part for verdict in verdicts if verdict.word == FAILED]
    last = f"failed: {', '.join(failed)}" if failed else f"none of {len(verdicts)} failed"
    summary = "\n".join(["", head, *map(str, verdicts), last])
    (run.out / "summary.txt").write_text(summary.lstrip() + "\n")
    print(summary)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
