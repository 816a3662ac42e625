"""AutoWU beside LEGW and the tuned baseline, on the digits LSTM at ×32. `python -m examples.autowu`"""

import argparse
import json
import types
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from fused_legw import AdamP, AutoWU

from .mnist_lstm import MnistLSTM
from .trainer import Settings, train

SCALE, SEEDS = 32, range(5)


def train_by_autowu(app, seed, epochs):
    """(test accuracy, (update, LR) at which the warm-up ended or None) of a run that is given no LR."""
    torch.manual_seed(seed)
    model = app.model()
    batch_size = SCALE * app.recipe.base_batch_size
    updates = app.updates_per_epoch(batch_size)
    auto = AutoWU(total_steps=epochs * updates, steps_per_epoch=updates, seed=seed)
    optimizer = AdamP(model.parameters(), lr=auto)
    for _ in range(epochs):
        for batch in app.batches(batch_size):
            optimizer.zero_grad()
            loss, _ = app.loss(model, batch, ())
            loss.backward()
            optimizer.step()
            auto.observe(loss.detach())
        auto.end_epoch()
    with torch.no_grad():
        return app.quality(model, "test"), auto.switch


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m examples.autowu", description=__doc__)
    default = Path(__file__).parent / "results" / "autowu.jsonl"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="(default: the recipe's)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    app, settings = MnistLSTM(), Settings(torch.device("cpu"))
    app.load(types.SimpleNamespace(data=None))
    app.to(settings.device)
    if args.epochs is not None:
        app.recipe = replace(app.recipe, epochs=args.epochs)
    rows = []
    for seed in range(args.seeds):
        for arm, scale in (("baseline", 1), ("legw", SCALE)):
            schedule = app.schedule(scale * app.recipe.base_batch_size, arm)
            _, progress = train(app, schedule, seed, settings)
            rows.append({"arm": arm, "seed": seed, "quality": progress.qualities[-1]})
        quality, switch = train_by_autowu(app, seed, int(app.recipe.epochs))
        rows.append({"arm": "autowu", "seed": seed, "quality": quality, "switch": switch})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arm in "baseline", "legw", "autowu":
        found = [row["quality"] for row in rows if row["arm"] == arm]
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        print(f"{arm:8} {fmean(found):.2f}{spread}: {', '.join(f'{x:.2f}' for x in found)}")
    for row in rows:
        if row["arm"] == "autowu":
            print(f"seed {row['seed']}: switch (update, LR) {row['switch']}")


if __name__ == "__main__":
    main()
