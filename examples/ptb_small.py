"""PTB-small: a two-layer LSTM language model, the tutorial's decay. `python -m examples.ptb_small --help`"""

from fused_legw import LEGW, SGD, Exponential

from .language_model import LanguageModel
from .sweep import main


class PTBSmall(LanguageModel):
    name, title = "ptb_small", "PTB-small (King James Version)"
    target = 45.0
    lrs, warmups = (0.03125, 0.0625, 0.125, 0.25), (0.015625, 0.0625)
    recipe = LEGW(
        0.125, 2, 0.0625, batch_size=2, dataset_size=2999, epochs=10, decay=Exponential(rate=0.5, start_epoch=5)
    )

    def optimizer(self, model, schedule):
        return SGD(model.parameters(), lr=schedule, momentum=0.9, max_grad_norm=self.max_grad_norm)

    def paper(self):
        """Penn Treebank at the tutorial's size, length and LR. Its momentum is 0. The warm-up is not tuned."""
        self.hidden, self.steps = 200, 20
        decay = Exponential(rate=0.5, start_epoch=4)
        self.recipe = LEGW(0.1, 20, 0.1, batch_size=20, dataset_size=46_479, epochs=13, decay=decay)


if __name__ == "__main__":
    main(PTBSmall())
