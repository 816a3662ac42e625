"""What the report says of runs whose summary is known, and which recipe the rule chooses."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import report
from examples.record import Record
from examples.selection import choose, select

APPLICATIONS = {app.name: type(app) for app in report.applications()}


def _row(arm, batch, seed, qualities, seconds, **other):
    rule = {"legw": "sqrt", "sqrt": "sqrt", "linear": "linear", "baseline": "sqrt"}[arm]
    schedule = {"base_batch_size": 4, "base_lr": 0.1, "base_warmup_epochs": 0.25, "scaling": rule}
    row = {"arm": arm, "batch_size": batch, "seed": seed, "schedule": schedule, "updates": 1024 // batch}
    found = {"quality": qualities[-1], "qualities": qualities, "cpu_seconds": seconds, "diverged": False}
    return {**row, **found, "device": "a machine", "torch": "2", "commit": "abc", **other}


ROWS = [
    *(_row("baseline", 4, seed, [90.0, 95.0 + seed, 97.0 + seed], [2.0, 4.0, 6.0]) for seed in range(3)),
    *(_row("legw", 8, seed, [90.0, 97.5, 97.5], [1.0, 2.0, 3.0]) for seed in range(3)),
    *(_row("legw", 16, seed, [90.0, 91.0, 98.0 - 4 * (seed == 2)], [0.5, 1.0, 1.5]) for seed in range(3)),
    *(_row("linear", 8, seed, [90.0, None, None], [1.0, 2.0, 3.0], diverged=seed == 1) for seed in range(1, 2)),
]


def test_report_figures():
    app = APPLICATIONS["mnist_lstm"]()
    record = Record(app, ROWS)
    assert record.target == 97.0  # the mean of 97, 98, 99 less one point
    held, lost = (next(g for g in record.groups if (g.arm, g.batch) == ("legw", batch)) for batch in (8, 16))
    assert held.holds(app, 97.0)
    assert not lost.holds(app, 97.0)
    assert record.limit("legw") is held
    assert record.faster(held) == 2
    # The baseline's seeds reach 97 in their last epoch, last, and second: 6, 6 and 4 seconds.
    assert record.sooner(held) == pytest.approx(16 / 3 / 2)
    assert record.sooner(lost) is None  # one of its seeds never does
    line = report._line(record, lost)
    assert line[:7] == ("legw", "16 (×4)", "0.2", "1", "64", "96.67 ± 2.31", "-1.33")
    assert line[7] == "-5.00 to +1.00"
    assert line[11] == "2 of 3"
    linear = next(g for g in record.groups if g.arm == "linear")
    assert not linear.holds(app, 97.0)
    assert "(1 diverged)" in report._line(record, linear)[5]


def test_report_where_less_is_better():
    app = APPLICATIONS["ptb_small"]()
    rows = [_row("baseline", 4, 0, [120.0, 100.0], [1.0, 2.0]), _row("legw", 8, 0, [120.0, 101.9], [0.5, 1.0])]
    record = Record(app, rows)
    assert record.target == pytest.approx(102)
    assert record.limit("legw").batch == 8
    assert record.lost(record.groups[1]) == pytest.approx(0.95)


def test_the_limit_lies_before_the_first_batch_that_fails():
    rows = [_row("baseline", 4, 0, [100.0], [1.0])]
    rows += [_row("legw", batch, 0, [quality], [1.0]) for batch, quality in ((8, 101.0), (16, 103.0), (32, 101.0))]
    assert Record(APPLICATIONS["ptb_small"](), rows).limit("legw").batch == 8


def test_report_writes_a_page_and_plots(tmp_path, capsys):
    for name in APPLICATIONS:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    report.main(["--results", str(tmp_path), "--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert f"a machine ({len(APPLICATIONS) * len(ROWS)} runs, torch 2, commit abc)" in page
    assert "Whole runs of the 4 LSTM applications are 4.00× faster on average" in page
    for name in [*APPLICATIONS, "overview"]:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert f"results/{name}.png" in page
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "empty")])
    assert "no runs of a baseline" in capsys.readouterr().err


def test_selection_rule():
    scores = {
        (0.1, 0.25): [90.0, 92.0, 91.0],
        (0.1, 0.5): [95.0, 95.0, 95.0],
        (0.2, 0.25): [95.0, 97.0, 96.0],
        (0.2, 0.5): [95.5, 95.5, 95.5],  # within one standard error, 0.58, of 96
        (0.2, 1.0): [95.0, 95.0, 95.0],
    }
    assert select(scores) == (0.2, 0.5)
    assert select({(0.4, 0.5): [90.0], (0.2, 0.5): [90.0]}) == (0.2, 0.5)


def test_the_rule_chooses_at_the_baseline():
    app = APPLICATIONS["ptb_small"]()
    found = {(0.1, 0.1): [100.0, 101.0], (0.1, 0.2): [100.5, 100.4], (0.2, 0.1): [90.0, None], (0.2, 0.2): [95.0, 96.0]}
    rows = [
        {"schedule": {"base_lr": lr, "base_warmup_epochs": w}, "quality": q, "diverged": q is None}
        for (lr, w), qualities in found.items()
        for q in qualities
    ]
    assert choose(app, rows) == (0.1, 0.2)
