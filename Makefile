PYTHON ?= python3
BACKENDS := tensorflow jax torch
# Empty means: tensorflow for the demo, all three backends in turn for everything else.
BACKEND ?=
TESTS ?=
# A file of constraints for pip, for `make release-check`.
CONSTRAINTS ?=
JOBS ?= 3
# Where `make docs` builds the site, and the port of `make docs-serve`.
SITE ?= site
PORT ?= 8000

BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.docs-installed
TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_CPP_MIN_LOG_LEVEL

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-versions release-check lint types bench docs docs-links docs-serve clean

help:  ## list the targets
	@echo "make TARGET [BACKEND=tensorflow|jax|torch]; .venv is created when it is first needed"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-15s %s\n", $$1, $$2 }'

$(INSTALLED): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "keras-gradtools needs Python 3.11 or newer, and '$(PYTHON)' is not: choose one with make PYTHON=..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing the package, the three backends and the development tools into .venv" \
		"(takes several minutes the first time, without output)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@
	@echo "Installed"

$(DOCS_INSTALLED): $(INSTALLED) requirements-docs.txt
	@echo "Installing the tools that build the documentation into .venv"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-docs.txt
	@touch $@

demo: $(INSTALLED)  ## train a digit classifier in four ways, attack each one and compare; BACKEND=tensorflow by default
	@KERAS_BACKEND=$(or $(BACKEND),tensorflow) $(BIN)/python examples/demo.py

test: $(INSTALLED)  ## run the tests, one process for each backend; narrow with BACKEND=jax TESTS=tests/test_x.py
	@$(BIN)/python tests/run.py --jobs $(JOBS) $(addprefix --backend ,$(BACKEND)) $(TESTS)

test-slow: $(INSTALLED)  ## run only the tests marked slow, one process for each backend
	@$(BIN)/python tests/run.py --slow --jobs $(JOBS) $(addprefix --backend ,$(BACKEND)) $(TESTS)

test-versions: $(INSTALLED)  ## run the tests that depend on internals on the oldest, newest and next versions; large downloads
	@$(BIN)/python tests/versions.py $(addprefix --backend ,$(BACKEND)) $(TESTS)

release-check: $(INSTALLED)  ## build the package and test the wheel with each backend alone; CONSTRAINTS=file for pip
	@$(BIN)/python release/check.py $(addprefix --backend ,$(BACKEND)) $(addprefix --constraints ,$(CONSTRAINTS)) $(TESTS)

lint: $(INSTALLED)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(INSTALLED)  ## check types with mypy
	@$(BIN)/mypy
	@$(BIN)/mypy --strict --follow-imports=silent tests/annotations/user_code.py

bench: $(INSTALLED)  ## compare speed with hand-written code, one backend after the other
	@$(BIN)/python -m benchmarks.run $(addprefix --backend ,$(BACKEND))

docs: $(DOCS_INSTALLED)  ## build the site into site/ and run its notebooks; BACKEND=tensorflow by default
	@KERAS_BACKEND=$(or $(BACKEND),tensorflow) $(BIN)/python -m sphinx -W --keep-going -q -d out/docs/doctrees docs $(SITE)
	@echo "Open $(SITE)/index.html, or run make docs-serve"

docs-links: $(DOCS_INSTALLED)  ## check the links inside the site; the pages' code runs as for make docs
	@KERAS_BACKEND=$(or $(BACKEND),tensorflow) $(BIN)/python -m sphinx -b linkcheck -W --keep-going -q -d out/docs/doctrees docs out/docs/links

docs-serve:  ## serve site/ at http://localhost:8000; another port with PORT=8080
	@$(PYTHON) -m http.server --directory $(SITE) $(PORT)

clean:  ## remove everything that the targets create, except .venv
	@rm -rf .venvs site out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
