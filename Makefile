# make demo    train the example for some steps and watch it learn
# make test    run every test this machine can run
# make lint    format check, lint, types, layers, spelling
# make bench   time the engines side by side: all claims, or those named in CLAIM
# make tables  rewrite the README's tables from benchmarks/results
#
# PYTHON       the interpreter the environment is made from
# VENV_ARGS    arguments for `python -m venv`; --system-site-packages reuses an installed torch
# CONSTRAINTS  the file of pinned versions; empty to take whatever satisfies pyproject.toml
# WORKERS      test processes
# CLAIM        names that `benchmarks/claims.py --help` lists; without a GPU, toy sizes

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
CLAIM ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(addprefix -c ,$(CONSTRAINTS))
# Every GPU is the launcher's default; where there is none, one CPU rank would shard nothing.
RANKS := $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--num_gpus 2')"
SOURCES := $(wildcard src shim tests tools examples benchmarks)

.PHONY: demo test lint format bench tables reference clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@ranks=$$($(RANKS)) && set -x && \
	$(BIN)/zeroshard $$ranks examples/train_lm.py --deepspeed_config examples/ds_config.json

# The libraries that tests/compat loads would make every fork of the other tests slow.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --ignore tests/compat $(PYTEST_ARGS)
	$(BIN)/python -m pytest -n $(WORKERS) tests/compat $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/.installed-test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/claims.py $(CLAIM)

tables: $(VENV)/.installed
	$(BIN)/python benchmarks/tables.py

reference: $(VENV)/.installed
	$(BIN)/python tools/make_reference.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing venv installs, so a half-made environment is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

# The build backend goes in first, from the same pins, because an isolated build would fetch its own.
$(VENV)/.installed: pyproject.toml shim/pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e . -e ./shim
	touch $@

$(VENV)/.installed-test: pyproject.toml shim/pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e '.[test,compat,bench]' -e ./shim
	touch $@ $(VENV)/.installed $(VENV)/.installed-bench

# Without the stand-in for DeepSpeed, so that DeepSpeed itself may be installed beside it.
$(VENV)/.installed-bench: pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e '.[bench]'
	touch $@
