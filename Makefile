# `make test` and `make demo` set up a virtual environment on first use. Variables you may set on the command line:
#   PYTHON       the interpreter that makes the environment (3.11 or newer)
#   VENV         where the environment is
#   LOWEST       where the one with the oldest versions is (`make test-lowest`; PYTHON must be 3.11 to 3.13 for it)
#   TORCH_INDEX  a package index with PyTorch builds for your device (such as the CPU-only ones): torch and torchvision are
#                then both taken from it. Without it they come from wherever your pip takes packages.
#   JOBS         test processes at a time
#   CIFAR10      a folder with CIFAR-10 as parquet, train-*.parquet and test-*.parquet (`make gpu-bundle`)
#   PART         the parts that `make gpu` runs: tests correctness speed loop; or paper
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
TORCH_INDEX ?=
CIFAR10 ?= ../shared/data/cifar10
PART ?=
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 4))')

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs
LOWEST_STAMP := $(LOWEST)/.installed
# one thread each: several test processes with all cores each get in each other's way
PYTEST = -m pytest -q -n $(JOBS) --dist loadfile
# uv trusts the certificates that this machine trusts, as pip does
export UV_SYSTEM_CERTS ?= 1

.PHONY: help test test-lowest faults demo gpu-bundle gpu gpu-paper docs tables dist style quality audit clean

help:
	@echo "make demo         clean a backdoored classifier of digits, without any network (some minutes)"
	@echo "make test         run the tests"
	@echo "make test-lowest  run the tests with the oldest versions that pyproject.toml allows"
	@echo "make faults       malformed inputs, kills, full disks, faults of the Hub: a table of figures (40 minutes; goes on)"
	@echo "make quality      check format, lint, types, the order of the floors, dependencies, and newer Pythons' versions"
	@echo "make audit        ask for known holes in what hfdetox depends on (needs the network)"
	@echo "make gpu-bundle   put what the machine with a GPU lacks into build/gpu-bundle: wheels, images (CIFAR10=DIR)"
	@echo "make gpu          there, without an environment or a network: GPU tests, CPU against GPU, speed (8 minutes)"
	@echo "make gpu-paper    there: the paper's setting; goes on where it stopped (9 minutes)"
	@echo "make docs         build the documentation into build/docs; a warning is an error"
	@echo "make tables       write the tables of docs/benchmarks.md from tests/benchmarks/results"
	@echo "make dist         build sdist and wheel, check them, install the wheel elsewhere and run its demo there"
	@echo "make style        format, and mend what lint can mend"
	@echo "make clean        remove the virtual environments and caches"

# pyproject.toml is the stamp's source: new dependencies are installed at the next call
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hfdetox needs Python 3.11 or newer, and $(PYTHON) is not; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV); PyTorch is large, so this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/python -m pip install --editable '.[test,trackers]'
	@touch $@

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

# writes build/faults/faults.json as it goes; another call goes on there
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

# exactly the lower bounds of pyproject.toml; what those need is as new as they allow
$(LOWEST_STAMP): pyproject.toml | $(STAMP)
	@echo "installing the oldest versions into $(LOWEST); PyTorch is large, so this takes some minutes"
	$(BIN)/uv venv --quiet --clear --seed --python $(PYTHON) $(LOWEST)
ifneq ($(TORCH_INDEX),)
	$(PYTHON) -c 'import tomllib; deps = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	  print(*(d for d in deps if d.startswith("torch")), sep="\n")' | \
	  $(BIN)/uv pip install --python $(LOWEST) --resolution lowest --no-deps --index-url $(TORCH_INDEX) --requirements -
endif
	$(BIN)/uv pip install --python $(LOWEST) --resolution lowest-direct \
	  --reinstall-package setuptools --editable '.[test]'
	@touch $@

test-lowest: $(LOWEST_STAMP)
	OMP_NUM_THREADS=1 LOWEST_VERSIONS=1 $(LOWEST)/bin/python $(PYTEST) $(ARGS)

# one thread: the figures are then the same whatever else the machine does, and those of the README
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/hfdetox demo $(ARGS)

gpu-bundle: $(STAMP)
	$(BIN)/python -m tests.gpu.bundle --cifar $(CIFAR10) --output build/gpu-bundle $(ARGS)

# from here on the interpreter of the machine, which has PyTorch, and the bundle
gpu:
	$(PYTHON) -m tests.gpu $(if $(PART),--part $(PART)) $(ARGS)

gpu-paper:
	$(PYTHON) -m tests.gpu --part paper $(ARGS)

# what builds the pages is installed when they are built
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@

docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs build/docs

tables: $(STAMP)
	$(BIN)/python -m tests.benchmarks.tables

# what a person gets by `pip install hfdetox`: an environment of its own, outside the clone
dist: $(STAMP)
	rm -rf dist
	$(BIN)/uv build --quiet --python $(BIN)/python
	$(BIN)/uv tool run --quiet twine check --strict dist/*
	place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && \
	  $(BIN)/uv venv --quiet --python $(BIN)/python "$$place/env" && \
	  $(if $(TORCH_INDEX),$(BIN)/uv pip install --quiet --python "$$place/env" --index-url $(TORCH_INDEX) torch torchvision &&) \
	  $(BIN)/uv pip install --quiet --python "$$place/env" dist/*.whl && cd "$$place" && env/bin/hfdetox demo

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry hfdetox
	for python in 3.12 3.13 3.14; do $(BIN)/uv pip compile --quiet --no-build --python-version $$python --extra test \
	  pyproject.toml > /dev/null || exit 1; done

# the newest versions, as a person gets them
audit: $(STAMP)
	file=$$(mktemp) && trap 'rm -f "$$file"' EXIT && \
	  $(BIN)/uv pip compile --quiet --extra sign --extra tensorboard pyproject.toml --output-file "$$file" > /dev/null && \
	  $(BIN)/uv tool run --quiet pip-audit --no-deps --disable-pip --requirement "$$file"

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
