# Sets up the active virtual environment, or .venv, and runs things in it.
#   make quickstart    pre-train on digits, extract and evaluate subnets (minutes on a CPU); RUN=folder,
#                      BACKBONE=vit, swin or resnet
#   make test          the test suite
#   make test-gpu      the tests that need a GPU
#   make bench         measure kernels and steps against their peers on a GPU; OFFICIAL=checkout of alipay/POA
#   make kernel-report compile every Triton kernel for every kind of GPU, without one; WRITE=1 replaces the table
#   make lint          ruff, ruff format, mypy
# Other versions: make test CONSTRAINTS=   (newest) or CONSTRAINTS="-c my-constraints.txt"

VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin

.PHONY: quickstart test test-gpu bench kernel-report lint clean

quickstart: $(VENV)/.poa-quickstart
	$(BIN)/python -m poa quickstart $(if $(BACKBONE),--backbone $(BACKBONE)) $(if $(RUN),--out $(RUN))

test: $(VENV)/.poa-test
	$(BIN)/python -m pytest

test-gpu: $(VENV)/.poa-test
	$(BIN)/python -m pytest -rs -m cuda

bench: $(VENV)/.poa-test
	$(BIN)/python -m benchmarks gpu $(if $(OFFICIAL),--official $(OFFICIAL))

kernel-report: $(VENV)/.poa-test
	$(BIN)/python -m benchmarks.kernel_report $(if $(WRITE),--write)

lint: $(VENV)/.poa-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.poa-%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$*]'
	touch $@
