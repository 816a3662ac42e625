"""Tables and plots of recorded results: `python -m benchmarks.report [FOLDER]` writes them beside each CSV file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from . import results
from .cases import MEASURED_DTYPES
from .full_step import BOOKKEEPING
from .least_bytes import FAMILIES
from .provenance import RESULTS
from .results import Row

HEAD = (
    *("contender", "mode", "median µs", "p20", "p80", "of the best torch", "GB/s", "of a copy", "host µs"),
    *("launches", "status"),
)
GROUP = ("family", "model", "dtype", "bookkeeping")


def main(folder: Path = RESULTS) -> int:
    """A table, and plots where there is matplotlib, for every CSV file of a folder."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        print(f"no results in {folder}: `make bench` writes them", file=sys.stderr)
        return 1
    for file in files:
        rows = results.read(file)
        images = _plots(rows, file)
        page = file.with_suffix(".md")
        page.write_text(markdown(rows, [image.name for image in images]))
        print(*map(str, (page, *images)), sep="\n")
    return 0


def _plots(rows: Sequence[Row], file: Path) -> list[Path]:
    try:
        from .plots import share_of_copy, time_against_parameters
    except ImportError:
        print("matplotlib is not installed: the tables are written, the plots are not", file=sys.stderr)
        return []
    drawn = [(time_against_parameters, "time"), (share_of_copy, "share")]
    images = [(draw, file.with_name(f"{file.stem}-{name}.png")) for draw, name in drawn]
    return [image for draw, image in images if draw(rows, image)]


def markdown(rows: Sequence[Row], images: Iterable[str] = ()) -> str:
    """The whole page: the machine, ours beside the best torch, every group, and what was not run."""
    tried = [row for row in rows if row["status"] in ("ok", "failed", "skipped: memory")]
    versions = [", ".join(f"{k} {row[k]}" for k in ("driver", "torch", "triton", "commit") if row[k]) for row in rows]
    lines = [f"# {rows[0]['device']}", "", *dict.fromkeys(versions), ""]
    lines += [f"![{image}]({image})" for image in images]
    lines += ["", "## Ours beside the best torch", "", *overview(tried), "", "## Every group"]
    for _, group in groupby(sorted(tried, key=_place), _place):
        members = list(group)
        first = members[0]
        size = f"{int(first['parameters']):,} parameters in {int(first['tensors']):,} tensors"
        lines += ["", f"### {', '.join(first[name] for name in GROUP)}: {size}", ""]
        lines += table_lines(HEAD, map(_line, members))
    return "\n".join([*lines, "", "## Not run", "", *not_run(rows)]) + "\n"


def overview(rows: Sequence[Row]) -> list[str]:
    """A line per kind of group with our fastest eager step on each model: its time and its ratio to torch's fastest."""
    ours = [r for r in rows if r["contender"].startswith("ours") and r["mode"] == "eager" and r["status"] == "ok"]
    models = list(dict.fromkeys(r["model"] for r in sorted(ours, key=_place)))
    fastest: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(ours, key=lambda r: (_place(r), -float(r["median_us"]))):  # the fastest is kept, as the last
        fastest.setdefault((row["family"], row["dtype"], row["bookkeeping"]), {})[row["model"]] = row
    lines = [[*key, *(_brief(of[model]) if model in of else "" for model in models)] for key, of in fastest.items()]
    return ["Median µs; in brackets, of the best torch's.", "", *table_lines(["", "", "", *models], lines)]


def _brief(row: Row) -> str:
    ratio = f" ({float(row['ratio_to_best_torch']):.2f})" if row["ratio_to_best_torch"] else ""
    return f"{_number(row['median_us'])}{ratio}"


def not_run(rows: Sequence[Row]) -> list[str]:
    """A line per reason, with its cases."""
    reasons: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        if row["status"].startswith("not"):
            group = " ".join(row[name] for name in GROUP[1:])
            what = row["contender"] if row["status"] == "not installed" else group
            reasons.setdefault(row["status"], {}).setdefault(what, {})[row["family"]] = None
    lines = {why: "; ".join(f"{what} ({', '.join(of)})" for what, of in some.items()) for why, some in reasons.items()}
    return [f"- {why}: {some}." for why, some in lines.items()] or ["Nothing."]


def table_lines(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]


def _place(row: Row) -> tuple[int, int, int, int, str]:
    """A group's place on the page."""
    family, dtype = FAMILIES.index(row["family"]), MEASURED_DTYPES.index(row["dtype"])
    return family, dtype, BOOKKEEPING.index(row["bookkeeping"]), int(row["parameters"]), row["model"]


def _line(row: Row) -> list[str]:
    times = [_number(row[name]) for name in ("median_us", "p20_us", "p80_us")]
    ratio = f"{float(row['ratio_to_best_torch']):.2f}" if row["ratio_to_best_torch"] else ""
    share = f"{float(row['share_of_copy']):.0%}" if row["share_of_copy"] else ""
    status = row["status"] + (f": {row['error']}" if row["status"] == "failed" else "")
    rates = [ratio, _number(row["gb_per_s"]), share, _number(row["host_us"]), row["launches"]]
    return [row["contender"], row["mode"], *times, *rates, status.replace("|", "/")]


def _number(text: str) -> str:
    """A number in three digits, without exponent."""
    if not text:
        return ""
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
