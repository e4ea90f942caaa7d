# make demo | test | check | bench | gpu. Each sets up what it needs, once: a virtual environment, its packages, the build.
PYTHON ?= python3
# The newest torch the project is tested with; for example `make test TORCH=torch==2.13.0`.
TORCH ?= torch==2.14.1

# What `make bench` measures; for example `make bench BENCH=--quick`, `make bench BENCH="--device cuda"`.
BENCH ?= --device cpu

# Options of `make gpu`, see tests/gpu; for example `make gpu GPU="--only 'sanitizer*'"`, `make gpu GPU="--limit 3600"`.
GPU ?=

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test check bench gpu format lint types build info clean

demo: build
	$(BIN)/python -m examples

test: build
	$(BIN)/python -m pytest

check: lint types test

# Results go to benchmarks/results/<device name>; `python -m benchmarks.readme` then renews README's speed section.
bench: build
	$(BIN)/python -m benchmarks $(BENCH)

# Builds for the visible GPU, proves and measures there. With PYTHON given, as in `make gpu PYTHON=python3`, that
# interpreter is taken as it is: nothing is installed, so no network is needed.
ifeq ($(origin PYTHON),file)
gpu: $(PACKAGES)
	cd tests && ../$(BIN)/python -m gpu $(GPU)
else
gpu:
	cd tests && $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON)) -m gpu $(GPU)
endif

build: $(BUILT)

info: build
	$(BIN)/python -m torchce

format: $(PACKAGES)
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(PACKAGES)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(BUILT)
	$(BIN)/mypy

$(PACKAGES): requirements-dev.txt
	@echo "== $(VENV): installing $(TORCH) and the development packages"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -r requirements-dev.txt
	@touch $@

# Object files and their dependencies are kept under build/, so only what changed is compiled.
$(BUILT): $(PACKAGES) setup.py $(SOURCES)
	@echo "== building torchce"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build torchce/*.so
