# Needs Python 3.11 or newer and pip; the suite also a C compiler, since reasoning-gym requires pycosat, which has no
# wheel. Choose a Python with `make quickstart PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
python = $(VENV)/bin/python
pip = $(python) -m pip --quiet
torch = $(shell grep '^torch==' requirements-test.lock)

.PHONY: help quickstart test lint lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.runtime ## Distil the quickstart's student on this machine, from teacher to report
	$(python) -m distill.run experiments/quickstart.py $(ARGS)

test: $(VENV)/.test ## Run the suite: make test ARGS="tests/qwen3 -k rope"
	$(python) -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15 $(ARGS)

lint: $(VENV)/.test ## Check style, format and types, as the suite does
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# The build backend comes first: packages that the index has only as source are built with the pinned one.
$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one that is: make $(or $(MAKECMDGOALS),quickstart) PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing the run-time packages into $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(pip) install --constraint requirements.lock setuptools
	@$(pip) install --no-build-isolation --requirement requirements.lock || { echo "$$BUILD_HINT" >&2; exit 1; }
	@$(pip) install --no-build-isolation --no-deps --editable .
	@touch $@

# torch goes alone and first, so that no other package chooses its version.
$(VENV)/.test: requirements-test.lock $(VENV)/.runtime
	@echo "Installing the test packages into $(VENV) (once, some minutes)"
	@$(pip) install --constraint requirements.lock $(torch)
	@$(pip) install --no-build-isolation --requirement requirements-test.lock || { echo "$$BUILD_HINT" >&2; exit 1; }
	@touch $@

export BUILD_HINT = error: packages did not install, see above; if one failed to build, a C compiler is missing \
  (Debian: apt-get install gcc python3-dev; macOS: xcode-select --install)

lock: ## Resolve pyproject.toml afresh into requirements*.lock
	@PYTHON=$(PYTHON) .ci/lock

clean: ## Remove the environment; runs/ stays
	rm -rf $(VENV) build *.egg-info
