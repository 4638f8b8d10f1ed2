# Everything runs in a virtual environment of its own, made on first use; nothing has to be installed by hand but
# Python 3.11 to 3.13.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
RUN := runs/quickstart
# pip compiles 17,000 files on one core, in 40 s; compileall takes all cores. Examples inside packages do not compile.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Without tests/conftest.py, whose packages only the suite needs.
GPU_TESTS := -o addopts= --confcutdir=tests/gpu tests/gpu
DRY := $(if $(DRY_RUN),NLGMOE_GPU_DRY_RUN=1)
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

.PHONY: help help-developers install develop quickstart real-model test check docs notebooks reproduce gate bench gpu clean \
	browser test-nightly planted test-oldest test-faults constraints format reproduce-tables

help:  ## show this list
	@grep -E '^[a-z-]+:.*[^#]## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo "more: make help-developers"

help-developers:  ## show what changes or tries the package itself
	@grep -E '^[a-z-]+:.*### ' $(MAKEFILE_LIST) | sed -E 's/:.*### /\t/' | expand -t 18

install: $(VENV)/.installed  ## virtual environment with nlgmoe

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "nlgmoe needs Python 3.11 to 3.13; say which with make PYTHON=...")'
	@echo "installing nlgmoe and PyTorch into $(VENV): 2 GB, some minutes; several times that with a CUDA build of PyTorch"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable . --constraint constraints.txt
	$(COMPILE)
	touch $@

develop: $(VENV)/.developed  ### virtual environment with the development tools too

$(VENV)/.developed: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]' --constraint constraints.txt
	$(COMPILE)
	touch $@

quickstart: install  ## train a small PR-MoE on real text, and write its report (5 to 8 minutes on 2 cores)
	@echo "1 of 2: tokenize the pocket Pile, 33 MB of text from Python packages (1 minute; once)"
	@$(BIN)/nlgmoe prepare-data --tokenizer pocket-4k
	@# a run that is already there keeps its results under another name
	@if [ -e $(RUN) ]; then mv -v $(RUN) $(RUN)-$$(date -r $(RUN) +%Y%m%d-%H%M%S); fi
	@echo "2 of 2: train a PR-MoE on 0.9M tokens (3 to 6 minutes); Ctrl+C saves, and --ckpt_path last goes on"
	$(BIN)/python train.py fit --config configs/quickstart.yaml
	@test -e $(RUN)/report.html || { echo 'stopped before its end: the command above with --ckpt_path last goes on'; exit 1; }
	@printf '\nThe report is $(RUN)/report.html. Next:\n  . $(BIN)/activate\n'
	@printf '  nlgmoe generate $(RUN) --prompt "The king"                # text of this model\n'
	@printf '  nlgmoe prepare-data --input texts --output data/own/text --vocab-size 2000  # your own text: docs/data.md\n'
	@printf '  nlgmoe inspect configs/pr_moe/350m_pr_moe_32_64.yaml configs/hardware/gpus_64.yaml  # plan a larger run\n'

real-model: install  ## take SmolLM2, a trained open model, through import, chat, upcycling, training, pruning, export (15 minutes on 2 cores; docs/fine_tune.md)
	@$(PIP_INSTALL) --editable '.[gguf]' --constraint constraints.txt
	@$(BIN)/python -m benchmarks.real_model

test: develop  ## the suite (7 minutes on 2 cores)
	@$(MAKE) --no-print-directory browser || true  # the rest of the suite does without
	$(BIN)/python -m pytest

check: develop  ## format, lint, spelling, types, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run .ci/browser docs/examples/slurm.sbatch docs/examples/prepare_pile.sbatch
	$(BIN)/hadolint docs/examples/Dockerfile

docs: develop  ## build the site: site/index.html
	$(PIP_INSTALL) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: develop  ## run notebooks 01 to 04 and 06 and keep what they show; trains ten small models (05: `notebooks/execute.py`, after `make real-model`)
	$(BIN)/nlgmoe prepare-data --tokenizer pocket-4k
	$(BIN)/python notebooks/execute.py notebooks/0[1-46]_*.ipynb

reproduce: develop  ## train the runs of the paper's claims that docs/results/reproduce.json lacks (none; all again: a day, docs/results/claims.md)
	$(BIN)/python -m benchmarks.reproduce $(if $(QUESTION),--question $(QUESTION)) $(if $(SCALE),--scale $(SCALE))

gate: develop  ## judge an idea about mixtures of experts: CANDIDATE=my_router.MyRouterConfig, or a YAML file; BASELINE=paper (an hour on 2 cores; docs/gate.md)
	@$(BIN)/python -m benchmarks.gate $(if $(CANDIDATE),"$(CANDIDATE)") $(if $(NAME),--name "$(NAME)") $(if $(PAIRS),--pairs $(PAIRS)) \
		$(if $(BASELINE),--baseline "$(BASELINE)") $(if $(TUNE),--tune) $(if $(RESULTS),--results "$(RESULTS)") $(if $(AUTHOR),--author "$(AUTHOR)")

bench: develop  ## measure ranks, layers and steps, and renew the tables of docs/results (15 minutes on 2 quiet cores; ROUNDS=1: a trial)
	$(BIN)/nlgmoe prepare-data --tokenizer pocket-4k
	for name in scaling parity ranks layer step; do \
		$(BIN)/python -m benchmarks.$$name $(if $(ROUNDS),--rounds $(ROUNDS)) || exit 1; done

gpu: develop  ## shows on a machine with one GPU that results are the CPU's, and how fast (at most 17 minutes); DRY_RUN=1: tiny, on the CPU; docs/scaling.md
	@$(DRY) $(BIN)/python -c 'import os, sys, torch; sys.exit(None if torch.cuda.is_available() or os.environ.get("NLGMOE_GPU_DRY_RUN") else "no GPU, PyTorch without CUDA, or an old driver; make gpu DRY_RUN=1 runs all at tiny shapes on the CPU")'
	$(DRY) $(BIN)/python -m pytest $(GPU_TESTS) $(if $(DRY_RUN),,--junitxml=docs/results/gpu.xml)
	$(DRY) $(BIN)/python -m benchmarks.gpu

clean:  ## remove the virtual environment and caches; data and runs stay
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

browser:  ### Chromium, which the tests of reports look at them with; from Debian's packages, as root or with sudo
	@CHROMIUM=$(CHROMIUM) sh .ci/browser

test-nightly: develop  ### slow tests of what changes rarely: launchers, faults, the wheel, other programs, a dry run of make gpu
	$(PIP_INSTALL) --editable '.[clients]' --constraint constraints.txt
	$(BIN)/python -m pytest --nightly

planted: develop  ### plant faults in a copy of the package, and show that the test named beside each fails (10 minutes); ONLY=router for some
	$(BIN)/nlgmoe prepare-data --tokenizer pocket-4k
	$(BIN)/python -m tests.planted $(if $(ONLY),--only "$(ONLY)")

test-oldest:  ### the suite with the oldest releases that pyproject.toml admits, in an environment of its own (6 GB)
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^  "([A-Za-z]+)[^>]*>=([0-9.]+).*/\1==\2/p' pyproject.toml >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pytest

test-faults: develop  ### kills at every call, two hosts (root and ip); part of test-nightly
	$(BIN)/python -m pytest -n 0 tests/faults

reproduce-tables: develop  ### tables of README.md and docs/results/claims.md, and the figures, from docs/results/reproduce.json
	$(BIN)/python -m benchmarks.reproduce --tables

format: develop  ### rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: develop  ### renew constraints.txt with the newest releases that pyproject.toml admits; run the suite before you commit it
	$(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable '.[dev]'
	(head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//') >constraints.new && mv constraints.new constraints.txt
