# Two commands on a fresh machine that has Python >= 3.10, pip, venv and make:
#   make demo   main job on embedded real data, ends with the path of a page of figures
#   make test   the default tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: install demo test test-slow test-gpu lint types floors check docs package clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# one call, so that pip picks a torch and a torchvision that fit each other
	$(BIN)/python -m pip install --quiet -e '.[benchmarks,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python -m benchmarks.demo

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m gpu

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

floors: install
	$(BIN)/lint-imports

check: lint types floors test

# The documentation site: runs the gallery under examples/, warnings are errors, nothing is fetched.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[benchmarks,dev,docs]'
	touch $(VENV)/.docs

# What is uploaded: source archive and wheel, checked; the tests install the wheel and train with it.
package: install
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_package.py -m "slow or not slow"

clean:
	rm -rf out build dist docs/_build docs/gallery docs/api/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache
