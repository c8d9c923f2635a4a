# `make help` lists the targets. PYTHON is the interpreter that makes VENV: 3.11 or later, for an
# accelerator 3.12 or later. REQUIREMENTS is the lock to install: requirements.txt (CPU),
# requirements-tpu.txt, requirements-cuda13.txt, or requirements-cuda12.txt for an older driver.
PYTHON ?= python3
PYTHON312 ?= python3.12
REQUIREMENTS ?= requirements.txt
PYTEST_ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed-$(REQUIREMENTS)
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_DOCS := $(VENV)/.installed-docs
OLDEST_PYTHON := 3.$(if $(filter requirements-%,$(REQUIREMENTS)),12,11)

.DELETE_ON_ERROR:
.PHONY: help venv venv-test demo test test-slow test-newest lint style types format \
  figures docs docs-site lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(INSTALLED)  ## make .venv with the locked dependencies and the project itself

venv-test: $(INSTALLED_TEST)  ## the same, with what the tests need

demo: venv  ## the quickstart: a tiny model learns to reason, in minutes on a CPU
	$(BIN)/nrt-jax train quickstart/sft
	$(BIN)/nrt-jax train quickstart/nrt
	$(BIN)/nrt-jax report runs/quickstart/sft runs/quickstart/nrt --out runs/quickstart

PYTEST := $(BIN)/python -m pytest -n 2

# The type checker takes one core for half a minute: it runs beside the tests and is printed after them.
test: style  ## linters, type checks, import contracts, and the tests that are not slow
	@types=$$(mktemp); $(MAKE) --no-print-directory types >$$types 2>&1 & checker=$$!; \
	  $(PYTEST) -m "not slow" $(PYTEST_ARGS); tested=$$?; \
	  wait $$checker; checked=$$?; \
	  cat $$types; rm $$types; exit $$((tested | checked))

test-slow: venv-test  ## the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

# Objective, models and engine hold nearly all that another jax can break; training runs it all together.
NEWEST_TESTS := tests/objective tests/models tests/engine tests/training

test-newest:  ## the tests that meet jax most, with PYTHON312 and its newer jax, in .venv-newest
	$(MAKE) --no-print-directory VENV=.venv-newest PYTHON=$(PYTHON312) venv-test
	.venv-newest/bin/python -m pytest -n 2 -m "not slow" $(NEWEST_TESTS) $(PYTEST_ARGS)

lint: style types  ## linters, type checks and import contracts

style: venv-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: venv-test
	$(BIN)/basedpyright

format: venv-test  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

figures: venv  ## after demo: its figures into docs/figures.json and the README
	$(BIN)/python docs/figures.py quickstart runs/quickstart

docs: venv  ## make docs/configuration.md anew from the schema
	$(BIN)/python docs/generate_configuration.py

docs-site: $(INSTALLED_DOCS)  ## the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# $(call check-python,INTERPRETER,WHAT TO DO)
define check-python
@$(1) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST_PYTHON)".split("."))))' || { \
  echo "make: $(REQUIREMENTS) needs Python $(OLDEST_PYTHON) or later and $(1) is not; $(2)" >&2; exit 1; }
endef

$(CREATED):
	$(call check-python,$(PYTHON),name one with: make PYTHON=/path/to/python$(OLDEST_PYTHON))
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(INSTALLED): $(REQUIREMENTS) pyproject.toml | $(CREATED)
	$(call check-python,$(BIN)/python,remove $(VENV) and make it anew)
	$(PIP) install --quiet --no-deps -r $(REQUIREMENTS)
	$(PIP) install --quiet --no-deps -e .
	@touch $@

# The last line adds the CUDA libraries where pip's torch is built for CUDA; elsewhere it does nothing.
$(INSTALLED_TEST): requirements-test.txt $(INSTALLED)
	$(PIP) install --quiet --no-deps -r requirements-test.txt
	$(PIP) install --quiet -c requirements-test.txt torch
	@touch $@

$(INSTALLED_DOCS): requirements-docs.txt $(INSTALLED)
	$(PIP) install --quiet --no-deps -r requirements-docs.txt
	@touch $@

# `make lock` keeps the versions that still fit; `make lock UPGRADE=--upgrade` takes the newest. A lock
# for accelerators has one jax, that of Python 3.12 and later; the others have two, with markers.
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal $(UPGRADE) --no-header \
  --no-emit-index-url --no-emit-find-links --annotation-style line
define write-lock
$(LOCK) --python-version $(2) $(3) -o $(1)
@printf '%s\n' '# Made from pyproject.toml by `make lock`; install with pip install --no-deps -r $(1)' \
  | cat - $(1) > $(1).new && mv $(1).new $(1)
endef

lock: $(CREATED)  ## make the requirements files anew from pyproject.toml
	$(PIP) install --quiet uv
	$(call write-lock,requirements.txt,3.11,--extra jetstream)
	$(call write-lock,requirements-tpu.txt,3.12,--extra jetstream --extra tpu -c requirements.txt)
	$(call write-lock,requirements-cuda13.txt,3.12,--extra jetstream --extra cuda13 -c requirements.txt)
	$(call write-lock,requirements-cuda12.txt,3.12,--extra jetstream --extra cuda12 -c requirements.txt)
	$(call write-lock,requirements-test.txt,3.11,--extra test -c requirements.txt)
	$(call write-lock,requirements-docs.txt,3.11,--extra docs -c requirements-test.txt)

clean:  ## remove the environments, caches and build leftovers (not runs/)
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
