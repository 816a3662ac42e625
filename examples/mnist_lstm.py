"""MNIST-LSTM: one LSTM layer over the rows of an image. `python -m examples.mnist_lstm --help`"""

from pathlib import Path

from torch.nn import functional as F

from fused_legw import LEGW, SGD
from fused_legw.demo import digits
from fused_legw.demo.training import MNIST, Classifier

from .application import Application
from .sweep import main


class MnistLSTM(Application):
    name, title = "mnist_lstm", "MNIST-LSTM (scikit-learn's digits)"
    metric, unit, tolerance, target = "accuracy", "%", 1.0, 96.0
    multiples = 1, 2, 4, 8, 16, 32, 64
    lrs, warmups = (0.0125, 0.025, 0.05, 0.1), (0.0625, 0.25)

    # Tuned at batch 4. For any other batch LEGW needs only recipe.with_batch_size(batch).
    recipe = LEGW(0.05, 4, 0.25, batch_size=4, dataset_size=1024, epochs=120)
    hidden = 64

    def optimizer(self, model, schedule):
        return SGD(model.parameters(), lr=schedule, momentum=0.9)

    def model(self):
        return Classifier(self.train[0].shape[2], self.hidden)

    def loss(self, model, batch, state):
        images, labels = batch
        return F.cross_entropy(model(images), labels), state

    def quality(self, model, split):
        images, labels = getattr(self, split)
        return 100 * float((model(images).argmax(1) == labels).float().mean())

    def load(self, args):
        data = digits.load_sklearn()
        if args.data is not None:
            self.recipe, self.hidden = MNIST.recipe, MNIST.hidden
            data = digits.load_mnist(Path(args.data))
        self.train, self.validation, self.test = (
            (part.images, part.labels) for part in (data.train, data.validation, data.test)
        )


if __name__ == "__main__":
    main(MnistLSTM())
