# The repository's commands; `make` alone lists them. What needs an environment makes it first, in .venv.

PYTHON ?= python3
WORKERS ?= 2
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= --quick

BIN := .venv/bin
# What is installed: deadhead and what it needs, and all that tests need.
CORE := .venv/.core
INSTALLED := .venv/.installed
# Stands from the first to the last step of an installation, so that an interrupted one is seen and done anew.
INCOMPLETE := .venv/.incomplete
TRANSFORMERS_TESTS := .venv/transformers-tests
VLLM := .venv-vllm

# The lists name every package at its version, so there is nothing to resolve; Python compiles what it imports.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile $(PIP_ARGS)
# The tests that one worker has left are shared with another that has none; those of a file stay together before.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: anew help install llama-cpp vllm browser demo demo-llm test test-slow test-full test-transformers lint docs bench release-check wheel clean

help: ## list these targets
	@echo 'Usage: make TARGET [PYTHON=python3.12] [PIP_ARGS=…]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv with deadhead, its extras and the tools, at the versions in requirements/

$(CORE): pyproject.toml requirements/core.txt $(if $(wildcard $(INCOMPLETE)),anew)
	@command -v '$(PYTHON)' >/dev/null || { echo \
		"There is no '$(PYTHON)' here: install Python 3.10 or newer, or name one, as in: make install PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		"deadhead needs Python 3.10 or newer, and '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1); name another, as in: make install PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo \
		"'$(PYTHON)' cannot make virtual environments, as its venv or ensurepip module is missing; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p .venv && touch $(INCOMPLETE)
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv .venv
	@echo 'Installing into .venv; the first time this takes a minute or more …'
	@$(PIP) --requirement requirements/core.txt
	@$(PIP) --no-build-isolation --editable .
	@rm $(INCOMPLETE) && touch $@

anew:
	@echo 'The last installation did not end; starting anew.'
	@rm -rf .venv

$(INSTALLED): $(CORE) requirements/dev.txt
	@echo 'Installing what tests need …'
	@touch $(INCOMPLETE)
	@$(PIP) --requirement requirements/dev.txt
	@rm $(INCOMPLETE) && touch $@

llama-cpp: $(INSTALLED) ## build llama.cpp's Python binding (minutes, a C++ compiler): GGUF exports are then checked
	@$(BIN)/python -c 'import llama_cpp, uvicorn' 2>/dev/null || { echo 'Building llama.cpp; this takes some minutes …'; $(PIP) --requirement requirements/llama-cpp.txt; }

vllm: $(VLLM)/.installed ## make .venv-vllm with vLLM for CPUs (Python 3.11): exports to it are then checked, and tested

$(VLLM)/.installed: requirements/vllm.txt
	@echo 'Installing vLLM into $(VLLM); this takes some minutes …'
	@rm -rf $(VLLM)
	@'$(PYTHON)' -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile $(PIP_ARGS) --requirement $<
	@touch $@

browser: ## install Debian's Chromium, in which the tests open a run's page; needs root
	@command -v chromium >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

demo: $(CORE) ## train, prune and cut a small model in minutes, or go on where it stopped (DEMO_ARGS)
	$(BIN)/deadhead demo --resume $(DEMO_ARGS)

demo-llm: $(INSTALLED) ## prune a real pretrained language model, and talk to it before and after (DEMO_ARGS)
	$(BIN)/python benchmarks/demo_llm.py $(DEMO_ARGS)

test: $(INSTALLED) ## run the tests that catch nearly everything (PYTEST_ARGS, WORKERS)
	$(PYTEST) -m 'not slow and not full and not gpu' $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## run the tests that test leaves out, but for larger tables
	$(PYTEST) -m 'slow and not full and not gpu' $(PYTEST_ARGS)

test-full: $(INSTALLED) ## run all tests, with their larger tables, on the GPU too where there is one
	$(PYTEST) $(PYTEST_ARGS)

$(TRANSFORMERS_TESTS): $(INSTALLED)
	@echo "Fetching the tests of transformers' source distribution …"
	@rm -rf $@ $@.new && mkdir $@.new
	@version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("transformers"))') && \
		$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-build-isolation \
		--no-binary transformers --dest $@.new "transformers==$$version"
	@$(PIP) --target $@.new parameterized==0.9.0
	@tar --extract --gzip --file $@.new/transformers-*.tar.gz --directory $@.new --strip-components 1 --wildcards '*/tests'
	@mv $@.new/tests $@.new/transformers_tests && touch $@.new/transformers_tests/__init__.py && mv $@.new $@

test-transformers: $(TRANSFORMERS_TESTS) ## run transformers' own model tests on cut models and on deadhead's
	OMP_NUM_THREADS=1 TRANSFORMERS_TESTS=$(TRANSFORMERS_TESTS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -o addopts=--import-mode=importlib -W ignore \
		tests/models/test_transformers_common.py $(PYTEST_ARGS)

lint: $(INSTALLED) docs ## check style, format, docstrings of all that is public, types, and the links of the pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED) ## build the documentation's site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(INSTALLED) ## run the programs in benchmarks/ in their quick form (BENCH_ARGS= for the long one)
	@set -e; for program in benchmarks/[!_]*.py; do \
		[ -e "$$program" ] || { echo 'There is no program in benchmarks/.' >&2; exit 1; }; \
		echo "== $$program $(BENCH_ARGS)"; $(BIN)/python "$$program" $(BENCH_ARGS); done

release-check: $(INSTALLED) ## build a release, install it into empty environments, and run the README there (PIP_ARGS)
	@$(BIN)/python tests/release_check.py --pip-args '$(PIP_ARGS)'

wheel: $(INSTALLED) ## build a source distribution and a wheel in dist/
	@rm -rf build
	$(BIN)/python -m build --no-isolation
	@rm -rf build

clean: ## remove .venv and everything that was built
	rm -rf .venv $(VLLM) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +
