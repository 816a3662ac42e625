"""The parameter shapes of real models, in the order of `model.parameters()`, by the rules of their architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    The softmax does not share the embedding's weights. A layer has two biases, as in torch.nn.LSTM. TensorFlow's
    original has one, and so 12,000 parameters fewer.
    """
    return [(vocabulary, hidden), *layers * _lstm(hidden, hidden), *_linear(vocabulary, hidden)]


def bert_large(vocabulary: int = 30_522, hidden: int = 1024, layers: int = 24) -> list[Shape]:
    """BERT-large uncased (Devlin et al. 2018), as transformers' BertModel: the encoder with its pooler and without the
    pre-training heads. 391 tensors, 335,141,888 parameters.
    """
    norm = [(hidden,), (hidden,)]
    square = _linear(hidden, hidden)
    layer = 4 * square + norm + _linear(4 * hidden, hidden) + _linear(hidden, 4 * hidden) + norm
    return [(vocabulary, hidden), (512, hidden), (2, hidden), *norm, *layers * layer, *square]


def gnmt(vocabulary: int = 32_320, hidden: int = 1024, layers: int = 4) -> list[Shape]:
    """GNMT (Wu et al. 2016) at the size of MLPerf and the LEGW paper: 4 + 4 layers of 1024, 44 tensors, 160,671,297
    parameters.

    The encoder's first layer is bidirectional. Both sides share one embedding; the classifier has its own weight. The
    decoder's first layer feeds a normalised additive attention, whose context the later layers take beside their input.
    The vocabulary is 32,317 rounded up to a multiple of 8.
    """
    encoder = 2 * _lstm(hidden, hidden) + _lstm(2 * hidden, hidden) + (layers - 2) * _lstm(hidden, hidden)
    attention = [(hidden,), (1,), (hidden,), (hidden, hidden), (hidden, hidden)]  # v, g and b; then query and key
    decoder = _lstm(hidden, hidden) + attention + (layers - 1) * _lstm(2 * hidden, hidden)
    return [(vocabulary, hidden), *encoder, *decoder, *_linear(vocabulary, hidden)]


def gpt_1_3b(vocabulary: int = 50_257, context: int = 2048, hidden: int = 2048, layers: int = 24) -> list[Shape]:
    """GPT-3 XL (Brown et al. 2020, table 2.1) built as GPT-2: 292 tensors, 1,315,723,264 parameters.

    Positions are learned, every layer has biases, and the embedding is also the output layer. A layer of width h has
    12 h^2 + 13 h parameters.
    """
    norm = [(hidden,), (hidden,)]
    attention = _linear(3 * hidden, hidden) + _linear(hidden, hidden)
    layer = norm + attention + norm + _linear(4 * hidden, hidden) + _linear(hidden, 4 * hidden)
    return [(vocabulary, hidden), (context, hidden), *layers * layer, *norm]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "ptb-large": ptb_large,
    "gnmt": gnmt,
    "bert-large": bert_large,
    "gpt-1.3b": gpt_1_3b,
}
FLAT = {f"flat-1e{power}": 10**power for power in range(4, 10)}  # one tensor


def shapes_of(model: str) -> list[Shape]:
    """The shapes of a model, or of one flat tensor."""
    return [(FLAT[model],)] if model in FLAT else MODELS[model]()


def smaller(shapes: Sequence[Shape], divisor: int) -> list[Shape]:
    """The same tensors with every dimension divided, to no less than 1."""
    return [tuple(max(1, size // divisor) for size in shape) for shape in shapes]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _lstm(inputs: int, hidden: int) -> list[Shape]:
    """One layer and direction of torch.nn.LSTM, with its two biases."""
    return [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]


def _conv_bn(outputs: int, inputs: int, kernel: int) -> list[Shape]:
    """A convolution without bias, then its batch norm's weight and bias."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]
