# Each target but `gpu` sets itself up: the first run makes .venv, later runs reuse it until the pinned requirements
# change. `gpu` takes the torch of the machine: PYTHON, which needs torch, triton, numpy, pytest and pytest-benchmark.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS := .venv-docs

.PHONY: demo test quick codes lint codegen examples bench report docs gpu dist clean

demo: $(READY)
	$(BIN)/fused-legw demo

# Both gates, the first in four parts, the longest first; each keeps one core busy.
PARTS := 1 2 0 3
test: $(READY)
	$(MAKE) --jobs=2 --keep-going --no-print-directory $(PARTS:%=values-%) codes

values-%: $(READY)
	TRITON_INTERPRET=1 $(BIN)/pytest -m "not codegen" $$($(BIN)/python tests/support/deal.py $* $(words $(PARTS)))

codes: $(READY)
	$(BIN)/pytest -m codegen

# For people at work: half a minute on two cores, with ATen alone.
quick: $(READY)
	$(MAKE) --jobs=2 --no-print-directory quick-optim quick-rest

quick-optim quick-rest: quick-%: $(READY)
	$(BIN)/pytest -q -m "not codegen" $(QUICK_$*)

QUICK_optim := tests/optim tests/training/test_follow_schedule.py
QUICK_rest := $(addprefix tests/schedules/test_,legw.py legw_errors.py batch_changes.py) tests/buffers tests/docs/test_docstrings.py \
	$(addprefix tests/contract/test_,contract.py outside.py torch_errors.py torch_private.py)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

codegen: $(READY)
	PYTHONPATH=kernels $(BIN)/python -m tests.codegen_table

# OMP_WAIT_POLICY: threads that spin while they wait take the cores from each other.
bench: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/pytest benchmarks -v --record --benchmark-only --benchmark-quiet --benchmark-max-time=0.5 $(BENCH)

# Each application at its baseline and at its largest batch by LEGW; ends early where a baseline misses its target.
examples: $(READY)
	for name in mnist_lstm mnist1d ptb_small ptb_large gnmt resnet; do $(BIN)/python -m examples.$$name --quick || exit 1; done

report: $(READY)
	$(BIN)/python -m benchmarks.report

# Wheel and sdist, as a release would upload them.
dist: $(READY)
	$(BIN)/python -m build --no-isolation

# The site, into out/site; a broken link, anchor or reference ends it.
docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

gpu:
	$(PYTHON) -m tests.gpu $(ARGS)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "fused-legw needs Python 3.10 or later")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(DOCS)/ready: docs/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) out site dist .benchmarks .pytest_cache .mypy_cache .ruff_cache
