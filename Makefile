# `make help` lists the targets. PYTHON is the interpreter that makes .venv, 3.11 or later;
# REQUIREMENTS the lock to install: requirements.txt (CPU), requirements-tpu.txt, requirements-cuda.txt.
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CREATED := .venv/.created
INSTALLED := .venv/.installed-$(REQUIREMENTS)
INSTALLED_TEST := .venv/.installed-test
INSTALLED_DOCS := .venv/.installed-docs

.DELETE_ON_ERROR:
.PHONY: help venv venv-test demo test test-slow lint style types format figures docs docs-site lock clean

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

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is not Python 3.11 or later; name one with: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

$(INSTALLED): $(REQUIREMENTS) pyproject.toml | $(CREATED)
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

# `make lock` keeps the versions that still fit; `make lock UPGRADE=--upgrade` takes the newest.
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 $(UPGRADE) \
  --no-header --no-emit-index-url --no-emit-find-links --annotation-style line
define write-lock
$(LOCK) $(2) -o $(1)
@printf '%s\n' '# Made from pyproject.toml by `make lock`; install with pip install --no-deps -r $(1)' \
  | cat - $(1) > $(1).new && mv $(1).new $(1)
endef

lock: $(CREATED)  ## make the requirements files anew from pyproject.toml
	$(PIP) install --quiet uv
	$(call write-lock,requirements.txt,--extra jetstream)
	$(call write-lock,requirements-tpu.txt,--extra jetstream --extra tpu -c requirements.txt)
	$(call write-lock,requirements-cuda.txt,--extra jetstream --extra cuda -c requirements.txt)
	$(call write-lock,requirements-test.txt,--extra test -c requirements.txt)
	$(call write-lock,requirements-docs.txt,--extra docs -c requirements-test.txt)

clean:  ## remove .venv, caches and build leftovers (not runs/)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
