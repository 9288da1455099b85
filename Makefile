# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. `make setup TARGET=cuda` (or cpu) overrides what it finds.

PY := .venv/bin/python
TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP := .venv/.setup-$(TARGET)
DEV_STAMP := $(STAMP)-dev
TYPED := vllm_nbdiff kernels benchmarks scripts

# The first interpreter that runs and is recent enough, 3.11 before others: a name on PATH may be
# a shim that runs nothing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Importing vLLM takes twice as long without bytecode, and an engine imports it in three processes.
unexport PYTHONDONTWRITEBYTECODE

# vLLM's CPU workers are faster on Intel's OpenMP runtime and on tcmalloc: used where they exist.
PRELOAD = $(shell ls $(CURDIR)/.venv/lib/libiomp5.so /usr/lib/*/libtcmalloc_minimal.so.4 \
	2>/dev/null | paste -sd:)
RUN = $(if $(filter cpu,$(TARGET)),env LD_PRELOAD=$(or $(LD_PRELOAD),$(PRELOAD))) $(PY)

.PHONY: help setup dev check demo test test-all lint contract gpu-check bench eval clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create or update .venv, for CPU or CUDA

dev: $(DEV_STAMP)  ## setup, and what the tests, Ray and training need

$(STAMP) $(DEV_STAMP): setup.py scripts/setup_env.py vllm_nbdiff/mend.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: none on PATH; name one with" \
		"make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) scripts/setup_env.py $(TARGET) demo $(if $(filter %-dev,$@),adapt ray test)
	@touch $(STAMP) $@

check: setup  ## check the installation step by step
	$(PY) -m vllm_nbdiff

demo: setup  ## answer prompts by block diffusion and autoregressively, side by side
	$(RUN) examples/demo.py

lint: dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(TYPED)

# Models of the tests are tiny: threads that share their work would only wait for each other.
test test-all: export OMP_NUM_THREADS = 1
PYTEST = $(RUN) -m pytest -n 2

test: lint  ## lint, then the tests
	$(PYTEST)

test-all: lint  ## the long tests too, and 2000 fuzzed requests
	$(PYTEST) -m ""
	$(RUN) -m tests.fuzz --bodies 2000

contract: setup  ## what the plugin touches of a vLLM: VLLM=0.33.0, WITH="--diff" or "--accept"
	$(PY) -m scripts.contract $(VLLM) $(WITH)

gpu-check: dev  ## prove on a GPU that all works: WITH="--model DIR", or WITH=--toy on a CPU
	$(PY) -m scripts.gpu_check $(WITH)

bench: setup  ## block diffusion against stock vLLM on the same weights
	$(RUN) -m benchmarks

eval: setup  ## exact answers and tokens per forward of the bundled model; ends with one JSON line
	$(RUN) -m vllm_nbdiff.adapt.evaluate --model examples/nbdiff-nano

clean:  ## remove what was built; .venv goes too
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
