"""Figures of the README and the site are those that are recorded."""

from __future__ import annotations

import csv
import re

import pytest

from tests.support.pages import ROOT, tables

APPLICATIONS = {  # rows of the pages, and of examples/RESULTS.md
    "MNIST-LSTM": "MNIST-LSTM (scikit-learn's digits)",
    "MNIST-1D": "MNIST-LSTM (MNIST-1D)",
    "PTB-small": "PTB-small (King James Version)",
    "PTB-large": "PTB-large (King James Version)",
    "GNMT": "GNMT (English to French number names)",
    "ResNet": "ResNet (scikit-learn's digits)",
}
FAMILIES = {"SGD": "sgd", "SGD with momentum": "sgd", "Adam": "adam", "AdamW": "adamw", "LARS": "lars", "LAMB": "lamb"}


def _recorded(application: str) -> dict[str, str]:
    """A row of the table of all applications, and where LEGW holds to."""
    together, holds = tables(ROOT / "examples/RESULTS.md")[:2]
    name = APPLICATIONS[application]
    found = [row for table in (together, holds) for row in table if row["application"] == name]
    return {**found[0], **found[1]}


def _same(shown: str, recorded: str) -> bool:
    """Whether a number is the recorded one, to as many places as are shown."""
    places = len(shown.partition(".")[2])
    return shown == f"{float(recorded):.{places}f}"


@pytest.mark.parametrize("page", ["README.md", "docs/results/applications.md"])
def test_results_are_the_recorded_ones(page: str) -> None:
    rows = next(table for table in tables(ROOT / page) if "updates left" in table[0])
    for row in rows:
        (name,) = (name for name in APPLICATIONS if name in row[""])
        recorded = _recorded(name)
        after = next(value for key, value in row.items() if key.startswith("LEGW"))
        assert _same(row["baseline"].split()[0], recorded["baseline"].split()[1])
        assert _same(after.split()[0], recorded["LEGW there"].split()[0])
        assert re.search(r"×\d+", after)[0] in recorded["largest batch"]
        assert row["updates left"].split()[0] == recorded["updates left"]
        to = row.get("holds", row.get("LEGW holds to", ""))
        assert re.search(r"×\d+", to)[0] == recorded["LEGW"].split()[0]
        if "faster" in row:
            assert _same(row["faster"].strip("×"), recorded["faster"].strip("×"))


def _medians() -> dict[tuple[str, str], float]:
    """Milliseconds of a plain float32 step of ResNet-50, by family and contender."""
    (file,) = (ROOT / "benchmarks/results").glob("intel-xeon-processor-2-threads.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["status"] == "ok" and row["model"] == "resnet50"]
    plain = [row for row in rows if (row["dtype"], row["bookkeeping"]) == ("float32", "plain")]
    return {(row["family"], row["contender"]): float(row["median_us"]) / 1000 for row in plain}


def _rounded(*milliseconds: float) -> object:
    return pytest.approx(list(milliseconds), abs=0.0501, rel=0)


def test_times_of_the_readme_are_the_recorded_ones() -> None:
    ours, torchs = next(table for table in tables(ROOT / "README.md") if "LAMB" in table[0])
    medians = _medians()
    for column in ("SGD", "AdamW", "LARS", "LAMB"):
        family = FAMILIES[column]
        fastest = min(value for (other, name), value in medians.items() if other == family and "torch-" in name)
        assert [float(ours[column]), float(torchs[column])] == _rounded(medians[family, "ours-aten"], fastest)


def test_times_of_the_site_are_the_recorded_ones() -> None:
    contenders = {
        "ours (ATen)": "ours-aten",
        "torch fused": "torch-fused",
        "torch foreach": "torch-foreach",
        "torch for-loop": "torch-forloop",
    }
    medians = _medians()
    for name, *cells in (list(row.values()) for row in tables(ROOT / "docs/results/benchmarks.md")[0]):
        for cell, contender in zip(cells, contenders.values(), strict=True):
            assert cell == "" or [float(cell)] == _rounded(medians[FAMILIES[name], contender])
