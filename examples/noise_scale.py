"""The gradient noise scale of the digits LSTM as it trains. `python -m examples.noise_scale`"""

import argparse
import csv
import types
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fused_legw import GradientNoiseScale, MicroBatchNorms

from .mnist_lstm import MnistLSTM

SMALL, BIG, SEED = 8, 64, 0


def train(app, told):
    """Train the recipe at batch 64, in micro-batches of 8. After every epoch it calls told(epoch, loss, noise)."""
    torch.manual_seed(SEED)
    model = app.model()
    schedule = app.schedule(BIG, "legw")
    optimizer = app.optimizer(model, schedule)
    noise = GradientNoiseScale(SMALL, BIG)
    with MicroBatchNorms(noise, model.parameters()) as norms:
        for epoch in range(int(schedule.epochs)):
            total = 0.0
            for batch in app.batches(BIG):
                optimizer.zero_grad()
                for part in zip(*(tensor.split(SMALL) for tensor in batch), strict=True):
                    loss, _ = app.loss(model, part, ())
                    (loss * SMALL / BIG).backward()
                    total += float(loss.detach()) * SMALL
                norms.step()
                optimizer.step()
            told(epoch + 1, total / app.samples(), noise)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m examples.noise_scale", description=__doc__)
    default = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="(default: the recipe's)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    app = MnistLSTM()
    app.load(types.SimpleNamespace(data=None))
    app.to(torch.device("cpu"))
    if args.epochs is not None:
        app.recipe = replace(app.recipe, epochs=args.epochs)
    rows = []

    def told(epoch, loss, noise):
        rows.append((epoch, loss, noise.noise_scale, *noise.interval(), noise.trace, noise.grad_sq))

    train(app, told)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "noise_scale.csv").open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["epoch", "loss", "noise_scale", "low", "high", "trace", "grad_sq"])
        writer.writerows([epoch, *(f"{x:.5g}" for x in values)] for epoch, *values in rows)
    plot(rows, args.output / "noise_scale.png")
    for epoch, loss, scale, low, high, *_ in rows[:: max(1, len(rows) // 10)]:
        print(f"epoch {epoch:3}: loss {loss:.4f}, noise scale {scale:.0f} samples ({low:.0f} to {high:.0f})")


def plot(rows, file):
    epochs, losses, scales, lows, highs, *_ = zip(*rows, strict=True)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    ceiling = 10 * max(scale for scale in scales if scale < float("inf"))  # stands for an interval without upper bound
    ax.fill_between(epochs, [max(low, 1) for low in lows], [min(high, ceiling) for high in highs], alpha=0.25)
    ax.plot(epochs, scales, label="tr(Σ) / |G|², with its 95 % interval")
    ax.axhline(BIG, color="black", ls=":", lw=1, label=f"the batch, {BIG}")
    ax.set(yscale="log", xlabel="epoch", ylabel="samples", title="Gradient noise scale, digits LSTM")
    loss_axis = ax.twinx()
    loss_axis.plot(epochs, losses, color="tab:orange", lw=1)
    loss_axis.set_ylabel("training loss", color="tab:orange")
    loss_axis.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
