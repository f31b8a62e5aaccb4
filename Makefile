# Sets up the active virtual environment, or .venv, and runs things in it.
#   make quickstart    pre-train on digits, extract and evaluate subnets (minutes on a CPU); RUN=folder,
#                      BACKBONE=vit, swin or resnet
#   make test          the test suite
#   make test-oldest   the test suite with the oldest versions that setup.py claims, in .venv-oldest
#   make test-newest   the same with the newest that were tried, timm, ONNX, an S3 server and datasets, in
#                      .venv-newest
#   make test-gpu      the tests that need a GPU
#   make sanitize      those of the kernels without a GPU, every access and race checked; in .venv-sanitize
#   make bench         tests, kernels and steps against their peers on a GPU, in 9 minutes; RESUME=1 resumes,
#                      OFFICIAL=checkout of alipay/POA
#   make kernel-report compile every Triton kernel for every kind of GPU, without one; WRITE=1 replaces the table
#   make lint          ruff, ruff format, mypy
#   make map           write MAP.md, a line a file, from the first lines of the files
# Other versions: make test VENV=folder CONSTRAINTS=my-constraints.txt; constraints/ holds those that were tried

VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
CONSTRAINTS ?= constraints/ci.txt
BIN := $(VENV)/bin
PROCESSES ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 2)")  # of tests: many wait for others
SANITIZE_VENV := .venv-sanitize
SANITIZER := triton==3.8.0 ttsem==0.1.0  # ttsem executes what this Triton makes; Python 3.11 or newer

.PHONY: quickstart test test-oldest test-newest test-gpu sanitize bench kernel-report lint map clean

quickstart: $(VENV)/.poa-quickstart
	$(BIN)/python -m poa quickstart $(if $(BACKBONE),--backbone $(BACKBONE)) $(if $(RUN),--out $(RUN))

test: $(VENV)/.poa-test
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints/newest.txt EXTRAS=timm,export,detection,references,stores

test-gpu: $(VENV)/.poa-test
	$(BIN)/python -m pytest -rs -m cuda

sanitize: $(SANITIZE_VENV)/.poa-sanitizer
	ELASTIC_KERNELS_LANE=sanitized OMP_NUM_THREADS=1 $(SANITIZE_VENV)/bin/python -m pytest -q -n auto \
		--every-kernel tests/kernels/device tests/kernels/sanitized

bench: $(VENV)/.poa-test
	$(BIN)/python -m benchmarks gpu $(if $(OFFICIAL),--official $(OFFICIAL)) $(if $(RESUME),--resume)

kernel-report: $(VENV)/.poa-test
	$(BIN)/python -m benchmarks.kernel_report $(if $(WRITE),--write)

lint: $(VENV)/.poa-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

map:
	$(PYTHON) tests/test_map.py

clean:
	rm -rf .venv .venv-oldest .venv-newest $(SANITIZE_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(SANITIZE_VENV)/.poa-sanitizer: setup.py $(CONSTRAINTS) Makefile
	$(MAKE) VENV=$(SANITIZE_VENV) $(SANITIZE_VENV)/.poa-sanitize
	$(SANITIZE_VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python $(SANITIZER)
	touch $@

$(VENV)/.poa-%: setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS:%=-c %) -e '.[$*$(EXTRAS:%=,%)]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # on all cores; some files are templates
	touch $@
