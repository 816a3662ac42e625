"""The two plots of a machine's results: time against parameters, and share of copy bandwidth by optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .least_bytes import FAMILIES, bytes_per_parameter
from .results import Row
from .shapes import FLAT


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if (r["status"], r["dtype"], r["bookkeeping"]) == ("ok", "float32", "plain")]


def _label(row: Row) -> str:
    return row["contender"] + (" (graph)" if row["mode"] == "graph" else "")


def _colors(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours in black and greys, everyone else in colours, the same in both plots."""
    ours = {"ours-triton": "black", "ours-triton (graph)": "dimgrey", "ours-aten": "darkgrey"}
    labels = list(dict.fromkeys(map(_label, _plain(rows))))
    others = [label for label in labels if label not in ours]
    colors: dict[str, Any] = {
        label: colormaps["tab20b" if i > 9 else "tab10"](i % 10) for i, label in enumerate(others)
    }
    return {label: (ours | colors)[label] for label in labels}


def time_against_parameters(rows: Sequence[Row], file: Path) -> bool:
    """A panel per family, float32, plain: lines over flat sizes, crosses for models, and the floor.

    The floor is the time of the least bytes at the fastest copy's rate.
    """
    colors, rows = _colors(rows), _plain(rows)
    families = [f for f in FAMILIES if any(r["family"] == f for r in rows)]
    if not rows:
        return False
    fastest_copy = max(float(r["copy_gb_per_s"]) for r in rows)
    figure = Figure(figsize=(4 + 3 * len(families), 5), layout="constrained")
    for ax, family in zip(figure.subplots(1, len(families), sharey=True, squeeze=False)[0], families, strict=True):
        of_family = [r for r in rows if r["family"] == family]
        for label, color in colors.items():
            of_label = sorted((r for r in of_family if _label(r) == label), key=lambda r: int(r["parameters"]))
            for flat, style in ((True, ".-"), (False, "x")):  # a line through the models would jump with their tensors
                some = [r for r in of_label if (r["model"] in FLAT) == flat]
                x, y = [int(r["parameters"]) for r in some], [float(r["median_us"]) for r in some]
                ax.plot(x, y, style, color=color, label=label if flat else None, linewidth=1)
        sizes = sorted(int(r["parameters"]) for r in of_family)
        floor = [bytes_per_parameter(family, "float32", "plain") * n / fastest_copy / 1e3 for n in sizes]
        ax.plot(sizes, floor, "k:", label=f"floor at {fastest_copy:.0f} GB/s", linewidth=1)
        ax.set(xscale="log", yscale="log", title=family, xlabel="parameters")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("median of a step, µs")
    _finish(figure, file)
    return True


def share_of_copy(rows: Sequence[Row], file: Path) -> bool:
    """Bars per family, float32, plain, on the largest model that all families ran."""
    colors, rows = _colors(rows), _plain(rows)
    families = {r["family"] for r in rows}
    models = [r for r in rows if families == {q["family"] for q in rows if q["model"] == r["model"]}]
    if not models:
        return False
    model = max(models, key=lambda r: int(r["parameters"]))["model"]
    rows = [r for r in rows if r["model"] == model]
    figure = Figure(figsize=(11, 5), layout="constrained")
    ax = figure.subplots()
    ticks, x = [], 0.0
    for family in [f for f in FAMILIES if f in families]:
        members = [r for r in rows if r["family"] == family]
        for i, row in enumerate(members):
            ax.bar(x + i, 100 * float(row["share_of_copy"]), color=colors[_label(row)], label=_label(row))
        ticks.append((x + (len(members) - 1) / 2, family))
        x += len(members) + 1.5
    ax.axhline(100, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(*zip(*ticks, strict=True))
    ax.set(ylabel="least bytes per second, % of a copy's", title=f"{model}, float32")
    _finish(figure, file)
    return True


def _finish(figure: Figure, file: Path) -> None:
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=120)
