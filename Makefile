PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# One worker a core. With two workers a core the same tests take 440 s of each core's time, not 300 (2026-11, two cores). A file
# stays in one worker: its tests share models and compiled programs.
WORKERS = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST = $(VENV)/bin/python -m pytest
# --no-compile halves the time: pip would compile every module. Python compiles those that it imports, and keeps them unless
# PYTHONDONTWRITEBYTECODE is set.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile --editable
unexport PYTHONDONTWRITEBYTECODE

# Programs as users compile them; tests/conftest.py has the others compiled without most optimizations.
OPTIMIZED = JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=

.PHONY: quickstart test tests test-all torture coverage mutants lint docs wheel assets help

quickstart: $(VENV)/installed  ## install, then fine-tune the embedded model on the embedded stories
	$(VENV)/bin/python -m jaxft.train --config configs/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/installed-dev lint  ## every module, command and model family once, and the common faults
	$(PYTEST) $(WORKERS) -m "not slow and not wide"

tests: test  # there is a folder of that name

test-all: test $(VENV)/installed-dev-all  ## then more cases, real sizes, GPU and TPU compilers, trackers, parity of optimized programs
	$(OPTIMIZED) $(PYTEST) $(subst loadfile,load,$(WORKERS)) -m "not slow and not wide" tests/hf/test_families.py
	$(PYTEST) $(WORKERS) -m "slow and not wide"

torture: $(VENV)/installed-dev-all  ## before a release, hours: hundreds of each fault, with a table in docs/reliability.md; every shape
	$(PYTEST) -n 2 --dist worksteal --torture $(addprefix tests/, \
	  $(addprefix integration/test_, kills.py signals.py full_disks.py fuzzed_configs.py soak.py) checkpoint/test_corruption.py \
	  training/test_nonfinite_steps.py sharding/test_other_meshes.py distributed/test_multihost.py)
	$(OPTIMIZED) $(PYTEST) $(WORKERS) -m wide

coverage: $(VENV)/installed-dev  ## the lines of jaxft that `make test` runs, sub-processes counted: about nine minutes
	rm -f .coverage*
	$(VENV)/bin/python -m coverage run -m pytest $(WORKERS) -m "not slow and not wide"
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report

mutants: $(VENV)/installed-dev  ## thirty faults, put into a copy one at a time: does `make test` notice?
	$(VENV)/bin/python scripts/mutants.py

lint: $(VENV)/installed-dev  ## style, types and prose
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python --summary=none
	$(VENV)/bin/python scripts/prose.py

wheel: $(VENV)/installed-dev  ## build an sdist, and a wheel from it, into dist/
	@mkdir -p dist
	$(VENV)/bin/python -m build --no-isolation > dist/build.log || { cat dist/build.log; exit 1; }
	@echo "pip install $$(ls -t dist/*.whl | head -1)"

docs: $(VENV)/installed-docs  ## build the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

assets: $(VENV)/installed-dev  ## make assets/quickstart again (about ten minutes on two cores)
	$(VENV)/bin/python scripts/make_quickstart_assets.py

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

# pip is what venv makes last: a folder without it is one that was interrupted.
$(VENV)/bin/pip:
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON) here: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version); jaxft needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/pip pyproject.toml
	$(INSTALL) .
	touch $@

$(VENV)/installed-docs: $(VENV)/bin/pip pyproject.toml
	$(INSTALL) '.[docs]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/bin/pip pyproject.toml
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/installed-docs $(VENV)/installed

$(VENV)/installed-dev-all: $(VENV)/bin/pip pyproject.toml
	$(INSTALL) '.[dev-all]'
	touch $@ $(VENV)/installed-dev $(VENV)/installed-docs $(VENV)/installed
