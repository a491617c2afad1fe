# Each target makes what it needs. PYTHON is the interpreter the environment is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all notebooks lint clean

# Run time only.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# And what the tests need.
.venv/installed-test: .venv/installed requirements-test.txt requirements-corpus.txt
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

demo: .venv/installed
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m experiments.quickstart --overwrite

# -rs: a test that is skipped says why. loadfile: the tests of a file share their compilations.
test: .venv/installed-test
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile -m "not slow"

test-all: test
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile -m slow

# Runs the notebooks and keeps what they show, with the model of `make demo`.
notebooks: .venv/installed-test
	cd experiments/notebooks && JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} ../../$(BIN)/jupyter execute --inplace *.ipynb

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv demo
