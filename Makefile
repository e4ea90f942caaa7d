# make demo | test | check. Each sets up what it needs, once: a virtual environment, its packages, the build.
PYTHON ?= python3
# The newest torch the project is tested with; for example `make test TORCH=torch==2.13.0`.
TORCH ?= torch==2.14.1

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test check format lint types build info clean

demo: build
	$(BIN)/python -m examples

test: build
	$(BIN)/python -m pytest

check: lint types test

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
