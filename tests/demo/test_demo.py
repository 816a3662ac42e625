"""The demo: its data, and small runs of the whole program."""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from fused_legw import LEGW
from fused_legw.demo import digits, program, results, training


def run_demo(*argv: object) -> int:
    parser = argparse.ArgumentParser(prog="demo")
    program.add_arguments(parser)
    return program.run(parser.parse_args(["--device", "cpu", *map(str, argv)]))


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that the demo ends with."""
    with pytest.raises(SystemExit) as stopped:
        run_demo(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def trained(task: training.Task, scaling: str, batch_size: int, seed: int) -> results.TrainingRun:
    from tqdm import tqdm

    return training.train(
        task, digits.load_sklearn(), scaling, batch_size, seed, backend="aten", bar=tqdm(disable=True)
    )


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write_idx(file: Path, array: torch.Tensor) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.to(torch.uint8).numpy().tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder like MNIST's: 240 training images of 6x5 pixels, gzipped, and 20 to test on, plain."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, count, ending in ("train", 240, ".gz"), ("t10k", 20, ""):
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", torch.randint(256, (count, 6, 5)))
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", torch.arange(count) % 10)
    return folder


# The program


def test_writes_table_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    assert run_demo("--epochs", 2, "--seeds", 2, "--batch-size", 16, 256, "--output", output) == 0
    runs = rows(output / "runs.csv")
    assert [(run["scaling"], run["batch"], run["seed"]) for run in runs] == [
        (scaling, batch, seed)
        for scaling, batch in [("baseline", "16"), ("legw", "256"), ("linear", "256"), ("sqrt", "256")]
        for seed in "01"
    ]
    peak, warmup = training.DIGITS.recipe.base_lr, training.DIGITS.recipe.base_warmup_epochs
    assert [float(run["peak_lr"]) for run in runs[::2]] == pytest.approx(
        [peak, 4 * peak, 16 * peak, 4 * peak], rel=1e-5
    )
    assert [float(run["warmup_epochs"]) for run in runs[::2]] == [warmup, 16 * warmup, 16 * warmup, 0]
    assert [run["updates"] for run in runs[::2]] == ["128", "8", "8", "8"]
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert all(f" {scaling} |" in printed.out for scaling in ["baseline", *training.SCALINGS])
    assert printed.err == ""  # no progress bar where nobody watches


def test_seeds_reproduce_and_the_loss_falls() -> None:
    task = training.Task(LEGW(0.1, 16, 0.25, batch_size=16, dataset_size=1024, epochs=3), hidden=16)
    first, again, other = (trained(task, "legw", 32, seed) for seed in (0, 0, 1))
    assert first.losses == again.losses and first.accuracy == again.accuracy
    assert first.losses != other.losses
    assert first.losses == sorted(first.losses, reverse=True)
    assert first.accuracy > 20  # one in ten by chance


def test_a_run_that_diverges_is_recorded_and_drawn(tmp_path: Path) -> None:
    task = training.Task(LEGW(1e38, 512, 0, batch_size=512, dataset_size=1024, epochs=3), hidden=8)
    run = trained(task, "baseline", 512, 0)
    assert not math.isfinite(run.losses[-1]) and run.accuracy == 0
    assert results.run_row(run)[-2] in ("nan", "inf")
    calm, late = (replace(run, losses=losses) for losses in ([2.0, 1.0, 0.5], [2.0, 3.0, math.nan]))
    groups = {("legw", 512): [run], ("sqrt", 512): [late, calm]}
    results.plot(tmp_path / "plot.png", groups, [calm], {"legw": "LEGW", "sqrt": "sqrt"})
    assert (tmp_path / "plot.png").is_file()


def test_the_progress_bar_counts_every_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: object) -> None:
            super().__init__(**{**options, "disable": False, "file": sys.stdout})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    run_demo("--epochs", 1, "--batch-size", 1000, "--output", tmp_path)
    assert [(bar.n, bar.total) for bar in bars] == [(64 + 3 * 2, 64 + 3 * 2)]


def test_differences_pair_the_seeds() -> None:
    schedule = training.DIGITS.schedule("baseline", 16, 1024)

    def runs(scaling: str, *accuracies: float) -> list[results.TrainingRun]:
        return [results.TrainingRun(scaling, schedule, seed, a, [1.0], 1.0) for seed, a in enumerate(accuracies)]

    baseline, legw = runs("baseline", 90, 96), runs("legw", 91, 95)
    groups = {("baseline", 16): baseline, ("legw", 512): legw}
    lines = results.summary(groups, baseline).splitlines()
    assert "93.00 ± 4.24" in lines[2] and "+" not in lines[2]
    assert "93.00 ± 2.83" in lines[3] and "+0.00" in lines[3] and "-1.00 to +1.00" in lines[3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds must be a positive integer, got 0"),
        (["--epochs", "-1"], "--epochs must be a positive integer, got -1"),
        (["--batch-size", "2048"], "--batch-size must be 1 to 1024, the training images, got 2048"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--output", __file__], "test_demo.py"),
    ],
)
def test_arguments_that_make_no_sense(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, *argv)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert 'tqdm is not installed: pip install "fused-legw[demo]"' in refusal(capsys)


# The data


def test_the_split_is_fixed_and_disjoint() -> None:
    data, again = digits.load_sklearn(), digits.load_sklearn()
    parts = data.train, data.validation, data.test
    assert [len(part) for part in parts] == [1024, 373, 400]
    assert torch.equal(data.test.images, again.test.images)
    images = torch.cat([part.images for part in parts])
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1
    assert len(images.unique(dim=0)) == 1797


def test_mnist_is_read_and_trained_on(mnist: Path, tmp_path: Path) -> None:
    data = digits.load_mnist(mnist)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [220, 20, 20]
    assert data.train.images.shape[1:] == (6, 5) and 0.9 < data.train.images.max() <= 1
    assert data.test.labels.tolist() == [*range(10)] * 2
    assert run_demo("--data", mnist, "--epochs", 1, "--batch-size", 200, "--output", tmp_path / "out") == 0
    assert rows(tmp_path / "out" / "runs.csv")[1]["updates"] == "2"  # the second of 20 images


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "train-images-idx3-ubyte (or .gz) is missing"),
        (IMAGES, gzip.compress(b"\0\0\x08\x01" + bytes(8)), "must start with 00 00 08 03, got 00 00 08 01"),
        (IMAGES, gzip.compress(b""), "got nothing"),
        (IMAGES, gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 240, 6, 5)), "header says (240, 6, 5)"),
        (IMAGES, gzip.compress(bytes(999))[:-12], "not a whole gzip file"),
        (IMAGES, b"not gzip", "not a whole gzip file"),
        (LABELS, gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 1, 7))), "holds 240 images"),
        (LABELS, gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 240)) + b"\x0a" * 240), "labels must be 0 to 9, got 10"),
    ],
)
def test_malformed_mnist_is_named(
    name: str, content: bytes | None, message: str, mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mnist / name).unlink() if content is None else (mnist / name).write_bytes(content)
    error = refusal(capsys, "--data", mnist)
    assert message in error and name.removesuffix(".gz") in error


def test_test_images_of_another_size_are_refused(mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(mnist / "t10k-images-idx3-ubyte", torch.zeros(20, 7, 5))
    assert "training images are (6, 5), test images (7, 5)" in refusal(capsys, "--data", mnist)
