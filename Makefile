# make demo       its own environment, then `attar run digits`: the ledger and the report's path
# make test       the test suite; make test-all runs the long tests too; ARGS="-k prune" picks some
# make lint       ruff and mypy
# make clean      what the above left here (runs and the environment included)
#
# JOBS=1 runs the tests in one process, else in one a core.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment.

PYTHON ?= python3
ARGS ?=
JOBS ?= auto
PYTEST = $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile

ifeq ($(CI),true)
# Clones come and go: the dependencies stay in the cache, named by what they depend on, and each
# clone installs just the package, for itself.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/attar
KEY := $(shell $(PYTHON) -c 'import hashlib, sys; \
  print(hashlib.sha256(open("pyproject.toml", "rb").read() + sys.version.encode()).hexdigest()[:16])')
VENV := $(CACHE)/env-$(KEY)
PACKAGE := $(CURDIR)/build/package
RUN := PYTHONPATH=$(PACKAGE) $(VENV)/bin/python
else
VENV ?= .venv
RUN := $(VENV)/bin/python
endif

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready

.PHONY: demo test test-all lint clean python install

demo: install
	$(RUN) -m attar.cli run digits --out runs/demo --overwrite

test: install
	$(PYTEST) -m "not long" $(ARGS)

test-all: install
	$(PYTEST) $(ARGS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Attar needs Python 3.11 to 3.13, and $(PYTHON) is not: name one that is," \
	         "as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'"; exit 1; }

ifeq ($(CI),true)

# One at a time; an environment counts once it is whole, which its stamp says. Each use renews the
# stamp: those that nobody used for two days go.
install: python
	@mkdir -p $(CACHE)
	@exec 9> $(VENV).lock && { ! command -v flock > /dev/null || flock 9; } && \
	if [ ! -f $(READY) ]; then \
	  rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && \
	  $(PIP) install '.[dev]' 'hatchling>=1.21' && $(PIP) uninstall --yes attar; \
	fi && touch $(READY)
	@find $(CACHE) -mindepth 2 -maxdepth 2 -path '*/env-*/.ready' -mtime +1 | \
	  while read -r stamp; do rm -rf "$${stamp%/.ready}" "$${stamp%/.ready}.lock"; done
	@rm -rf $(PACKAGE)
	@$(PIP) install --no-deps --no-build-isolation --target $(PACKAGE) .

else

install: $(READY)

$(READY): pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[dev]'
	@touch $@

endif

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
