"""Rows of results: worked out from measurements, written to CSV one group at a time, read back for the report."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .cases import Case
from .least_bytes import bytes_per_parameter
from .rounds import Outcome

Row = dict[str, str]

KEY = ("family", "model", "dtype", "bookkeeping", "contender", "mode")
COLUMNS = (
    *KEY,
    *("status", "tensors", "parameters", "rounds", "median_us", "p20_us", "p80_us", "ratio_to_best_torch"),
    *("launches", "bytes", "gb_per_s", "copy_gb_per_s", "share_of_copy", "host_us"),
    *("device", "driver", "torch", "triton", "commit", "error"),
)


def rates(bytes_moved: int, step_seconds: float, copy_bytes: int, copy_seconds: float) -> dict[str, float]:
    """GB/s of a step and of a copy (1 GB = 1e9 bytes), and the first as a share of the second."""
    step_rate, copy_rate = bytes_moved / step_seconds / 1e9, copy_bytes / copy_seconds / 1e9
    return {"gb_per_s": step_rate, "copy_gb_per_s": copy_rate, "share_of_copy": step_rate / copy_rate}


def rows_of(cases: Sequence[Case], outcomes: Sequence[Outcome], shapes: Sequence[tuple[int, ...]]) -> list[Row]:
    """The rows of one group. The column `bytes` has the least that a step can move, not what a contender moved."""
    elements = sum(map(math.prod, shapes))
    medians = [float(np.median(o.times)) if o.status == "ok" else math.inf for o in outcomes]
    torches = [m for case, m in zip(cases, medians, strict=True) if _is_torch(case)]
    best = min(torches, default=math.inf)
    rows = []
    for case, outcome, middle in zip(cases, outcomes, medians, strict=True):
        row = {**empty_row(case), "status": outcome.status, "error": outcome.error}
        row.update(tensors=f"{len(shapes)}", parameters=f"{elements}")
        if outcome.status == "ok":
            moved = elements * bytes_per_parameter(case.group.family, case.group.dtype, case.group.bookkeeping)
            p20, p80 = np.percentile(outcome.times, [20, 80])
            measured = {
                "median_us": 1e6 * middle,
                "p20_us": 1e6 * p20,
                "p80_us": 1e6 * p80,
                "host_us": None if outcome.host is None else 1e6 * outcome.host,
                "ratio_to_best_torch": middle / best if best < math.inf else None,
                **rates(moved, middle, outcome.copy_bytes, float(np.median(outcome.copies))),
            }
            row.update({name: "" if value is None else f"{value:.5g}" for name, value in measured.items()})
            row.update(rounds=f"{len(outcome.times)}", bytes=f"{moved}")
            row["launches"] = "" if outcome.launches is None else f"{outcome.launches}"
        rows.append(row)
    return rows


def _is_torch(case: Case) -> bool:
    return case.name.startswith("torch-") and case.contender is not None and case.contender.peer is None


def empty_row(case: Case) -> Row:
    """A row with nothing measured."""
    return {**dict.fromkeys(COLUMNS, ""), **dict(zip(KEY, case.key, strict=True)), "status": case.status}


def append(file: Path, rows: Sequence[Row]) -> None:
    """Add rows, and the header if the file is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(file: Path) -> list[Row]:
    """The rows of a file. A case that was measured again has its last row only."""
    with file.open(newline="") as opened:
        rows = {tuple(row[name] for name in KEY): row for row in csv.DictReader(opened)}
    return list(rows.values())
