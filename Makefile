# Naqsh: `make help` lists what a person can do. Every recipe runs in VENV, which is made when it is missing or out of date.
VENV ?= .venv
PYTHON ?= python3
PORT ?= 5000
ENTER = . "$(VENV)/bin/activate" &&
# `make data PATH=...` names a path of images, not where programs are: that stays as it was. make expands a variable that is
# being expanded, on its way into the environment of $(shell), to what the environment has.
ifeq ($(origin PATH),command line)
export IMAGES := $(value PATH)
override PATH = $(shell printf '%s' "$$PATH")
override PATH := $(PATH)
endif
# One process more than there are cores: some tests wait.
PYTEST = pytest --numprocesses "$$(($$(getconf _NPROCESSORS_ONLN) + 1))" --dist loadfile --no-loadscope-reorder

# The names of what was set on the command line.
ASKED = $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))

export DVC_NO_ANALYTICS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help repro draw data test test-all lint ui sync experiments profile cards bench prune lock
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@echo "TORCH=cpu with the first of them installs a small torch without CUDA; VENV=path uses another environment."

repro: $(VENV)/.installed ## make every result that is missing or out of date; JOBS=n: n at a time, CELL=name: that cell alone
	@$(ENTER) exec python -m stages.sweep.runner $(if $(JOBS),--jobs "$(JOBS)") $(if $(CELL),--cell "$(CELL)")

draw: $(VENV)/.installed ## draw with a trained network: CELL=name LABELS=3,1,4 N=16; SEED= STEPS= SAMPLER= GUIDANCE=; OUT=folder for a set
	@$(ENTER) exec python -m stages.sweep.draw $(foreach name,$(filter-out VENV PYTHON TORCH,$(ASKED)),$(name)="$$$(name)")

data: $(VENV)/.installed ## look at images of your own and add them: make data NAME=my_letters PATH=/a/folder/or.zip
	@$(ENTER) python -m stages.pipeline.own_data -- "$(NAME)" "$$IMAGES"

test: $(VENV)/.installed-dev ## the quick tests, on all cores
	@$(ENTER) $(PYTEST)

test-all: $(VENV)/.installed-dev ## all tests, the slow ones too
	@$(ENTER) $(PYTEST) -m ""

lint: $(VENV)/.installed-dev ## style and types
	@$(ENTER) ruff check && ruff format --check && mypy

ui: $(VENV)/.installed ## bring MLflow up to date and open its UI on 127.0.0.1:PORT
	@$(ENTER) python -m stages.tracking ui --port $(PORT)

sync: $(VENV)/.installed ## bring MLflow up to date with the files
	@$(ENTER) python -m stages.tracking

profile: $(VENV)/.installed ## merge profiles/NAME.yaml into params.yaml: make profile NAME=gpu
	@$(ENTER) python -m stages.sweep.plan profile "$(NAME)"

experiments: $(VENV)/.installed ## the experiments of `dvc exp run`, each with what it changed and its scores
	@$(ENTER) dvc exp show --only-changed --no-pager --drop '^(data|models|samples|stages|metrics/(evaluate|extractor|reference|train))'

cards: $(VENV)/.installed ## write the card of every prepared dataset into data/README.md
	@$(ENTER) python -m stages.pipeline.cards

bench: $(VENV)/.installed-dev ## the short benchmarks, a JSON line each: speed beside diffusers, fixed cost of a cell
	@$(ENTER) python benchmarks/speed.py && python benchmarks/fixed_cost.py

prune: $(VENV)/.installed ## list the files of cells that are no longer in the sweep; YES=1 removes them
	@$(ENTER) python -m stages.sweep.plan prune $(if $(YES),--yes)

lock: ## write constraints.txt anew, from the newest versions that work together
	@rm -rf build/lock && $(PYTHON) -m venv build/lock && build/lock/bin/pip install -q ".[dev]"
	@build/lock/bin/pip check && build/lock/bin/pip freeze --exclude naqsh > build/lock/constraints.txt
	@mv build/lock/constraints.txt constraints.txt && rm -rf build/lock

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x "$(VENV)/bin/python" || { echo "Making $(VENV)"; $(PYTHON) -m venv "$(VENV)"; }
	@$(if $(filter cpu,$(TORCH)),$(ENTER) pip install -q uv && uv pip install -q --torch-backend=cpu -c constraints.txt torch torchvision)
	@echo "Installing the pinned packages; the first time takes some minutes"
	@$(ENTER) pip install -q --no-compile -c constraints.txt .
	@touch "$@"

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(ENTER) pip install -q --no-compile -c constraints.txt ".[dev]"
	@touch "$@"
