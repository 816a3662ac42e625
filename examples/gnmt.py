"""GNMT: an LSTM encoder and decoder with attention that translates. `python -m examples.gnmt --help`"""

import collections
import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fused_legw import LEGW, AdamW

from .application import Application, need
from .sweep import main

PAD, START, END, UNKNOWN = range(4)
VOCABULARY = 32_000

# English number names to French ones, from the package num2words: 71 is "soixante et onze", 80 "quatre-vingts".
LARGEST, PAIRS, VALIDATION, TEST = 1_000_000, 2048, 512, 512


class Encoder(nn.Module):
    """A bidirectional layer, then one-way layers. Residual connections begin at the third layer."""

    def __init__(self, vocabulary, hidden, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=PAD)
        self.first = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        widths = [2 * hidden] + [hidden] * (layers - 2)
        self.others = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        x, _ = self.first(self.dropout(self.embedding(tokens)))
        for i, lstm in enumerate(self.others):
            y, _ = lstm(self.dropout(x))
            x = x + y if i else y
        return x


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015) of every decoder step over the source."""

    def __init__(self, hidden):
        super().__init__()
        self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, queries, memory, padding):
        scores = self.score(torch.tanh(self.query(queries)[:, :, None] + self.key(memory)[:, None])).squeeze(-1)
        return scores.masked_fill(padding[:, None], -torch.inf).softmax(-1) @ memory


class Decoder(nn.Module):
    """The first layer's outputs query the attention. Its context goes into every later layer and into the output."""

    def __init__(self, vocabulary, hidden, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=PAD)
        self.attention = Attention(hidden)
        self.layers = nn.ModuleList(nn.LSTM(hidden * (2 if i else 1), hidden, batch_first=True) for i in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * hidden, vocabulary)

    def forward(self, tokens, memory, padding, state=None):
        state = state or [None] * len(self.layers)
        x, state[0] = self.layers[0](self.dropout(self.embedding(tokens)), state[0])
        context = self.attention(x, memory, padding)
        for i, lstm in enumerate(self.layers[1:], 1):
            y, state[i] = lstm(self.dropout(torch.cat([x, context], -1)), state[i])
            x = x + y if i > 1 else y
        return self.output(torch.cat([x, context], -1)), state


class Translator(nn.Module):
    def __init__(self, source, target, hidden, layers, dropout):
        super().__init__()
        self.encoder = Encoder(source, hidden, layers, dropout)
        self.decoder = Decoder(target, hidden, layers, dropout)

    def forward(self, source, target):
        scores, _ = self.decoder(target, self.encoder(source), source == PAD)
        return scores

    @torch.no_grad()
    def translate(self, source, longest, beam=4):
        """Beam search for one batch of sources (batch, length). It ranks by the mean log-probability per token."""
        count, device = len(source), source.device
        padding = (source == PAD).repeat_interleave(beam, 0)
        memory = self.encoder(source).repeat_interleave(beam, 0)
        tokens = torch.full((count * beam, 1), START, device=device)
        total = torch.full((count, beam), -torch.inf, device=device)
        total[:, 0] = 0  # the beams start equal, so only one of them may grow at first
        ended, lengths, state = torch.zeros_like(total, dtype=torch.bool), torch.zeros_like(total), None
        for _ in range(longest):
            scores, state = self.decoder(tokens[:, -1:], memory, padding, state)
            scores = scores[:, -1].log_softmax(-1).view(count, beam, -1)
            # A sentence that has ended goes on by padding, which costs nothing.
            scores = scores.masked_fill(ended[..., None], -torch.inf)
            scores[..., PAD] = torch.where(ended, 0.0, -torch.inf)
            vocabulary = scores.shape[-1]
            total, chosen = (total[..., None] + scores).view(count, -1).topk(beam, -1)
            parent, token = chosen // vocabulary, chosen % vocabulary
            rows = (parent + beam * torch.arange(count, device=device)[:, None]).flatten()
            tokens = torch.cat([tokens[rows], token.view(-1, 1)], 1)
            state = [(h[:, rows].contiguous(), c[:, rows].contiguous()) for h, c in state]
            ended, lengths = ended.gather(1, parent), lengths.gather(1, parent)
            lengths += ~ended
            ended |= token == END
            if ended.all():
                break
        best = (total / lengths.clamp(min=1)).argmax(-1)
        return tokens.view(count, beam, -1)[torch.arange(count), best, 1:]


class GNMT(Application):
    name, title = "gnmt", "GNMT (English to French number names)"
    metric, unit, tolerance, target = "BLEU", "", 1.0, 95.0
    multiples = 1, 2, 4, 8, 16
    lrs, warmups = (0.0005, 0.001, 0.002, 0.004), (0.0625, 0.25)
    packages = ("sacrebleu",)
    recipe = LEGW(0.002, 8, 0.25, batch_size=8, dataset_size=PAIRS, epochs=20)
    hidden, layers, dropout, smoothing = 32, 3, 0.0, 0.1

    def optimizer(self, model, schedule):
        return AdamW(model.parameters(), lr=schedule, weight_decay=0.0, max_grad_norm=5.0)

    def model(self):
        vocabularies = len(self.source), len(self.target_words)
        return Translator(*vocabularies, self.hidden, self.layers, self.dropout)

    def loss(self, model, batch, state):
        source, target = batch
        # Cut to the longest sentence of the batch.
        source, target = (t[:, : int((t != PAD).sum(1).max())] for t in (source, target))
        scores, wanted = model(source, target[:, :-1]), target[:, 1:]
        flat = scores.flatten(0, 1), wanted.flatten()
        return F.cross_entropy(*flat, ignore_index=PAD, label_smoothing=self.smoothing), state

    def quality(self, model, split):
        from sacrebleu.metrics import BLEU

        sources, sentences = getattr(self, split)
        found = []
        for batch in sources.split(128):
            found += [self._words(row) for row in model.translate(batch, self.longest).tolist()]
        # Spaces part the words already.
        return BLEU(tokenize="none", force=True).corpus_score(found, [sentences]).score

    def _words(self, numbers):
        return " ".join(self.names[n] for n in numbers if n not in (PAD, START, END))

    def add_arguments(self, parser):
        parser.add_argument(
            "--source", type=Path, metavar="FILE", help="sentences, one a line, instead of number names"
        )
        parser.add_argument("--target", type=Path, metavar="FILE", help="their translations, line by line")

    def load(self, args):
        if args.data is not None:
            raise ValueError("--data: give parallel text as --source FILE --target FILE")
        if (args.source is None) != (args.target is None):
            raise ValueError("--source and --target come together")
        if args.source is None:
            pairs, validation, test = _number_names(), VALIDATION, TEST
        else:  # GNMT's size. LR, warm-up and length are not tuned.
            self.hidden, self.layers, self.dropout = 1024, 4, 0.2
            pairs = _read(args.source, args.target)
            validation = test = min(3000, len(pairs) // 10)
            self.recipe = LEGW(0.001, 256, 0.05, batch_size=256, dataset_size=len(pairs), epochs=6)
        first, last = len(pairs) - validation - test, len(pairs) - test
        self.source, self.target_words = (_vocabulary(side) for side in zip(*pairs[:first], strict=True))
        self.names = {number: word for word, number in self.target_words.items()}
        encoded = [
            _encode([pair[side] for pair in pairs], words)
            for side, words in enumerate((self.source, self.target_words))
        ]
        sources, targets = encoded
        self.train = sources[:first], targets[:first]
        self.longest = targets.shape[1] + 5
        self.validation, self.test = (
            (sources[a:b], [" ".join(pair[1]) for pair in pairs[a:b]]) for a, b in ((first, last), (last, len(pairs)))
        )


def _number_names():
    """Distinct numbers below a million, as words. Hyphens part words too."""
    need("num2words")
    from num2words import num2words

    numbers = random.Random(0).sample(range(LARGEST), PAIRS + VALIDATION + TEST)
    return [
        tuple(
            num2words(number, lang=language).replace("-", " - ").replace(",", "").split() for language in ("en", "fr")
        )
        for number in numbers
    ]


def _read(source, target):
    """Pairs of word lists from two files, shuffled once. Pairs with an empty side or over 50 words are left out."""
    sides = []
    for name, file in (("--source", source), ("--target", target)):
        if not file.is_file():
            raise ValueError(f"{name}: {file} is missing")
        try:
            sides.append([line.split() for line in file.read_text("utf-8").splitlines()])
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: {file} is not UTF-8 text: {error}") from error
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"--source has {len(sides[0])} lines, --target {len(sides[1])}")
    pairs = [pair for pair in zip(*sides, strict=True) if all(0 < len(words) <= 50 for words in pair)]
    if len(pairs) < 1000:
        raise ValueError(f"--source: {len(pairs)} usable pairs, at least 1000 are needed")
    random.Random(0).shuffle(pairs)
    return pairs


def _vocabulary(sentences):
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    special = {"<pad>": PAD, "<s>": START, "</s>": END, "<unk>": UNKNOWN}
    words = [word for word, _ in counts.most_common(VOCABULARY) if word not in special]
    return {**special, **{word: number for number, word in enumerate(words, len(special))}}


def _encode(sentences, vocabulary):
    rows = [[START, *(vocabulary.get(word, UNKNOWN) for word in sentence), END] for sentence in sentences]
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


if __name__ == "__main__":
    main(GNMT())
