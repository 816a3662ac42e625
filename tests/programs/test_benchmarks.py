"""The benchmarks themselves: that they compare what they say they compare, and report whatever happens in them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import report, results, rounds, timing
from benchmarks.cases import MEASURED_DTYPES, Case, CaseGroup, every_case, groups
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.full_step import BOOKKEEPING
from benchmarks.least_bytes import FAMILIES, bytes_per_parameter
from benchmarks.rounds import Outcome, Setting
from benchmarks.shapes import FLAT, MODELS, shapes_of, smaller

SHAPES = [(5, 3), (17,), (1,), (8, 8)]


def own(family: str, device: str, mode: str = "eager") -> list[Contender]:
    """The rows that must agree: ours, torch's and the reference. Compiled steps take too long to run everywhere."""
    rows = [row for row in CONTENDERS if row.family == family and row.mode == mode and row.peer is None]
    wanted = [row for row in rows if row.offered("gnmt", "float32", "plain", torch.device(device))]
    assert len(wanted) >= 3 or mode == "graph"
    return wanted


def setting(device: str, dtype: torch.dtype = torch.float32, bookkeeping: str = "plain") -> Setting:
    return Setting(SHAPES, dtype, bookkeeping, torch.device(device), seconds=0.0)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    # torchvision's, transformers' and MLPerf's own counts. ptb-large: 15,000,000 + 36,024,000 + 15,010,000.
    # gpt-1.3b: GPT-Neo's count, which lacks the biases of query, key and value.
    [
        ("resnet50", 161, 25_557_032),
        ("ptb-large", 11, 66_034_000),
        ("gnmt", 44, 160_671_297),
        ("bert-large", 391, 335_141_888),
        ("gpt-1.3b", 292, 1_315_575_808 + 3 * 24 * 2_048),
    ],
)
def test_shapes_are_the_models(model: str, tensors: int, parameters: int) -> None:
    shapes = MODELS[model]()
    assert (len(shapes), sum(map(prod, shapes))) == (tensors, parameters)
    assert f"{tensors} tensors, {parameters:,}" in " ".join((MODELS[model].__doc__ or "").split())
    assert len(smaller(shapes, 32)) == tensors


def test_flat_sizes_and_smaller() -> None:
    assert [shapes_of(name) for name in FLAT] == [[(10**power,)] for power in range(4, 10)]
    assert smaller([(64, 3, 7), (10,)], 4) == [(16, 1, 1), (2,)]


def test_least_bytes() -> None:
    """The numbers of benchmarks/README.md: reads and writes of parameter, gradient, state and master, in bytes."""
    p = g = m = v = w = 4
    sgd, adam = (p + g + m) + (p + m), (p + g + m + v) + (p + m + v)
    lamb = (p + g + m + v) + (m + v) + (p + m + v) + p
    plain = {"sgd": sgd, "adam": adam, "adamw": adam, "lars": p + g + sgd, "lamb": lamb}
    assert plain == {f: bytes_per_parameter(f, "float32", "plain") for f in FAMILIES}
    p = g = 2
    sgd, adam = (w + g + m) + (p + w + m), (w + g + m + v) + (p + w + m + v)
    lamb = (w + g + m + v) + (m + v) + (w + m + v) + (p + w)
    plain = {"sgd": sgd, "adam": adam, "adamw": adam, "lars": w + g + sgd, "lamb": lamb}
    assert plain == {f: bytes_per_parameter(f, "bfloat16", "plain") for f in FAMILIES}
    for dtype, read in (("float32", 4), ("bfloat16", 2)):
        extra = {
            f: bytes_per_parameter(f, dtype, "amp+clip") - bytes_per_parameter(f, dtype, "plain") for f in FAMILIES
        }
        assert extra == {"sgd": read, "adam": read, "adamw": read, "lars": 0, "lamb": read}


@pytest.mark.parametrize("dtype", MEASURED_DTYPES)
@pytest.mark.parametrize("bookkeeping", BOOKKEEPING)
@pytest.mark.parametrize("family", FAMILIES)
def test_contenders_compute_the_same(family: str, bookkeeping: str, dtype: str, device: str) -> None:
    after = {}
    for row in own(family, device):
        torch.manual_seed(0)
        gradients = timing.Gradients(SHAPES, getattr(torch, dtype), torch.device(device))
        params = timing.parameters(gradients)
        with torch.no_grad():
            for g in gradients._clean:
                g.mul_(50)  # enough to be clipped
        gradients._versions = []
        step = row.make(params, bookkeeping)
        for _ in range(10):
            gradients.restore()
            step()
        after[row.name] = torch.cat([p.detach().float().flatten() for p in params])
    tolerance = dict(rtol=2e-6, atol=1e-7) if dtype == "float32" else dict(rtol=2**-7, atol=1e-6)
    for name, values in after.items():
        torch.testing.assert_close(values, after["reference"], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_put_back_after_a_contender_that_writes_to_them() -> None:
    gradients = timing.Gradients(SHAPES, torch.float32, torch.device("cpu"))
    (p, *_) = timing.parameters(gradients)
    before = p.grad.clone()
    p.grad.mul_(0)
    gradients.restore()
    torch.testing.assert_close(p.grad, before, rtol=0, atol=0)


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step each in every round, and not always the same first; a slow one sits out, evenly spread."""
    order: list[str] = []
    monkeypatch.setattr(rounds.Entrant, "turn", lambda self, before: order.append(self.name))
    entrants = []
    for name, count in (("a", 6), ("b", 6), ("slow", 2)):
        entrant = rounds.Entrant.__new__(rounds.Entrant)
        entrant.name, entrant.rounds, entrant.outcome = name, count, Outcome()
        entrants.append(entrant)
    rounds._take_turns(entrants, timing.Before(8, torch.device("cpu")))
    assert "".join(order) == "ab" + "ba" + "slowab" + "ab" + "ba" + "slowab"


@pytest.mark.parametrize("when", ["made", "third step", "timed"])
def test_a_contender_that_fails_is_reported_and_the_rest_goes_on(when: str, device: str) -> None:
    good = own("sgd", device)[-1]

    def make(params: list[torch.Tensor], bookkeeping: str):
        steps = iter(range(2 if when == "third step" else 10**9))
        if when == "made":
            raise ImportError("no such module")
        real = params[0].numel() > 1  # the small copy, for the host's time, is not the one that is timed

        def step() -> None:
            if next(steps, None) is None or (when == "timed" and real and timing_now):
                raise RuntimeError("broken |\n kernel")

        return step

    timing_now: list[bool] = []
    run = rounds._take_turns

    def run_and_break(*args) -> None:
        timing_now.append(True)
        run(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "_take_turns", run_and_break)
        bad, fine = rounds.time_contenders([replace(good, name="bad", make=make), good], setting(device))
    assert (bad.status, bad.times) == ("failed", [])
    assert bad.error in ("ImportError: no such module", "RuntimeError: broken | kernel")
    assert (fine.status, len(fine.times), len(fine.copies)) == ("ok", 5, 5)


def test_what_does_not_fit_is_skipped_and_said_so(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    rows = own("lamb", device)
    monkeypatch.setattr(rounds, "free_bytes", lambda device: 0)
    assert {o.status for o in rounds.time_contenders(rows, setting(device))} == {"skipped: memory"}
    tried: list[str] = []

    def make(params: list[torch.Tensor], bookkeeping: str):
        tried.append("")
        if len(tried) == 1:
            raise torch.OutOfMemoryError("beside the others")
        return rows[0].make(params, bookkeeping)

    monkeypatch.setattr(rounds, "free_bytes", lambda device: 10**9)
    last, first = rounds.time_contenders([rows[0], replace(rows[0], make=make)], setting(device))
    assert (last.status, first.status, first.error) == ("ok", "ok", "")  # alone it fits


def test_rows_and_their_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, device: str) -> None:
    group = CaseGroup("sgd", "flat-1e4", "float32", "plain")
    rows = {row.name: row for row in own("sgd", device)}
    cases = [Case(group, name, "eager", rows[name]) for name in ("ours-aten", "torch-fused", "reference")]
    times = [[1e-3, 2e-3, 3e-3], [4e-3, 4e-3, 4e-3]]
    outcomes = [Outcome(times=t, copies=[1e-3], copy_bytes=80_000, host=1e-6) for t in times]
    outcomes.append(Outcome(status="failed", error="RuntimeError: broken | kernel"))
    out = results.rows_of(cases, outcomes, [(10_000,)])
    ours = out[0]
    assert (ours["median_us"], ours["p20_us"], ours["p80_us"], ours["host_us"]) == ("2000", "1400", "2600", "1")
    assert (ours["ratio_to_best_torch"], ours["bytes"], ours["gb_per_s"]) == ("0.5", "200000", "0.1")
    assert (ours["copy_gb_per_s"], ours["share_of_copy"], ours["launches"]) == ("0.08", "1.25", "")
    gone = [Case(CaseGroup("lamb", "gnmt", "float32", "plain"), "all", status="not run: GPU only")]
    gone.append(Case(CaseGroup("sgd", "any", "any", "any"), "apex", status="not installed"))
    file = tmp_path / "machine.csv"
    results.append(file, [{**ours, "median_us": "9"}])
    results.append(file, [{**row, "device": "a machine"} for row in [*out, *map(results.empty_row, gone)]])
    assert tuple(file.read_text().splitlines()[0].split(",")) == results.COLUMNS
    assert len(results.read(file)) == 5  # ours once, with its last row

    assert report.main(tmp_path) == 0
    page = (tmp_path / "machine.md").read_text()
    assert "| ours-aten | eager | 2,000 | 1,400 | 2,600 | 0.50 | 0.1 | 125% | 1 |  | ok |" in page
    assert "failed: RuntimeError: broken / kernel" in page
    assert "- not installed: apex (sgd)." in page and "- not run: GPU only: gnmt float32 plain (lamb)." in page
    for name in ("time", "share"):
        assert (tmp_path / f"machine-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"machine-{name}.png" in page

    monkeypatch.setitem(sys.modules, "benchmarks.plots", None)
    assert report.main(tmp_path) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert ".png" not in (tmp_path / "machine.md").read_text()
    assert report.main(tmp_path / "nothing") == 1


def test_every_group_is_there_once_and_says_what_it_leaves_out() -> None:
    assert len(set(groups())) == len(groups()) == 5 * (len(MODELS) * 4 + len(FLAT))
    cases = every_case(torch.device("cpu"))
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.group for case in cases if case.group.model != "any"} == set(groups())
    assert {c.group.family for c in cases if c.contender and c.group.model == "ptb-large"} == set(FAMILIES)
    assert all(case.status.startswith("not run") for case in cases if case.group.model == "gpt-1.3b")
    assert all(c.contender.peer.installed for c in cases if c.contender and c.contender.peer)
    missing = {row.peer.package for row in CONTENDERS if row.peer and not row.peer.installed}
    assert {case.name for case in cases if case.status == "not installed"} == missing


def test_device_clock_subtracts_to_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        recorded, waited = 0, 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 250.0 * Event.recorded  # ms
            Event.recorded += 1

        def synchronize(self) -> None:
            Event.waited += 1

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.clock_of(torch.device("cuda"))
    start, end = clock(), clock()
    assert Event.waited == 0  # reading the clock must not hold up the host
    assert end - start == 0.25
    assert Event.waited == 1


@pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_graphs_and_launches(family: str) -> None:
    rows = own(family, "cuda", mode="graph")
    outcomes = rounds.time_contenders([*own(family, "cuda"), *rows], setting("cuda"))
    assert all(o.status == "ok" and o.launches for o in outcomes), outcomes
