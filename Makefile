# Two commands: `make pretrain` and `make test`. Each sets itself up in .venv, which is reused while it is current.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

# DeepSpeed compiles its CPU collectives at the first run; they belong to this environment alone.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(BIN):$(PATH)
# Tests start hundreds of processes, which all would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE
# One thread per rank: more of them fight for the cores of the other ranks.
export OMP_NUM_THREADS ?= 1

# What tests/cluster makes two machines of.
CLUSTER_PACKAGES := iproute2 openssh-server pdsh openmpi-bin procps

.PHONY: help setup fast test test-versions newcomer check format pretrain schema docs gpu-acceptance gpu-acceptance-2 \
	cluster-packages clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# Exact versions; they are those of Python 3.11, and some of them do not exist for 3.10.
CONSTRAINTS = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')
# Twice --quiet: errors are shown, and warnings about the machine's own settings of pip are not.
INSTALL = DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(CONSTRAINTS)

$(STAMP): pyproject.toml requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'scmoe_ds needs Python 3.10 or later' >&2; exit 1; }
	@echo 'installing into $(VENV): about 2 minutes, and 2 GB without CUDA …'
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && touch $(VENV)/.made-by-make; }
	@$(INSTALL) --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## install everything into .venv, this package editable

# Two files at a time: many tests wait for processes more than they compute. In tests/conftest.py's order: the longest file first.
test: $(STAMP)  ## all tests; those that need a GPU skip themselves
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Not part of .ci/run: several GB per set. docs/versions.md has the table.
test-versions:  ## the fast tests on the oldest and the newest packages allowed, each in an environment of its own
	$(PYTHON) -m lab.versions

# Not part of .ci/run: it needs the index, and minutes.
newcomer: $(STAMP)  ## the newcomer's story in an environment that is installed anew
	SCMOE_NEWCOMER=long $(BIN)/python -m pytest tests/newcomer

fast: $(STAMP)  ## the inner loop: tests that start no process and take no long computation
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not spawns and not slow'

check: $(STAMP)  ## ruff, mypy, directions of imports, lengths of files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(STAMP)  ## what ruff can put in order by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pretrain: $(STAMP)  ## train a small ScMoE GPT for a few minutes, on the GPUs that are there or on two CPU processes
	@$(BIN)/python examples/quick_start.py

schema: $(STAMP)  ## write ds_configs/scmoe.schema.json and clusters/cluster.schema.json
	$(BIN)/python -m scmoe_ds.config.schema
	$(BIN)/python -m scmoe_ds.programs.cluster_schema

# Installing needs the index once; building loads nothing from the network.
docs: $(STAMP)  ## the pages and the API as a site in build/site; warnings are errors
	@$(BIN)/python -c 'import mkdocstrings_handlers.python, material' 2>/dev/null || \
		$(INSTALL) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# On a machine that has the packages already: python -m benchmarks.gpu.acceptance. docs/gpu.md tells how to read the page.
gpu-acceptance: $(STAMP)  ## on one GPU: what is right and how fast it is, in 8 minutes, as a page of benchmarks/results
	$(BIN)/python -m benchmarks.gpu.acceptance

gpu-acceptance-2: $(STAMP)  ## the same for what needs two GPUs with NCCL
	$(BIN)/python -m benchmarks.gpu.acceptance --gpus 2

# Where a service manager runs, openssh-server would start a system-wide sshd: not as a side effect of a test.
cluster-packages:  ## Debian packages for the tests on two machines, as root in a container; without them those tests skip
	@if PATH="$$PATH:/usr/sbin" which ip sshd pdsh mpirun pkill >/dev/null; then :; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || [ -d /run/systemd/system ]; then \
		echo 'Tests on two machines skip: install $(CLUSTER_PACKAGES) yourself (this target does so as root on Debian without systemd)'; \
	elif ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES); } >/dev/null; then \
		echo 'Tests on two machines skip: apt-get could not install $(CLUSTER_PACKAGES)'; \
	fi

# Only what the other targets made: data, runs and checkpoints hold what is yours, too.
clean:  ## remove the environment, and the corpus and runs of `make pretrain`
	test ! -f $(VENV)/.made-by-make -a ! -f $(STAMP) || rm -rf $(VENV)
	rm -rf data/python_stdlib data/python_stdlib.bin data/python_stdlib.idx data/python_stdlib.json \
		runs/quick_start checkpoints/quick_start
	@rmdir data runs checkpoints 2>/dev/null || true
