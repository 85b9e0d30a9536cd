PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# A worker a core: with two, each test takes twice the processor's time (2026-11, two cores: 300 s, not 440). A file stays in one
# worker: its tests share models and compiled programs.
WORKERS = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST = $(VENV)/bin/python -m pytest
# pip would compile every module, for half of the time that it takes. Python compiles those that it imports, and keeps them
# unless PYTHONDONTWRITEBYTECODE is set.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile --editable
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all torture coverage mutants lint assets

quickstart: $(VENV)/installed  ## install, then fine-tune the embedded model on the embedded stories
	$(VENV)/bin/python -m jaxft.train --config configs/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/installed-dev lint  ## every module, command, model family and kind of fault at least once
	$(PYTEST) $(WORKERS) -m "not slow and not wide"

test-all: test $(VENV)/installed-dev-all  ## then more cases, real sizes, GPU and TPU compilers, trackers
	$(PYTEST) $(WORKERS) -m "slow and not wide"

torture: $(VENV)/installed-dev-all  ## before a release, hours: hundreds of each fault, with a table in docs/reliability.md; every shape
	$(PYTEST) -n 2 --dist worksteal --torture $(addprefix tests/test_, kills.py signals.py \
	  full_disks.py corruption.py not_finite.py other_meshes.py fuzzed_configs.py hosts.py soak.py)
	$(PYTEST) $(WORKERS) -m wide

coverage: $(VENV)/installed-dev  ## the lines of jaxft that `make test` runs, sub-processes counted
	rm -f .coverage*
	$(VENV)/bin/python -m coverage run -m pytest $(WORKERS) -m "not slow and not wide"
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report

mutants: $(VENV)/installed-dev  ## thirty faults, put into a copy one at a time: does `make test` notice?
	$(VENV)/bin/python scripts/mutants.py

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

assets: $(VENV)/installed-dev  ## make assets/quickstart again (about ten minutes on two cores)
	$(VENV)/bin/python scripts/make_quickstart_assets.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version); jaxft needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(INSTALL) .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev-all: $(VENV)/bin/python pyproject.toml
	$(INSTALL) '.[dev-all]'
	touch $@ $(VENV)/installed-dev $(VENV)/installed
