# make bench: everything measured, with a report.   make test: everything checked.   Both work from a bare clone.
# make gpu: both, on a GPU.   make gate: the Triton kernels compiled for GPUs that need not be there.
# make cuda: the CUDA extension, which takes minutes, for sm_80 and sm_90a.   make cuda-all: every type and architecture.
PYTHON ?= python3
VENV   := .venv
WORKERS ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.h csrc/*/*.* csrc/*/*/*.*) CMakeLists.txt setup.py pyproject.toml requirements-dev.txt
BUILD_ENV := PATH="$(abspath $(BIN)):$$PATH" RMT_KERNELS_CPU=1 RMT_KERNELS_EMULATED=1

.PHONY: setup cuda cuda-all bench gpu gate test test-slow test-oldest lint clean

setup: $(READY)

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(READY): $(VENV)/.installed $(SOURCES)
	$(BUILD_ENV) RMT_KERNELS_CUDA=$(or $(RMT_KERNELS_CUDA),0) \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

cuda-all: export RMT_KERNELS_CUDA_ALL = 1
cuda cuda-all: setup
	$(BUILD_ENV) RMT_KERNELS_CUDA=1 $(BIN)/python setup.py build_ext --inplace

bench: setup
	$(BIN)/python -m benchmarks $(if $(FULL),--full) $(ARGS)

# On a machine with a GPU, whose own PyTorch and Triton are taken: make gpu PYTHON=python3.12 ARGS="--resume"
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gate: setup
	$(BIN)/python -m rmt_kernels.backends.triton.gate $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest --slow --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# What stands on transformers, on the oldest version of each major one that is supported.
OLDEST := build/transformers-4 build/transformers-5

$(OLDEST:=/.installed): build/%/.installed: requirements-%.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) -r $<
	@touch $@

test-oldest: setup $(OLDEST:=/.installed)
	set -e; for oldest in $(OLDEST); do \
	  PYTHONPATH=$(CURDIR)/$$oldest $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
	    tests/test_transformers.py tests/test_transformers_models.py tests/test_transformers_generation.py \
	    tests/test_transformers_faults.py tests/test_transformers_parallel.py tests/test_huggingface_examples.py; done

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf build dist *.egg-info rmt_kernels/*.so rmt_kernels/_built.json $(VENV)
