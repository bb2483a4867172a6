# Every target sets up what it needs by itself: .venv when it is missing, and in it the project with an extra, under
# constraints.txt. That is done again only when pyproject.toml, constraints.txt or the C++ sources change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Two workers with one thread each beat one worker with two; workers that spin while they wait slow each other down.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: help quickstart test check lint types test-aot test-long test-peers test-gpu clean

help:
	@echo 'make quickstart  train a small DeepSeek-V3 on the text and code of this machine, and talk to it'
	@echo 'make test        every test but the long ones'
	@echo 'make check       lint, types and the fast tests'
	@echo 'make lint        ruff'
	@echo 'make types       mypy'
	@echo 'make test-aot    compile every GPU kernel at every size for every chip; needs no GPU'
	@echo 'make test-long   the tests that are too slow for make test'
	@echo 'make test-peers  the tests that compare with TRL and lm-eval'
	@echo 'make test-gpu    the tests on a GPU; skipped where there is none'
	@echo 'make clean       remove .venv, caches and build outputs; runs/ stays'
	@echo 'ARGS="..." is handed on, PYTHON=python3.12 chooses the interpreter of a new .venv.'

quickstart: $(VENV)/.train
	env -u OMP_NUM_THREADS $(BIN)/dsv3 quickstart $(ARGS)

# What `make test` leaves out. Triton interprets in a process of its own; its tests are many and alike, so that workers
# take them one by one. pytest's 5 says that ARGS, or a platform without Triton, left nothing to run.
ELSEWHERE := not long and not gpu and not peer and not interpreter and not compiled and not aot
test: $(VENV)/.dev
	$(PYTEST) -m "$(ELSEWHERE)" $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) --dist load -m interpreter $(ARGS) || [ $$? -eq 5 ]
	$(PYTEST) --dist load -m compiled $(ARGS) || [ $$? -eq 5 ]

check: lint types $(VENV)/.dev
	$(PYTEST) -m "not slow and $(ELSEWHERE)" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

# mypy wants a folder called dsv3, and the clone may have any name.
types: $(VENV)/.dev
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/dsv3
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p dsv3

test-aot: $(VENV)/.dev
	$(PYTEST) --dist load -m aot $(ARGS)

test-long: $(VENV)/.dev
	$(PYTEST) -m "long and not gpu" $(ARGS)

test-peers: $(VENV)/.peers
	$(PYTEST) -m "peer and not long and not gpu" $(ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info backends/cpu/native/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# What the C++ kernels of the cpu backend are built from; an installation builds them anew where they changed.
NATIVE := setup.py $(wildcard backends/cpu/native/*.cpp backends/cpu/native/*.h)

# A stamp per extra. Debian may have python3 without ensurepip: then the system's pip installs one into the new .venv.
$(VENV)/.%: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "dsv3 needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	    echo "Install one and say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null \
	    || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@
	@if [ $* = peers ]; then touch $(VENV)/.dev; fi  # includes dev, which
	@if [ $* != train ]; then touch $(VENV)/.train; fi  # includes train
