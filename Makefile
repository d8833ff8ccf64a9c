# Everything runs in .venv, which is made from requirements.lock. `make demo` and `make test` need only Python and make.
PYTHON ?= python3
SHELL := bash
BIN := .venv/bin

# The index of torch's CPU build; for a GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cu128 setup
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: setup demo test test-fast test-oldest test-browser demo-picture test-common gpu gpu-rehearsal hub-cards docs \
	release-check lint format lock clean

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

# Files of tests run side by side, each process with one thread, so that processes which tests start find free cores. There is one
# process more than cores, up to four, since some tests wait.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
SIDE_BY_SIDE = --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Without what trains, compiles or starts processes; in one process, for a look between two edits.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

# The oldest transformers of pyproject.toml, and the huggingface_hub that it needs, in an environment of their own.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(SIDE_BY_SIDE)

.venv-oldest/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements.lock)
	.venv-oldest/bin/pip install --quiet --editable '.[dev]' 'transformers==5.17.*' 'huggingface_hub<2'
	touch $@

# The page of `hyla demo` in a headless Chromium, which must be there (Debian: apt-get install chromium), with gradio and
# playwright in an environment of their own; and the picture of the page that the documents show.
test-browser: .venv-browser/ready
	OMP_NUM_THREADS=1 .venv-browser/bin/python -m pytest -m browser tests/demo

demo-picture: .venv-browser/ready
	HYLA_SCREENSHOT=hub_cards/demo.png .venv-browser/bin/python -m pytest tests/demo/test_browser.py -k loads

.venv-browser/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install --quiet --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements.lock)
	.venv-browser/bin/pip install --quiet --editable '.[dev,demo]' playwright
	touch $@

# transformers' own model tests, of its source distribution, which pip fetches once into .cache/.
test-common: setup
	HYLA_COMMON_TESTS=1 $(BIN)/python -m pytest tests/common

# On a machine with a GPU, torch and transformers, without .venv and network: benchmark, the SRAVEN recipe in full, and tests.
# `make gpu OUT=folder MAX_MINUTES=8` stops training in time, and the same command resumes it; recipes/gpu.sh has the settings.
gpu:
	PYTHON="$(PYTHON)" recipes/gpu.sh

# The same on a CPU in some minutes: interpreted kernels, few repeats, and few steps of a small model, which is stopped after the
# first step and resumes from what came back.
REHEARSAL := PYTHON="$(PYTHON)" REHEARSAL=1 OUT=runs/gpu-rehearsal RUN=runs/gpu-rehearsal-run recipes/gpu.sh
SMALL := --trainer.max_steps 6 --trainer.warmup_steps 1 --trainer.save_steps 2 --trainer.eval_steps 3 \
	--trainer.logging_steps 1 --trainer.eval_samples 64 --model.num_hidden_layers 1 --model.hidden_size 16 \
	--model.intermediate_size 16 --model.num_attention_heads 2 --trainer.dataloader_num_workers 2 \
	--trainer.dataloader_persistent_workers true
gpu-rehearsal:
	rm -rf runs/gpu-rehearsal runs/gpu-rehearsal-run
	TRAIN="$(SMALL)" MAX_MINUTES=0.001 $(REHEARSAL)
	rm -r runs/gpu-rehearsal-run
	TRAIN="$(SMALL)" PARTS=train $(REHEARSAL)
	grep 'Resumes from checkpoint-1' runs/gpu-rehearsal/report.txt
	test -s runs/gpu-rehearsal/run.json -a -s runs/gpu-rehearsal/learning_curve.png

# Renders the cards of the trained models again, after a change of templates or results: beside the records of the same recipe
# and of the recipes that are named like it but for the attention and the number of steps, such as sraven-softmax-30k for
# sraven-hyla-30k.
hub-cards: setup
	@set -e; shopt -s nullglob; for run in hub_cards/*/run.json; do \
		folder=$$(dirname $$run); \
		name=$$($(BIN)/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["name"])' $$run); \
		records=(); for attention in hyla softmax linear; do \
			other=recipes/results/$$(sed -E "s/hyla|softmax|linear/$$attention/" <<< $$name); \
			records+=($$other/*.json $$other-max_steps=*/*.json); \
		done; \
		$(BIN)/hyla card $$folder --repo-id hf-hyla/$$(basename $$folder) --with $${records[@]}; \
	done

# The site of mkdocs.yml in .cache/site: pages copied from where they lie, and one for every module that it names. HTML in a card
# holds Markdown, as on the Hub.
docs: setup
	rm -rf .cache/docs
	mkdir -p .cache/docs/reference
	cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md LICENSE recipes hub_cards .cache/docs
	sed -i 's/^<details>/<details markdown>/' .cache/docs/hub_cards/*/README.md
	for module in $$(sed -n 's|.* reference/\(.*\)\.md$$|\1|p' mkdocs.yml); do \
		printf '# %s\n\n::: %s\n' $$module $$module > .cache/docs/reference/$$module.md; \
	done
	PATH="$$PWD/$(BIN):$$PATH" mkdocs build --strict

# What a release must pass: both distributions in dist/, and a new user's first minute with the wheel and nothing of this checkout.
release-check:
	rm -rf dist .cache/release
	$(PYTHON) -m venv .cache/release
	.cache/release/bin/pip install --quiet build twine
	.cache/release/bin/python -m build --outdir dist .
	.cache/release/bin/twine check --strict dist/*
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/first-minute dist/*.whl

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-progress hf_hyla/model

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Local labels such as +cpu are cut off, so that the lock names what every index has. gradio, which is no part of the lock, takes
# no later Pillow, and an installation of all extras with the lock for its constraints must be possible.
lock: setup
	$(BIN)/pip-compile --quiet --extra dev --extra docs --strip-extras --no-emit-find-links --no-emit-index-url --no-header \
		--constraint <(printf 'torch==2.13.0\npillow<13\n') --output-file requirements.lock pyproject.toml
	sed -i 's/+cpu//; s|-c /dev/fd/[0-9]*|the Makefile|; s/^triton==[0-9.]*$$/& ; sys_platform == "linux"/' requirements.lock

clean:
	rm -rf .venv .venv-oldest .venv-browser .cache runs
