"""What the schedule refuses: always a ValueError that names the argument and its value."""

from __future__ import annotations

import math

import pytest

from fused_legw import LEGW, Cosine, Exponential, MultiStep, Polynomial

RECIPE = dict(base_lr=0.1, base_batch_size=32, base_warmup_epochs=0.5, batch_size=128, dataset_size=1000, epochs=12)

BAD_NUMBERS = [10**400, math.nan, math.inf, -math.inf, -1, -0.5, True, "0.1", None, 1j, [1.0]]
BAD_COUNTS = [10**400, 0, -1, 1.5, 2.0, math.nan, math.inf, True, "32", None]
BAD_ARGUMENTS = {
    "base_lr": [*BAD_NUMBERS, 0],
    "base_batch_size": BAD_COUNTS,
    "base_warmup_epochs": BAD_NUMBERS,
    "batch_size": BAD_COUNTS,
    "dataset_size": BAD_COUNTS,
    "epochs": [bad for bad in BAD_NUMBERS if bad is not None] + [0],
    "steps_per_epoch": [bad for bad in BAD_NUMBERS if bad is not None] + [0],
    "decay": [None, "cosine", Cosine, 0.1, {}],
    "scaling": ["log", "", None, 1, ["sqrt"]],
}
BAD_OPTIONS = {
    (MultiStep, "milestones"): [5, "12", None, (2.0, 1.0), (1.0, 1.0), {1, 2}],
    (MultiStep, "factor"): [*BAD_NUMBERS, 0],
    (Exponential, "rate"): [*BAD_NUMBERS, 0],
    (Exponential, "start_epoch"): BAD_NUMBERS,
    (Exponential, "every_epochs"): [*BAD_NUMBERS, 0],
    (Exponential, "staircase"): [0, 1, None, "yes"],
    (Polynomial, "power"): [*BAD_NUMBERS, 0],
    (Polynomial, "end_lr"): BAD_NUMBERS,
    (Polynomial, "span"): ["half", None, 0],
    (Cosine, "end_lr"): BAD_NUMBERS,
}
GOOD_OPTIONS = {MultiStep: {"milestones": [1]}, Exponential: {"rate": 0.5, "start_epoch": 1}}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, values in BAD_ARGUMENTS.items() for bad in values])
def test_bad_argument_is_named_with_its_value(name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
        LEGW(**{**RECIPE, name: bad})
    assert str(error.value).endswith(repr(bad))


@pytest.mark.parametrize(("cls", "name", "bad"), [(*key, bad) for key, values in BAD_OPTIONS.items() for bad in values])
def test_bad_option_of_a_decay_is_named_with_its_value(cls, name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
        cls(**{**GOOD_OPTIONS.get(cls, {}), name: bad})
    assert str(error.value).endswith(repr(bad))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, 0, True, "1", None])
def test_bad_milestone_is_named_with_its_value(bad):
    with pytest.raises(ValueError, match=f"^milestones must be a finite positive number, got {bad!r}$"):
        MultiStep([bad])


@pytest.mark.parametrize("bad", [-1, 1.0, True, "3", None, math.nan])
def test_bad_update_is_named_with_its_value(bad):
    with pytest.raises(ValueError, match=f"^t must be an integer, zero or more, got {bad!r}$"):
        LEGW(**RECIPE)(bad)


@pytest.mark.parametrize("decay", [Polynomial(), Polynomial(span="whole"), Cosine()])
def test_decays_that_end_need_epochs_past_the_warmup(decay):
    name = type(decay).__name__
    with pytest.raises(ValueError, match=f"^epochs must be given for decay={name}, got None"):
        LEGW(**{**RECIPE, "epochs": None}, decay=decay)
    with pytest.raises(ValueError, match=r"^epochs=2.* ends the run .* warmup_steps=15\.625 \(2 epochs\)"):
        LEGW(**{**RECIPE, "epochs": 2}, decay=decay)
    LEGW(**{**RECIPE, "epochs": 2})  # a constant does not care


@pytest.mark.parametrize("decay", [Polynomial(end_lr=0.3), Cosine(0.3)])
def test_end_lr_above_the_peak_is_refused(decay):
    with pytest.raises(ValueError, match=r"^end_lr must be at most the peak LR 0\.2, got 0\.3"):
        LEGW(**RECIPE, decay=decay)


@pytest.mark.parametrize("values", [{}, {"decay": 3}, {"decay": {}}, None])
def test_from_dict_refuses_what_is_no_schedule(values):
    with pytest.raises(ValueError, match="schedule must be what"):
        LEGW.from_dict(values)


def test_from_dict_names_what_it_does_not_know():
    values = LEGW(**RECIPE).to_dict()
    with pytest.raises(ValueError, match=r"decay must be one of .*, got 'Step'"):
        LEGW.from_dict({**values, "decay": {"name": "Step"}})
    with pytest.raises(ValueError, match="gamma"):
        LEGW.from_dict({**values, "gamma": 1})


def test_a_peak_past_the_floats():
    with pytest.raises(
        ValueError, match=r"^base_lr must be small enough for a finite peak LR at batch_size=128, got 1e\+308$"
    ):
        LEGW(**{**RECIPE, "base_lr": 1e308})
