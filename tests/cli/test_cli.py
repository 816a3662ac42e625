"""The command line: what it prints, its exit status, and one line for everything that makes no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from fused_legw import LEGW, SGD, Polynomial, __version__
from fused_legw.backends import select
from fused_legw.cli.main import main
from fused_legw.verification import selfcheck

RECIPE = [
    *("--base-lr", "4", "--base-batch-size", "512", "--base-warmup-epochs", "0.15625"),
    *("--dataset-size", "1281167", "--epochs", "90", "--batch-size", "512"),
]
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _version(module: types.ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def refused(capsys, *argv: str) -> str:
    """The message of arguments that make no sense: exit status 2, one line on stderr, nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("fused-legw: error: ") and err.count("\n") == 1
    return err.removeprefix("fused-legw: error: ").rstrip()


# plan


def test_plan_prints_the_table_of_the_paper(capsys):
    batches = [512 * 2**i for i in range(7)]
    assert main(["plan", *RECIPE[:-1], *map(str, batches)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "total updates" in header and header.endswith("last LR")
    cells = [row.split() for row in rows]
    assert [int(row[0]) for row in cells] == batches
    assert [float(row[2]) for row in cells] == pytest.approx([2 ** (2 + i / 2) for i in range(7)], rel=1e-5)
    assert [float(row[3]) for row in cells] == [0.15625 * 2**i for i in range(7)]
    assert {row[4] for row in cells} == {"390.98"}
    assert [cells[0][5], cells[0][6]] == ["2502.28", "225205.14"]


def test_plan_says_what_does_not_fit(capsys):
    assert main(["plan", *RECIPE[:-1], "32768", "--decay", "multistep", "--milestones", "5", "30", "95"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "batch 32768: milestones [5.0] fall inside the warm-up of 10 epochs: they count from its end",
        "batch 32768: milestones [95.0] are never reached in 90 epochs",
    ]
    assert main(["plan", *RECIPE[:-1], "2000000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "batch 2000000: larger than the data set of 1281167: less than one update an epoch",
        "batch 2000000: 90 epochs end inside the warm-up of 610.352: the peak is not reached",
    ]


def test_plan_marks_batches_past_the_noise_scale(capsys, tmp_path):
    plot = tmp_path / "plan.png"
    arguments = ["plan", *RECIPE, "8192", "--noise-scale", "4096"]
    assert main([*arguments, "--plot", str(plot)]) == 0
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert header.endswith("S/S_min  E/E_min")
    assert [row.split()[-2:] for row in rows] == [["9", "1.12"], ["1.5", "3"]]
    assert note == (
        "batch 8192: past the noise scale of 4096: 3 times the fewest samples, for 1.5 times the fewest updates"
    )
    assert plot.stat().st_size > 10_000
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(plan["relative_updates"], plan["relative_samples"]) for plan in found["plans"]] == [(9, 1.125), (1.5, 3)]
    for wrong in "0", "-4", "nan":
        message = refused(capsys, "plan", *RECIPE, "--noise-scale", wrong)
        assert message == f"--noise-scale must be a finite positive number, got {float(wrong)}"


@pytest.mark.parametrize("name", ["", "plot", "."])
def test_a_plot_needs_a_name_that_says_its_format(capsys, name):
    message = refused(capsys, "plan", *RECIPE[:-1], "512", "--plot", name)
    assert message == f"--plot must be a file name that ends in .png, .pdf, .svg, ..., got {name!r}"


def test_plan_as_json(capsys):
    assert main(["plan", *RECIPE, "32768", "--decay", "polynomial", "--power", "2", "--json"]) == 0
    _, plan = json.loads(capsys.readouterr().out)["plans"]
    schedule = LEGW.from_dict(plan["schedule"])
    assert schedule == LEGW(
        4, 512, 0.15625, batch_size=32768, dataset_size=1_281_167, epochs=90, decay=Polynomial(power=2)
    )
    assert (plan["peak_lr"], plan["warmup_epochs"], plan["scale"]) == (32, 10, 64)
    assert plan["total_steps"] == schedule.total_steps and plan["warmup_steps"] == schedule.warmup_steps


@pytest.mark.parametrize(
    "options",
    [
        "constant",
        "multistep --milestones",
        "multistep --milestones 30 60 80 --factor 0.1",
        "exponential --rate 0.94 --start-epoch 10 --every-epochs 2.5 --no-staircase",
        "polynomial --power 2 --end-lr 0.001 --span whole",
        "cosine --end-lr 0.001",
        "cosine --scaling linear",
    ],
)
def test_plan_takes_every_decay(capsys, options):
    assert main(["plan", *RECIPE, "--decay", *options.split(), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["schedule"]["decay"]["name"].lower() == options.split()[0]


def test_plan_without_epochs_has_no_total(capsys):
    argv = [word for word in RECIPE if word not in ("--epochs", "90")]
    assert main(["plan", *argv]) == 0
    assert capsys.readouterr().out.split()[-1] == "-"


def test_plan_draws_all_batches(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert main(["plan", *RECIPE, "4096", "--decay", "cosine", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--base-lr nan", "--base-lr must be a finite positive number, got nan"),
        ("--base-lr -1", "--base-lr must be a finite positive number, got -1.0"),
        ("--base-lr x", "argument --base-lr: invalid float value: 'x'"),
        ("--batch-size 0", "--batch-size must be a positive integer, got 0"),
        ("--batch-size 1e3", "argument --batch-size: invalid int value: '1e3'"),
        ("--dataset-size -5", "--dataset-size must be a positive integer, got -5"),
        ("--epochs inf", "--epochs must be a finite positive number, got inf"),
        ("--scaling log", "argument --scaling: invalid choice: 'log'"),
        ("--decay step", "argument --decay: invalid choice: 'step'"),
        ("--power 2", "--power 2.0 does not belong to --decay constant"),
        ("--decay cosine --factor 0.1", "--factor 0.1 does not belong to --decay cosine"),
        ("--decay multistep --milestones 3 --no-staircase", "--staircase False does not belong to --decay multistep"),
        ("--decay multistep", "--milestones is required for --decay multistep"),
        ("--decay exponential --rate 0.5", "--start-epoch is required for --decay exponential"),
        ("--decay multistep --milestones 3 2", "--milestones must be increasing, got (3.0, 2.0)"),
        ("--decay polynomial --power -1", "--power must be a finite positive number, got -1.0"),
        ("--decay cosine --end-lr 5", "--end-lr must be at most the peak LR 4.0, got 5.0 (--batch-size 512)"),
        ("--decay polynomial --span half", "argument --span: invalid choice: 'half'"),
        ("--plot /no/such/folder/plan.png", "--plot /no/such/folder/plan.png cannot be written: "),
        ("--plot plan.nonsense", "--plot plan.nonsense cannot be written: "),
        ("--base-l 3", "unrecognized arguments: --base-l 3"),
    ],
)
def test_plan_names_what_makes_no_sense(capsys, options, message):
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    assert refused(capsys, "plan", *RECIPE, *options.split()).startswith(message)


def test_plan_names_the_batch_whose_run_ends_inside_its_warmup(capsys):
    message = refused(capsys, "plan", *RECIPE, "65536", "--epochs", "9", "--decay", "cosine")
    assert message.startswith("--epochs=9.0 ends the run ") and "(20 epochs)" in message
    assert message.endswith("(--batch-size 65536)")


def test_plan_says_what_is_missing(capsys):
    assert "--base-lr, --base-batch-size" in refused(capsys, "plan")


# verify


def test_verify_here(capsys):
    assert main(["verify", "--steps", "3", "--backend", "aten", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True and found["notes"] == []
    assert {(r["case"], r["dtype"]) for r in found["results"]} == {
        (case, dtype) for case in selfcheck.CASES for dtype in selfcheck.DTYPES
    }
    assert all(r["steps_applied"] == 3 and r["backend"] == "aten" and len(r["tensors"]) > 6 for r in found["results"])


def test_verify_prints_a_line_for_each_result(capsys, triton_device):
    assert main(["verify", "--steps", "2", "--case", "SGD", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["SGD", "aten"], ["SGD", "triton"]]
    assert lines[-1] == "2 of 2 within tolerance of the float64 reference"


def test_verify_spreads_every_decay_over_the_groups():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in selfcheck.SMALL_SHAPES]
    schedules = [group["lr"] for group in selfcheck._groups(params, 0.1, 200)]
    kinds = {schedule.constants.kind for schedule in schedules}
    assert kinds == {3, 4, 5, 6, 7, 8}
    assert all(0 < s.warmup_steps < s.total_steps < 200 and s.warmup_steps % 1 for s in schedules)
    for shapes in (selfcheck.SHAPES, selfcheck.SMALL_SHAPES):  # a tensor that is not empty for each of them
        assert len(shapes) >= len(schedules) and all(0 not in shape for shape in shapes[: len(schedules)])


def test_verify_runs_the_interpreter_where_there_is_no_gpu():
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.4")
    environment = {name: value for name, value in HERE.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "fused_legw", "verify", "--steps", "3", "--dtype", "float32", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(r["backend"], r["interpreted"]) for r in found["results"]} == {("aten", False), ("triton", True)}
    assert len(found["results"]) == 2 * len(selfcheck.CASES)
    assert "interpreter" in found["notes"][0]


def test_verify_without_triton_says_so_and_passes(capsys, monkeypatch):
    monkeypatch.setattr(select, "has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "--steps", "2", "--dtype", "float64"]) == 0
    assert "Only the ATen backend was checked: triton is not installed." in capsys.readouterr().out
    assert refused(capsys, "verify", "--backend", "triton").startswith("--backend triton cannot run: triton is not")


class TooFast(SGD):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].data.mul_(1 + 1e-4)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_verify_fails_past_tolerance(capsys, monkeypatch, options):
    monkeypatch.setattr(selfcheck, "CASES", {"TooFast": (TooFast, 0.05, {}), **selfcheck.CASES})
    argv = ["verify", "--steps", "3", "--backend", "aten", "--dtype", "float32", "--case", "TooFast", "SGD", *options]
    assert main(argv) == 1
    out = capsys.readouterr().out
    if options:
        assert json.loads(out)["passed"] is False
    else:
        assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["FAILED", "ok"]


def test_verify_names_what_makes_no_sense(capsys):
    assert refused(capsys, "verify", "--steps", "0") == "--steps must be a positive integer, got 0"
    assert refused(capsys, "verify", "--steps", "x") == "argument --steps: invalid int value: 'x'"
    assert "invalid choice: 'int8'" in refused(capsys, "verify", "--dtype", "int8")
    assert "invalid choice: 'cuda'" in refused(capsys, "verify", "--backend", "cuda")
    assert "invalid choice: 'Muon'" in refused(capsys, "verify", "--case", "Muon")


# info, demo, and the whole


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fused-legw", __version__] and lines[1].split() == ["torch", torch.__version__]
    assert lines[4].split() == ["interpreter", "on" if select.interpreted() else "off"]
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    backend, why = select.explain_backend(torch.device("cpu"))
    assert found["devices"][0].items() >= {"device": "cpu", "backend": backend, "why": why}.items()
    assert found["interpreter"] is select.interpreted() and found["versions"]["fused-legw"] == __version__
    assert refused(capsys, "info", "--steps", "3") == "unrecognized arguments: --steps 3"


def test_info_without_triton(capsys, monkeypatch):
    monkeypatch.setattr(select, "has_triton", lambda: False)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "triton      absent" in out and "triton is not installed" in out


def test_demo_is_mounted(monkeypatch):
    demo = types.ModuleType("fused_legw.demo.program")
    demo.add_arguments = lambda parser: parser.add_argument("--epochs", type=int)
    demo.run = lambda args: args.epochs
    monkeypatch.setitem(sys.modules, "fused_legw.demo.program", demo)
    assert main(["demo", "--epochs", "7"]) == 7


def test_only_demo_needs_the_demo(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_legw.demo.program", None)
    assert main(["plan", *RECIPE]) == 0
    capsys.readouterr()
    assert "pip install 'fused-legw[demo]'" in refused(capsys, "demo")


def test_help_version_and_nonsense(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("plan", "verify", "info", "demo"))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fused-legw {__version__}\n"
    assert "invalid choice: 'train'" in refused(capsys, "train")


def test_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(selfcheck, "check", interrupted)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == "fused-legw: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m fused_legw plan {' '.join(RECIPE)} --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=HERE, capture_output=True, text=True)
    assert done.returncode == 141 and done.stderr == ""
