# make demo | test | check | bench | gpu. Each sets up what it needs, once: a virtual environment, its packages, the build.
PYTHON ?= python3
# The torch that development is done with; for example `make test TORCH=torch==2.13.0`.
TORCH ?= torch==2.14.1

# What `make bench` measures; for example `make bench BENCH=--quick`, `make bench BENCH="--device cuda"`.
BENCH ?= --device cpu

# Options of `make gpu`, see tests/gpu; for example `make gpu GPU="--only 'sanitizer*'"`, `make gpu GPU=--rehearse`.
GPU ?=
GPU_OPTIONS = $(if $(VARIANTS),--variants "$(VARIANTS)") $(GPU)
GPU_PYTHON ?= $(PYTHON)
GPU_ARCH ?= 9.0

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built
SEARCH := PYTHONPATH="tests:.$(if $(PYTHONPATH),:$(PYTHONPATH))"
SOURCES := $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-large fuzz sanitize check bench gpu gpu-carry variant format lint types build info clean

demo: build
	$(BIN)/python -m examples

test: build
	$(BIN)/python -m pytest

# Beyond 2^31 elements: minutes, and up to 15 GiB of memory.
test-large: build
	$(BIN)/python -m pytest tests/test_large.py --large -rs

# 5000 problems for each of the six fuzz tests, new ones each time.
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

# Everything that needs a GPU, within ten minutes; the table comes last. With PYTHON given, as in `make gpu PYTHON=python3`,
# that interpreter is taken as it is: nothing is installed, so no network is needed. `make gpu GPU=--rehearse` needs no GPU.
ifeq ($(origin PYTHON),file)
gpu: $(PACKAGES)
	$(SEARCH) $(BIN)/python -m gpu $(GPU_OPTIONS)
else
gpu:
	$(SEARCH) $(PYTHON) -m gpu $(GPU_OPTIONS)
endif

# What a GPU machine without a network needs, collected in .gpu/; `make gpu` there takes it. GPU_PYTHON is an interpreter of
# the same version as that machine's, with the same torch, ninja, pybind11 and setuptools; GPU_ARCH its compute capability.
gpu-carry:
	$(SEARCH) $(PYTHON) -m gpu.carry --python $(GPU_PYTHON) --arch $(GPU_ARCH)

# One build of `make gpu VARIANTS="baseline tuned"`: `make variant NAME=baseline REV=HEAD~3`; without REV the files as they are.
variant:
	$(SEARCH) $(PYTHON) -m gpu.carry --python $(GPU_PYTHON) --arch $(GPU_ARCH) \
	  --variant $(or $(NAME),$(error NAME=... is missing)) $(if $(REV),--revision $(REV))

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
$(BUILT): $(PACKAGES) setup.py build_plan.py $(SOURCES)
	@echo "== building torchce"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build torchce/*.so
