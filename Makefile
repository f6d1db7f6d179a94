# make bench: everything measured, with a report.   make test: everything checked.   Both work from a bare clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.h csrc/*/*) CMakeLists.txt setup.py pyproject.toml requirements-dev.txt

.PHONY: setup bench test test-slow lint clean

setup: $(READY)

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(READY): $(VENV)/.installed $(SOURCES)
	RMT_KERNELS_CPU=1 PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

bench: setup
	$(BIN)/python -m benchmarks $(if $(FULL),--full) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest --slow $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf build dist *.egg-info rmt_kernels/*.so $(VENV)
