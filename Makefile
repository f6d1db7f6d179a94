# make bench: everything measured, with a report.   make test: everything checked.   Both work from a bare clone.
# make gpu: both, on a GPU.   make gate: the Triton kernels compiled for GPUs that need not be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.h csrc/*/*) CMakeLists.txt setup.py pyproject.toml requirements-dev.txt

.PHONY: setup bench gpu gate test test-slow lint clean

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

# On a machine with a GPU, whose own PyTorch and Triton are taken: make gpu PYTHON=python3.12 ARGS="--resume"
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gate: setup
	$(BIN)/python -m rmt_kernels.backends.triton.gate $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest --slow $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf build dist *.egg-info rmt_kernels/*.so $(VENV)
