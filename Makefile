# Everything sets itself up: a virtual environment in .venv, with the versions that constraints.txt pins.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
RUN    := runs/digits

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo   train on handwritten digits with ε = 3 and write a report to $(RUN)"
	@echo "make test   run the tests (ARGS=... is passed to pytest, e.g. ARGS='-m slow')"
	@echo "make lint   format, lint, types, import floors"
	@echo "make bench  compare speed and memory with other engines (minutes)"
	@echo "make clean  remove the virtual environment, caches and runs"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Sfumato needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that a second run starts at once. The install is editable: sources are never stale.
$(VENV)/.demo:  extras := cli
$(VENV)/.test:  extras := cli,data,hf,flower,dev
$(VENV)/.bench: extras := cli,data,bench
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: pyproject.toml constraints.txt | $(PY)
	@echo "Installing sfumato[$(extras)] into $(VENV) (the first time takes some minutes) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(extras)]'
	@touch $@

# The digits are public, so forgetting what an earlier demo spent on them harms nobody. Never do so with private data.
demo: $(VENV)/.demo
	@rm -rf $(RUN)
	$(VENV)/bin/sfumato train --data digits --epsilon 3 --out $(RUN)
	@echo "The report is $(RUN)/report.html; the trained weights are $(RUN)/model.safetensors"

test: $(VENV)/.test
	$(PY) -m pytest $(ARGS)

lint: $(VENV)/.test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.bench
	$(PY) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
