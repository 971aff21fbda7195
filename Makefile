# Two commands for a newcomer: `make ask` and `make test`. Both set up .venv first and may be repeated.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
QUESTION ?= When is the red circle visible?

.PHONY: ask test lint setup setup-dev clean

ask: setup
	$(BIN)/openkeye ask openkeye/media/demo.mp4 "$(QUESTION)"

# A process for each core, with one thread each: the tests' products are too small to share out.
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 15

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy openkeye

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

# The CPU build of PyTorch is chosen first, so that the package's own range finds it and takes nothing larger.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
