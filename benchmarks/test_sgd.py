"""SGD with momentum and weight decay, float32: a step at a scheduled LR."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import DEVICE
from .contenders import Contender, contenders
from .shapes import MODELS
from .timing import clock_of, measure


@pytest.mark.benchmark(timer=clock_of(DEVICE))
@pytest.mark.parametrize("contender", contenders("sgd", DEVICE), ids=lambda row: row.name)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: Any, model: str, contender: Contender) -> None:
    benchmark.group = f"SGD, {model}"
    measure(benchmark, contender, MODELS[model](), DEVICE)
