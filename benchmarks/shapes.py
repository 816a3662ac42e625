"""The parameter shapes of real models, worked out from their architecture's rules, in `model.parameters()` order."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """torchvision's ResNet-50 (He et al. 2015), 1000 classes: 161 tensors, 25,557,032 parameters."""
    shapes = _conv_bn(64, 3, 7)
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_bn(width, width_in, 1) + _conv_bn(width, width, 3) + _conv_bn(4 * width, width, 1)
            if block == 0:
                shapes += _conv_bn(4 * width, width_in, 1)  # the shortcut changes width here
            width_in = 4 * width
    return shapes + _linear(1000, width_in)


def ptb_large(vocabulary: int = 10_000, hidden: int = 1500, layers: int = 2) -> list[Shape]:
    """The large LSTM of Zaremba et al. 2014 on Penn Treebank: 11 tensors, 66,034,000 parameters.

    The softmax does not share the embedding's weights. Biases as in torch.nn.LSTM, two per layer: TensorFlow's
    original has one, and 12,000 parameters fewer.
    """
    layer = [(4 * hidden, hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    return [(vocabulary, hidden), *layers * layer, *_linear(vocabulary, hidden)]


def bert_large(vocabulary: int = 30_522, hidden: int = 1024, layers: int = 24) -> list[Shape]:
    """BERT-large uncased (Devlin et al. 2018), as transformers' BertModel: the encoder with its pooler and without the
    pre-training heads. 391 tensors, 335,141,888 parameters.
    """
    norm = [(hidden,), (hidden,)]
    square = _linear(hidden, hidden)
    layer = 4 * square + norm + _linear(4 * hidden, hidden) + _linear(hidden, 4 * hidden) + norm
    return [(vocabulary, hidden), (512, hidden), (2, hidden), *norm, *layers * layer, *square]


MODELS = {"resnet50": resnet50, "ptb-large": ptb_large, "bert-large": bert_large}


def smaller(shapes: list[Shape], divisor: int) -> list[Shape]:
    """As many tensors, every dimension divided, none below 1."""
    return [tuple(max(1, size // divisor) for size in shape) for shape in shapes]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _conv_bn(outputs: int, inputs: int, kernel: int) -> list[Shape]:
    """A convolution without bias, then its batch norm's weight and bias."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]
