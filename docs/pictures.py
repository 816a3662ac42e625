"""Draws the pictures of the README and the site. `PYTHONPATH=.:kernels python docs/pictures.py`"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fused_legw import LEGW, Polynomial

IMAGES = Path(__file__).parent / "images"


def draw_schedule(file: Path) -> None:
    """One recipe at three batches: the learning rate by epoch."""
    recipe = LEGW(
        base_lr=0.1,
        base_batch_size=256,
        base_warmup_epochs=0.5,
        batch_size=256,
        dataset_size=1_281_167,
        epochs=90,
        decay=Polynomial(power=2),
    )
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    ax = figure.subplots()
    batches = (256, 2048, 8192)
    for i, batch in enumerate(batches):
        schedule = recipe.with_batch_size(batch)
        label = f"batch {batch:,}: peak {schedule.peak_lr:.3g}, warm-up {schedule.warmup_epochs:g} epochs"
        schedule.plot(ax, label=label, color=colormaps["viridis"](0.4 * i))
    ax.set(xlim=(0, 90), ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def main(folder: Path = IMAGES) -> None:
    draw_schedule(folder / "schedule.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
