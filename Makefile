# make demo | test | check | bench | gpu. Each sets up what it needs, once: a virtual environment, its packages, the build.
PYTHON ?= python3
# The torch that development is done with; for example `make test TORCH=torch==2.13.0`.
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

.PHONY: demo test test-large fuzz sanitize check bench gpu format lint types build info clean

demo: build
	$(BIN)/python -m examples

test: build
	$(BIN)/python -m pytest

# Beyond 2^31 elements: minutes, and up to 15 GiB of memory.
test-large: build
	$(BIN)/python -m pytest tests/test_large.py --large -rs

# 5000 problems for each of the five fuzz tests, new ones each time.
fuzz: build
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz

# The whole suite on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer. Python itself is not built so:
# the runtimes are loaded first, leaks (Python's own) are not looked for, and Python's allocator makes way for the checked one.
# The emulated CUDA kernels have sanitizers of their own in every run of the tests.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := build/sanitize/lib
sanitize: $(PACKAGES)
	TORCHCE_CUDA=0 CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	    $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	  $(BIN)/python -m pytest -p no:cacheprovider -o "pythonpath=$(SANITIZED) tests" \
	    --ignore=tests/test_cuda_emulation.py

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
