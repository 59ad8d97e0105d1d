.DEFAULT_GOAL := help
.PHONY: help quickstart test test-chaos test-transformers test-lower wheel lint style docs clean

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Two files of tests at a time, on a thread each: most of the time they wait for processes that they start.
PARALLEL := --numprocesses 2 --dist loadfile
test test-chaos test-transformers test-lower: export OMP_NUM_THREADS ?= 1
# Nothing below talks to the Hub.
export HF_HUB_OFFLINE ?= 1

help:            ## List the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 16

# Where PyTorch comes from, if not from the registry of all other packages: the build without CUDA, which is a tenth of
# the size, with `make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu`.
TORCH_INDEX ?=

# Made again when the dependencies change.
$(STAMP): pyproject.toml
	@echo "Setting up $(VENV), once: PyTorch, Transformers and what checks a change. This takes minutes."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@test -z "$(TORCH_INDEX)" || $(VENV)/bin/python -m pip install torch torchvision --index-url $(TORCH_INDEX)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	@touch $@

quickstart: $(STAMP) ## Train on handwritten digits, find thresholds, measure, save and load: about 3 minutes
	@echo "Loading PyTorch and Transformers, then training on handwritten digits"
	@$(VENV)/bin/python examples/quickstart.py

test: $(STAMP)   ## Run the tests
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-chaos: $(STAMP) ## Kill runs, mutate configurations and share a network among threads: half an hour
	$(VENV)/bin/python -m pytest -m slow --capture no tests/chaos

test-transformers: $(STAMP) ## Run Transformers' own tests of models and configurations, which it downloads
	$(VENV)/bin/python -m pip install --quiet parameterized
	$(VENV)/bin/python -m tests.transformers_suite.source
	$(VENV)/bin/python -m pytest -p no:warnings tests/transformers_suite

$(VENV)-lower/.installed: pyproject.toml tests/lower_bounds.txt
	test -x $(VENV)-lower/bin/python || $(PYTHON) -m venv $(VENV)-lower
	@test -z "$(TORCH_INDEX)" || $(VENV)-lower/bin/python -m pip install --constraint tests/lower_bounds.txt \
		torch torchvision --index-url $(TORCH_INDEX)
	$(VENV)-lower/bin/python -m pip install --quiet --constraint tests/lower_bounds.txt --editable '.[test]'
	touch $@

test-lower: $(VENV)-lower/.installed ## Run the tests with the oldest versions that are supported
	$(VENV)-lower/bin/python -m pytest $(PARALLEL)

wheel: $(STAMP)  ## Build the wheel into dist/, and try one without the extras
	rm -rf build dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m pytest -m slow tests/test_wheel.py

lint: $(STAMP)   ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(STAMP)  ## Apply the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(STAMP)   ## Build the documentation into build/site, strictly and without a network
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	$(VENV)/bin/zensical build --clean --strict

clean:           ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-lower build dist .transformers-tests runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
