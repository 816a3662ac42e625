"""The task of `fused-legw demo`. `python -m examples.digits_demo --tune` repeats the choice of the demo's recipe."""

from fused_legw.demo.training import DIGITS

from .mnist_lstm import MnistLSTM
from .sweep import main


class DigitsDemo(MnistLSTM):
    name, title, target = "digits_demo", "The demo (scikit-learn's digits)", 97.0
    multiples = 1, 4, 16, 32
    # At x32 the longest warm-up is 16 of the 60 epochs. A longer one would leave little to train.
    lrs, warmups = (0.025, 0.05, 0.1, 0.2, 0.4), (0.125, 0.25, 0.5)
    tuning_seeds = range(100, 105)
    recipe, hidden = DIGITS.recipe, DIGITS.hidden


if __name__ == "__main__":
    main(DigitsDemo())
