# Everything runs in .venv, made from requirements.lock. `make demo` and `make test` need Python, make and nothing else.
PYTHON ?= python3
SHELL := bash
BIN := .venv/bin

# Where the CPU build of torch lies; for a GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cu128 setup
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: setup demo test test-oldest test-common lint format lock clean

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_hyla needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements.lock)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/hyla train recipes/logic/demo.yaml --output runs/demo --overwrite
	$(BIN)/python recipes/logic/ask.py runs/demo

test: setup
	$(BIN)/python -m pytest

# The oldest transformers of pyproject.toml, and the huggingface_hub that it needs, in an environment of their own.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest

.venv-oldest/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements.lock)
	.venv-oldest/bin/pip install --quiet --editable '.[dev]' 'transformers==5.17.*' 'huggingface_hub<2'
	touch $@

# transformers' own model tests, of its source distribution, which pip fetches once into .cache/.
test-common: setup
	HYLA_COMMON_TESTS=1 $(BIN)/python -m pytest tests/common

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-progress hf_hyla/model

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Local labels such as +cpu are cut off, so that the lock names what every index has.
lock: setup
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --no-emit-find-links --no-emit-index-url --no-header \
		--constraint <(echo torch==2.13.0) --output-file requirements.lock pyproject.toml
	sed -i 's/+cpu//; s|-c /dev/fd/[0-9]*|the Makefile|' requirements.lock

clean:
	rm -rf .venv .venv-oldest .cache runs
