# Needs Python 3.11 or newer and pip; the suite also a C compiler, since reasoning-gym requires pycosat, which has no
# wheel. Choose a Python with `make quickstart PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
COMPILE_VENV ?= .venv-compile
TARGETS ?= v5e,v5p,v6e,tpu7x,h100
WORKERS ?= 2
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
python = $(VENV)/bin/python
pip = $(python) -m pip --quiet
torch = $(shell grep '^torch==' requirements-test.lock)

.PHONY: help quickstart test test-long test-compile compile-all lint lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.runtime ## Distil the quickstart's student on this machine, from teacher to report
	$(python) -m distill.run experiments/quickstart.py $(ARGS)

test: $(VENV)/.test ## Run the suite: make test ARGS="tests/qwen3 -k rope"
	$(python) -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15 $(ARGS)

test-long: $(VENV)/.test ## Run the proofs that take minutes each: kills, memory, a teacher on devices of its own
	$(python) -m pytest -m long --durations 0 $(ARGS)

test-compile: $(COMPILE_VENV)/.compilers ## Compile some kernels for TARGETS and a 235B teacher for 64 TPUs: none need be here
	$(COMPILE_VENV)/bin/python -m experiments.benchmarks.kernels --compile $(TARGETS) --subset $(ARGS)
	$(COMPILE_VENV)/bin/python -m experiments.benchmarks.programs --subset

compile-all: $(COMPILE_VENV)/.compilers ## Compile every kernel at every shape for TARGETS, and every experiment's programs
	$(COMPILE_VENV)/bin/python -m experiments.benchmarks.kernels --compile $(TARGETS) $(ARGS); kernels=$$?; \
	  $(COMPILE_VENV)/bin/python -m experiments.benchmarks.programs && exit $$kernels

lint: $(VENV)/.test ## Check style, format and types, as the suite does
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# The build backend comes first: packages that the index has only as source are built with the pinned one.
%/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one that is: make $(or $(MAKECMDGOALS),quickstart) PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing the run-time packages into $* (once, some minutes)"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip --quiet install --constraint requirements.lock setuptools
	@$*/bin/python -m pip --quiet install --no-build-isolation --requirement requirements.lock || { echo "$$BUILD_HINT" >&2; exit 1; }
	@$*/bin/python -m pip --quiet install --no-build-isolation --no-deps --editable .
	@touch $@

# torch goes alone and first, so that no other package chooses its version.
$(VENV)/.test: requirements-test.lock $(VENV)/.runtime
	@echo "Installing the test packages into $(VENV) (once, some minutes)"
	@$(pip) install --constraint requirements.lock $(torch)
	@$(pip) install --no-build-isolation --requirement requirements-test.lock || { echo "$$BUILD_HINT" >&2; exit 1; }
	@touch $@

$(COMPILE_VENV)/.compilers: requirements-compile.lock $(COMPILE_VENV)/.runtime
	@echo "Installing the compilers for TPUs and GPUs into $(COMPILE_VENV) (once, a download of 1 GB)"
	@$(COMPILE_VENV)/bin/python -m pip --quiet install --requirement requirements-compile.lock || \
	  { echo "error: the compilers did not install, see above; they need Linux on x86-64, 3 GB of disk, and a package index that has every version in requirements-compile.lock" >&2; exit 1; }
	@touch $@

export BUILD_HINT = error: packages did not install, see above; if one failed to build, a C compiler is missing \
  (Debian: apt-get install gcc python3-dev; macOS: xcode-select --install)

lock: ## Resolve pyproject.toml afresh into requirements*.lock
	@PYTHON=$(PYTHON) .ci/lock

clean: ## Remove the environments; runs/ stays
	rm -rf $(VENV) $(COMPILE_VENV) build *.egg-info
