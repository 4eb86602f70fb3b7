# Everything here works on a machine with nothing but make and Python 3.11, 3.12 or 3.13.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# the first Python of 3.11 to 3.13 that starts
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { command -v $$p; break; }; done)

UV := .uv/bin/uv
# compiled at once: where PYTHONDONTWRITEBYTECODE is set, as in many images, every start would compile anew
INSTALL := $(UV) pip install --quiet --compile-bytecode --constraint constraints.txt
EXAMPLES := $(patsubst %/example.toml,%,$(wildcard */example.toml))
# examples whose requirements contradict the others' bring their own constraints.txt
OWN := $(patsubst %/constraints.txt,%,$(wildcard */constraints.txt))
SHARED := $(filter-out $(OWN),$(EXAMPLES))
EX ?=
ALL ?=

.PHONY: help env demo test test-all bench bench-quick bench-check example copy new lint constraints clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.uv/ready:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make PYTHON=/path/to/python ..."; exit 1; }
	@echo "Using $$($(PYTHON) --version) at $(PYTHON)"
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	@touch $@

.venv/ready: .uv/ready pyproject.toml constraints.txt requirements-test.txt $(SHARED:%=%/requirements.txt)
	@echo "Setting up .venv with everything (minutes the first time) ..."
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	@$(INSTALL) --python .venv $(SHARED:%=-r %/requirements.txt) -r requirements-test.txt --editable .
	@touch $@

# one example in an environment of its own, with nothing but its requirements
.venvs/%/ready: %/requirements.txt .uv/ready pyproject.toml constraints.txt
	@echo "Setting up .venvs/$* (a minute or two the first time) ..."
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venvs/$*
	@$(UV) pip install --quiet --compile-bytecode --python .venvs/$* \
		--constraint $(if $(wildcard $*/constraints.txt),$*/constraints.txt,constraints.txt) -r $< --editable '.[cli]'
	@touch $@

.PRECIOUS: .venvs/%/ready
.venvs/%/test-ready: .venvs/%/ready requirements-test.txt
	@$(UV) pip install --quiet --compile-bytecode --python .venvs/$* \
		--constraint $(if $(wildcard $*/constraints.txt),$*/constraints.txt,constraints.txt) -r requirements-test.txt
	@touch $@

env: .venv/ready  ## everything that the examples need, in .venv: to type commands yourself

demo: .venvs/mnist_torch_vanilla/ready  ## train, kill it mid-epoch, resume, show that nothing was lost
	@PATH="$(CURDIR)/.venvs/mnist_torch_vanilla/bin:$$PATH" python tools/demo.py

ifdef EX
test: .venvs/$(EX)/test-ready  ## run the suite; with EX=name only that example, in its own environment
	@PATH="$(CURDIR)/.venvs/$(EX)/bin:$$PATH" pytest -n 2 --dist loadgroup $(ALL) --example $(EX) tests/test_examples.py \
		tests/test_copy.py::test_a_copy_tests_itself $(wildcard tests/test_$(EX).py)
else
test: .venv/ready $(OWN:%=.venvs/%/test-ready)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" pytest -n 3 --dist loadgroup $(ALL)
	@for example in $(OWN); do $(MAKE) --no-print-directory test EX=$$example ALL=$(ALL) || exit 1; done
endif

test-all: ALL := --all
test-all: test  ## the suite with everything that does not fit into it

bench: .venv/ready  ## what a checkpoint costs, beside its peers: benchmarks/RESULTS.md (15 minutes)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" python benchmarks/run.py

bench-quick: .venv/ready  ## the same with smaller states, printed only (3 minutes)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" python benchmarks/run.py --quick

bench-check: .venv/ready  ## fails when a ratio is more than 25% above the committed one
	@PATH="$(CURDIR)/.venv/bin:$$PATH" python benchmarks/run.py --check

example:  ## run one: make example EX=mnist_torch_vanilla ARGS="--epochs 3"
	@test -n "$(EX)" || { echo "Which one? make example EX=name, with one of: $(EXAMPLES)"; exit 1; }
	@$(MAKE) --no-print-directory .venvs/$(EX)/ready
	@PATH="$(CURDIR)/.venvs/$(EX)/bin:$$PATH" python $(EX)/flow.py run $(ARGS)

copy:  ## take an example home: make copy EX=mnist_torch_vanilla DEST=~/my_project [NAME=digits]
	@test -n "$(EX)" -a -n "$(DEST)" || { echo "Which one, and where to? make copy EX=name DEST=directory, with one of: $(EXAMPLES)"; exit 1; }
	@$(PYTHON) tools/copy_out.py "$(EX)" "$(DEST)" $(if $(NAME),--name "$(NAME)")

new:  ## start an example: make new NAME=mnist_jax
	@test -n "$(NAME)" || { echo "What shall it be called? make new NAME=mnist_jax"; exit 1; }
	@$(PYTHON) tools/new_example.py "$(NAME)"

lint: .venv/ready  ## ruff and pyright
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; ruff check . && ruff format --check . && pyright

constraints: .uv/ready  ## compile constraints.txt anew from the requirements of all examples
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
		pyproject.toml $(SHARED:%=%/requirements.txt) requirements-test.txt --output-file constraints.txt

clean:  ## remove the environments
	rm -rf .uv .venv .venvs
