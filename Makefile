PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# Three workers on two cores: many tests wait for a process of their own. A file stays in one worker: its tests share models and
# compiled programs.
WORKERS = -n $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 ))) --maxprocesses 6 \
  --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-wide torture test-quick lint assets

quickstart: $(VENV)/installed  ## install, then fine-tune the embedded model on the embedded stories
	$(VENV)/bin/python -m jaxft.train --config configs/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/installed-test lint  ## the tests
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not wide"

test-wide: $(VENV)/installed-test  ## more shapes, formats and sizes
	$(VENV)/bin/python -m pytest $(WORKERS) -m wide

torture: $(VENV)/installed-test  ## kills, signals, damage, full disks: hundreds of each; writes its table into docs/reliability.md
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --torture $(addprefix tests/test_, kills.py signals.py \
	  full_disks.py corruption.py not_finite.py other_meshes.py fuzzed_configs.py hosts.py soak.py)

test-quick: $(VENV)/installed-test  ## the tests that take seconds
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not slow and not wide"

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

assets: $(VENV)/installed-test  ## make assets/quickstart again (about ten minutes on two cores)
	$(VENV)/bin/python scripts/make_quickstart_assets.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version); jaxft needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed
